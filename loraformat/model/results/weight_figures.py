"""Records of single weights: one for each update, one for each embedding table."""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.model.adapter import Adapter, module_of
from loraformat.model.summary import parameters_of
from loraformat.model.updates import kind_of, rank_of, scale_of, tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRecord:
    """One update of one base weight. A metric is None if it was not requested or has no meaning.

    Attributes:
        weight: name of the base weight.
        kind: see `loraformat.model.summary.kind_of`.
        shape: of the update, as the base weight has it.
        rank: None for kinds without one.
        scale: the factor applied; None where unknown or where the kind has none.
        parameters: elements of its tensors.
        dtype: safetensors name of its first tensor; "" for a kind without tensors.
        norm: Frobenius norm of what is added to the weight. Without the base, DoRA's is that of s·BA, before the
            magnitude; kinds that replace or multiply have a norm only with the base.
        spectral_norm: the largest singular value of it; of a stack of experts the largest of any expert.
        stable_rank: ‖ΔW‖_F² / σ₁²; of a stack the median of its experts.
        effective_rank: exp of the entropy of the normalized singular values; of a stack the median.
        rank_90: the smallest rank that holds 90 % of ‖ΔW‖_F².
        singular_values: descending, at most MOST_VALUES; of a stack the root mean squares.
        base_norm: ‖W‖_F of the base weight.
        relative_norm: ‖W' - W‖_F / ‖W‖_F by all updates of the weight together.
        retained_bf16, retained_fp16: share of W' - W that would survive rounding W' to that dtype.
        is_outlier: whether the norm is an outlier among the weights of the same module kind.
        block: block of an image or video model, as its users call it: "IN04", "double 7"; "" for none.
    """

    weight: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float | None
    parameters: int
    dtype: str
    norm: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    rank_90: int | None = None
    singular_values: tuple[float, ...] = ()
    base_norm: float | None = None
    relative_norm: float | None = None
    retained_bf16: float | None = None
    retained_fp16: float | None = None
    is_outlier: bool = False
    block: str = ""

    @property
    def module(self) -> str:
        """The kind of module: the last name of the path that is not a number ("q_proj"), without the parameter."""
        return module_kind(self.weight)


MOST_VALUES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRecord:
    """An embedding table with replaced or added rows. Norms are Euclidean norms of rows.

    Attributes:
        weight: name of the table.
        rows_before, rows_after: of the base and of the result.
        changed: rows of the base whose values change.
        norm_before: median over the base's rows.
        norm_changed: median over the changed rows, after the change; None for none.
        norm_new, norm_new_least, norm_new_most: median, smallest and largest over the added rows; None for none.
    """

    weight: str
    rows_before: int
    rows_after: int
    changed: int
    norm_before: float
    norm_changed: float | None = None
    norm_new: float | None = None
    norm_new_least: float | None = None
    norm_new_most: float | None = None


def weight_records(adapter: Adapter) -> tuple[WeightRecord, ...]:
    """A record for each update, sorted by weight and in the order of application, from headers alone."""
    return tuple(
        WeightRecord(
            weight=base_weight,
            kind=kind_of(update).name,
            shape=update.shape,
            rank=rank_of(update),
            scale=scale_of(update),
            parameters=parameters_of(update),
            dtype=next((tensor.dtype.safetensors for _, tensor in tensors(update)), ""),
        )
        for base_weight, chain in sorted(adapter.updates.items())
        for update in chain
    )


def module_kind(base_weight: str) -> str:
    """The last name of the module path that is not a number, and the parameter's own where it is not "weight".

    "q_proj" for "model.layers.0.self_attn.q_proj.weight", "q_proj.bias" for its bias.
    """
    parts = [part for part in module_of(base_weight).split(".") if part and not part.isdigit()]
    own = base_weight.rpartition(".")[2]
    kind = parts[-1] if parts else base_weight
    return kind if own == "weight" or not parts else f"{kind}.{own}"
