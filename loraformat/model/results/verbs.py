"""The results of the other verbs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, Union

from loraformat.model.bundle import Json
from loraformat.model.results.differences import DiffResult
from loraformat.model.results.estimates import EstimateResult
from loraformat.model.results.factor_changes import FactorResult
from loraformat.model.results.validation import ValidateResult
from loraformat.model.results.weight_figures import TableRecord, WeightRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectResult:
    """What `inspect` adds to the summary.

    Attributes:
        weights: one record for each update, in the order asked for.
        layer_norms: layer → root of the sum of squared norms of its weights; empty unless norms were requested.
        total_norm: the same over all weights except replaced ones, whose change is in `tables`.
        total_relative_norm: ‖W' - W‖_F / ‖W‖_F over the weights that the adapter changes without replacing them; None
            if the base's values were not read.
        retained_bf16, retained_fp16: share of all of W' - W that would survive rounding to that dtype; likewise None.
        tables: embedding tables, if the base's values were read.
        share: adapter parameters / (base + adapter parameters); None without a base.
        base_scheme: quantization scheme of the base; None if it is not quantized, or with an unsupported scheme.
        grouping: how text output groups the weights: "module", "layer", "none", or "auto" (by module if there are
            many).
        has_heat: whether text output has a heat map, module × layer.
        training: facts about the training from the header of the weights: "resolution" → "(512, 512)".
        metadata: the whole header, if requested.
    """

    weights: tuple[WeightRecord, ...]
    layer_norms: Mapping[int, float]
    total_norm: float | None = None
    total_relative_norm: float | None = None
    retained_bf16: float | None = None
    retained_fp16: float | None = None
    tables: tuple[TableRecord, ...] = ()
    share: float | None = None
    base_scheme: str | None = None
    grouping: str = "auto"
    has_heat: bool = False
    training: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """How an output, read back, compares with its source.

    Attributes:
        weights: how many were compared.
        exact: how many of them agree bit for bit.
        worst: largest difference of the others, relative to the bound on rounding.
        roundoff: relative error of each rounded value; 0 if none was rounded.
    """

    weights: int
    exact: int
    worst: float
    roundoff: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RenamedTensor:
    """A tensor whose name `--map` changes.

    >>> import loraformat
    >>> loraformat.RenamedTensor(before="h.0.wq.lora.A", after="model.layers.0.self_attn.q_proj.lora.A").before
    'h.0.wq.lora.A'
    """

    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposedMap:
    r"""A map for all modules whose names differ only in numbers.

    >>> import loraformat
    >>> loraformat.ProposedMap(before=r"^h\.(\d+)\.wq", after="", candidates=("layers.N.q", "layers.N.o")).candidates
    ('layers.N.q', 'layers.N.o')

    Attributes:
        before, after: as for `--map`; `after` is "" if several names of the base fit, or none.
        candidates: the names of the base that fit, with N for a number.
    """

    before: str
    after: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What `convert` wrote.

    Attributes:
        source, target: names of the formats.
        weights: base weights that the written adapter has updates for.
        bytes_written: total of all files; 0 in a dry run.
        files: names of the files written, or to be written in a dry run, sorted.
        is_dry_run: whether nothing was written.
        roundtrip: the comparison after reading back, if requested.
        renamed: tensors whose names `--map` changes.
        idle_maps: patterns of `--map` that match no name; only in a dry run.
        proposed: maps from the adapter's modules to the base's, if requested.
    """

    source: str
    target: str
    weights: int
    bytes_written: int
    files: tuple[str, ...]
    is_dry_run: bool = False
    roundtrip: RoundTrip | None = None
    renamed: tuple[RenamedTensor, ...] = ()
    idle_maps: tuple[str, ...] = ()
    proposed: tuple[ProposedMap, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """One adapter of a merge.

    Attributes:
        uri, format: its path or address, and its format.
        applied, modules: how many modules were applied, of how many.
        strength: the factor of its updates.
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
        share: <W' - W, D> / <D, D>; None where D is zero. It, norm and largest have six digits.
        unchanged: share of the elements that are as they were.
        norm: Frobenius norm of D.
        largest: max |D|.
        base_change: ‖W - dequantized W‖ / ‖D‖ where the base was quantized and dequantized first; else None.
        code_error: ‖W' - (W + D)‖ / ‖D‖ where the result was quantized again; else None.
    """

    weight: str
    share: float | None
    unchanged: float
    norm: float
    largest: float
    base_change: float | None = None
    code_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """How much of an output was compared before it was moved into place.

    Attributes:
        changed: tensors that are not copies.
        followed: how many of them the independent computation can predict.
        compared: how many of them were compared with it, entirely or in some rows.
        copied, copies_compared: copies, and how many were compared with the base, entirely or in part.
        unscaled: updates whose format defines no formula for the scale, so the reader's was trusted.
    """

    changed: int
    followed: int
    compared: int
    copied: int
    copies_compared: int
    unscaled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileShare:
    """The part of an output's weight files that one of several processes computed.

    >>> import loraformat
    >>> adapters = ["fixtures/minigpt/lora_adapter"]
    >>> report = loraformat.merge("fixtures/minigpt/base", adapters, "divided", alpha=1.0, rank=0, world=2)
    >>> report.data.share.rank, report.data.share.files
    (0, ('model.pt',))

    Attributes:
        rank: from 0.
        world: how many parts there are.
        files: names of the weight files of this part.
        nbytes: of their tensors.
    """

    rank: int
    world: int
    files: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """What `merge` wrote, or would write.

    Attributes:
        base: URI of the base.
        tensors_touched, tensors_copied, tensors_dequantized, tensors_cast: the tensors of the output: changed by an
            update; copied from the base; dequantized without an update; or only in another dtype.
        parameters_touched: elements of the touched tensors.
        bytes_written: total of the weight files; the planned total if nothing was written.
        files: names of the output files, sorted.
        is_dry_run: whether it was a dry run.
        plan: the whole plan as JSON values, if nothing was written.
        retained: the share of all updates together that survived rounding; None if nothing was added or written.
        retention: the same for each touched weight that is not replaced, sorted by name.
        verified: how the output was compared before it was moved into place: "none", "sample" or "full".
        checked: how much of it was compared; None if nothing was.
        as_trained: bitsandbytes settings with which the base was quantized and dequantized first; "" if it was not.
        recoded: weights that were quantized again; each consists of several of the touched tensors.
        code_error: ‖W' - (W + D)‖ / ‖D‖ over those; None if there are none.
        base_change: ‖W - dequantized W‖ / ‖D‖ over all touched weights: the difference to a merge into the stored base,
            relative to the update; None if there is none, or if files of an earlier run were reused.
        share: the files that this process computed, if the output is divided among ranks; otherwise None.
    """

    base: str
    adapters: tuple[MergedAdapter, ...]
    tensors_touched: int
    tensors_copied: int
    tensors_dequantized: int = 0
    tensors_cast: int = 0
    parameters_touched: int
    bytes_written: int
    files: tuple[str, ...]
    is_dry_run: bool = False
    plan: Mapping[str, Json] | None = None
    retained: float | None = None
    retention: tuple[Retention, ...] = ()
    verified: str = "none"
    checked: Checked | None = None
    as_trained: str = ""
    base_change: float | None = None
    recoded: int = 0
    code_error: float | None = None
    share: FileShare | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What `verify` compared.

    Attributes:
        files: files that the manifest lists.
        weights: computed weights that it lists.
        bytes_read: bytes of the output that were compared with a digest, a checksum or the base, each counted once.
        bytes_total: bytes of all existing files of the output.
        tensors_of_base: copied tensors that were compared with the base's; None if no base was given.
    """

    files: int
    weights: int
    bytes_read: int
    bytes_total: int
    tensors_of_base: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardResult:
    """What `card` wrote.

    Attributes:
        relation: of the output to its base, in the Hub's terms: "adapter", "merge" or "quantized"; "" for none of them.
        text: of the card.
    """

    relation: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotResult:
    """What `plot` wrote.

    Attributes:
        form: "html", "svg", "png" or "pdf".
        adapters: in the order of the plot.
        steps: of a run's checkpoints; () if they are not checkpoints of one run.
        weights: records of the last adapter.
        nbytes: size of the file.
    """

    form: str
    adapters: tuple[str, ...]
    steps: tuple[int, ...]
    weights: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoneWeight:
    """A weight from which `unmerge` removed updates.

    Attributes:
        weight: name of the tensor.
        values: how many it has.
        unknown: values that rounding made ambiguous, and those that are not finite; 0 if the base was given.
        unlike: values that merging these adapters does not reproduce, bit for bit.
        bound: how far an unknown, finite value may be from the base's.
        not_finite: NaN and infinity among the unknown values.
    """

    weight: str
    values: int
    unknown: int = 0
    unlike: int = 0
    bound: float = 0.0
    not_finite: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergeResult:
    """What `unmerge` wrote, or would write.

    Attributes:
        merged: URI of the model.
        adapters: the removed adapters, with the strengths at which they had been merged.
        proof: "base": the base was given, and merging the adapters into it gives the model; "manifest": the manifest of
            the model says that they were merged last, all files are as written, and the base's other files did not
            change; "none": nothing proves it.
        doubt: which of these conditions fails, if the manifest names these adapters; otherwise "".
        is_exact: whether the output is proven to have the base's tensors, byte for byte. Without the base, tokenizer
            files that the merge took from an adapter stay.
        weights: one for each tensor that was merged into, sorted by name.
        bytes_written: total of the weight files; the planned total in a dry run.
        files: names of the output files, sorted.
        share: the files that this process computed, if the output is divided among ranks; otherwise None.
    """

    merged: str
    adapters: tuple[MergedAdapter, ...]
    proof: str
    is_exact: bool
    weights: tuple[UndoneWeight, ...]
    bytes_written: int = 0
    files: tuple[str, ...] = ()
    is_dry_run: bool = False
    doubt: str = ""
    share: FileShare | None = None


Result: TypeAlias = Union[
    InspectResult,
    ValidateResult,
    ConvertResult,
    FactorResult,
    MergeResult,
    UnmergeResult,
    VerifyResult,
    EstimateResult,
    DiffResult,
    PlotResult,
    CardResult,
]
