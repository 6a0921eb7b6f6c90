"""The result of `diff`."""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.model.results.weight_figures import module_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDifference:
    """A field of the config, by its dotted path; values as JSON text, "" if the field is absent."""

    field: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDifference:
    """One weight that both have. D is the second minus the first: of updates ΔW, of tensors W.

    Attributes:
        weight: its name.
        status: "equal", "changed", "resized" (measured on the rows that both have), or "incomparable" (different kinds
            of update or shapes, or differing values that are not real numbers).
        reason: why it is incomparable; "" otherwise.
        kind: of update, "low-rank" or "low-rank -> dora"; "" for tensors.
        shape, shape_after: of the first and of the second.
        norm, norm_after: Frobenius norms of the first and of the second.
        distance: ‖D‖_F.
        relative: ‖D‖ / ‖first‖; None where the first is zero.
        cosine: of the two as vectors; None where either is zero.
        changed: share of the elements that differ; None for updates.
        largest: max |D|; None for updates.
        effective_rank, rank_90, rank_99: of D: exp of the entropy of its normalized singular values, and the smallest
            rank that holds that share of ‖D‖². None if they were not computed, or are above MOST_RANK. Of a stack of
            experts the medians (of two in the middle the larger) over those that differ.
        experts: how many experts of a stack differ; None if it is not a stack, or no rank was computed.
        rank_90_most, rank_99_most: the largest of any expert; None as for `experts`, and if it is above MOST_RANK.
        overlap_outputs, overlap_inputs, overlap_dimensions: of the leading subspaces of two updates.
    """

    weight: str
    status: str
    reason: str = ""
    kind: str = ""
    shape: tuple[int, ...] = ()
    shape_after: tuple[int, ...] = ()
    norm: float | None = None
    norm_after: float | None = None
    distance: float | None = None
    relative: float | None = None
    cosine: float | None = None
    changed: float | None = None
    largest: float | None = None
    effective_rank: float | None = None
    rank_90: int | None = None
    rank_99: int | None = None
    experts: int | None = None
    rank_90_most: int | None = None
    rank_99_most: int | None = None
    overlap_outputs: float | None = None
    overlap_inputs: float | None = None
    overlap_dimensions: int | None = None

    @property
    def module(self) -> str:
        """See `module_kind`."""
        return module_kind(self.weight)


MOST_RANK = 256
# The reason where nothing says that two updates differ.
UNKNOWN_SCALE = "a scale is unknown; pass it with --alpha"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffResult:
    """What `diff` found.

    Attributes:
        before, after: URIs.
        subject_kind: "adapters" or "checkpoints".
        formats: names of the formats of both; ("", "") for checkpoints.
        fields: of the configs.
        only_before, only_after: weights that only one of them has, sorted.
        weights: all others, sorted by name.
        distance, relative, cosine: over all comparable weights that both have.
        has_equal_values: whether both have the same weights and all of them are equal within the tolerance.
        has_equal_metadata: whether all fields of the configs are equal; for two formats, those that both can express.
        is_equal: both.
        grouping: how text output groups the weights: "module", "layer", "none" or "auto".
    """

    before: str
    after: str
    subject_kind: str
    formats: tuple[str, str] = ("", "")
    fields: tuple[FieldDifference, ...] = ()
    only_before: tuple[str, ...] = ()
    only_after: tuple[str, ...] = ()
    weights: tuple[WeightDifference, ...] = ()
    distance: float | None = None
    relative: float | None = None
    cosine: float | None = None
    has_equal_values: bool = False
    has_equal_metadata: bool = False
    is_equal: bool = False
    grouping: str = "auto"
