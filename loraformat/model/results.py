"""What the jobs find out, as data: all that a renderer knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, Union

from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Json
from loraformat.model.summary import kind_of, parameters_of, rank_of, scale_of
from loraformat.model.updates import tensors_of


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRecord:
    """One update of one base weight.

    Attributes:
        weight: name of the base weight.
        kind: see `loraformat.model.summary.kind_of`.
        shape: of the update, as the base weight has it.
        rank: None for kinds without one.
        scale: the factor applied; None where unknown or where the kind has none.
        parameters: elements of its tensors.
        dtype: safetensors name of its first tensor; "" for a kind without tensors.
        norm: Frobenius norm of what is added to the weight; None where it was not computed.
    """

    weight: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float | None
    parameters: int
    dtype: str
    norm: float | None = None


def weight_records(
    adapter: Adapter, norms: Mapping[str, tuple[float | None, ...]] | None = None
) -> tuple[WeightRecord, ...]:
    """A record for each update, sorted by weight.

    Args:
        norms: base weight → the norm of each of its updates, in their order.
    """
    records = []
    for base_weight, chain in sorted(adapter.updates.items()):
        found = (norms or {}).get(base_weight, (None,) * len(chain))
        for update, norm in zip(chain, found, strict=True):
            record = WeightRecord(
                weight=base_weight,
                kind=kind_of(update),
                shape=update.shape,
                rank=rank_of(update),
                scale=scale_of(update),
                parameters=parameters_of(update),
                dtype=next((tensor.dtype.safetensors for _, tensor in tensors_of(update)), ""),
                norm=norm,
            )
            records.append(record)
    return tuple(records)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that was not made, and why."""

    code: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectResult:
    """What `inspect` adds to the summary.

    Attributes:
        weights: one record for each update.
        layer_norms: layer → root of the sum of squared norms of its weights; empty where norms were not asked for.
        total_norm: the same over all weights.
        share: adapter parameters / (base + adapter parameters); None without a base.
    """

    weights: tuple[WeightRecord, ...]
    layer_norms: Mapping[int, float]
    total_norm: float | None = None
    share: float | None = None


@dataclass(frozen=True, slots=True)
class IgnoredFinding:
    """A finding that the project's settings leave out, and why."""

    code: str
    where: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateResult:
    """What `validate` did beside the findings.

    Attributes:
        checked: codes of the rules that ran, ascending. Those that did not stand in the report's `skipped`.
        ignored: what the rules found and the settings leave out.
        file: the weight file that findings about tensors are about; "" where there is none.
        base: URI of the base, with the commit where it is on the Hub; "" where none was given.
    """

    checked: tuple[str, ...]
    ignored: tuple[IgnoredFinding, ...] = ()
    file: str = ""
    base: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """How an output that was read back compares with what it was made of.

    Attributes:
        weights: how many were compared.
        exact: how many of them agree bit for bit.
        worst: largest difference of the others, as a share of what rounding may do.
        roundoff: relative error of each rounded value; 0 where none was.
    """

    weights: int
    exact: int
    worst: float
    roundoff: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What `convert` wrote.

    Attributes:
        source, target: names of the formats.
        weights: base weights that the written adapter has updates for.
        bytes_written: of all files; 0 in a dry run.
        files: names of the files written, or to be written in a dry run, sorted.
        is_dry_run: whether nothing was written.
        roundtrip: where it was asked for.
    """

    source: str
    target: str
    weights: int
    bytes_written: int
    files: tuple[str, ...]
    is_dry_run: bool = False
    roundtrip: RoundTrip | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """One adapter of a merge.

    Attributes:
        uri, format: where it came from and what it was read as.
        applied, modules: modules that landed on a weight, of how many.
        strength: by which its updates were multiplied.
    """

    uri: str
    format: str
    applied: int
    modules: int
    strength: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How much of what was added to one weight survived rounding; D is the update before rounding.

    Attributes:
        weight: name of the output tensor.
        share: <W' - W, D> / <D, D>; None where D is zero.
        unchanged: share of the elements that are as they were.
        norm: Frobenius norm of D.
        largest: max |D|.
    """

    weight: str
    share: float | None
    unchanged: float
    norm: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """What `merge` wrote, or would write.

    Attributes:
        base: URI of the base.
        tensors_touched, tensors_copied: tensors of the output that differ in origin, together all of them.
        parameters_touched: elements of the touched tensors.
        bytes_written: of the weight files; of the plan where nothing was written.
        files: names of the output files, sorted.
        is_dry_run: whether nothing was written on purpose.
        plan: the whole plan as JSON values, where nothing was written.
        retained: the share of all updates together that survived rounding; None where nothing was added or written.
        retention: the same for each touched weight that is not replaced, sorted by name.
        verified: how the output was compared with the inputs before it got its name: "none", "sample" or "full".
    """

    base: str
    adapters: tuple[MergedAdapter, ...]
    tensors_touched: int
    tensors_copied: int
    parameters_touched: int
    bytes_written: int
    files: tuple[str, ...]
    is_dry_run: bool = False
    plan: Mapping[str, Json] | None = None
    retained: float | None = None
    retention: tuple[Retention, ...] = ()
    verified: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What `verify` compared with the manifest.

    Attributes:
        files: files whose size and hashes were compared.
        weights: weights whose SHA-256 was computed again.
        bytes_read: of weights and whole files.
    """

    files: int
    weights: int
    bytes_read: int


Result: TypeAlias = Union[InspectResult, ValidateResult, ConvertResult, MergeResult, VerifyResult]
