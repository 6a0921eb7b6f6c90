"""What a merge will do, as data: it pickles, prints as JSON, and needs nothing but itself to be executed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from loraformat import schema
from loraformat.diagnostics import json_path
from loraformat.errors import ConfigError
from loraformat.matching import WHOLE, RowMap
from loraformat.merger.plan.serialized import from_plain, to_plain
from loraformat.model.assumptions import Assumptions
from loraformat.model.bundle import FileFingerprint, Json
from loraformat.model.tensors import DType

VERSION = 3  # of the JSON form of a plan


@dataclass(frozen=True, slots=True)
class AdapterSource(Assumptions):
    """How to open an adapter again: its URI, the format that it was read as, and what the caller said about it.

    Attributes:
        strength: by which its updates are multiplied.
        of_component: the component of a pipeline whose updates are merged, under their names there; "" for all.
        files: what its files were when the plan was made.
    """

    uri: str
    format: str
    strength: float = 1.0
    of_component: str = ""
    files: tuple[FileFingerprint, ...] = ()


@dataclass(frozen=True, slots=True)
class Operand:
    """A base tensor that an update of another one is computed from; see Term for `transposed`."""

    tensor: str
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Term:
    """One update of one adapter, as it lands on a tensor.

    Attributes:
        adapter: index into `MergePlan.adapters`.
        weight: the update's base weight, as the adapter calls it.
        index: which of the updates of that weight.
        transposed: whether the tensor is stored as (in, out).
        part: which rows of the update the tensor takes, and where.
        strength: the factor that the user gave its adapter.
        operand: what it is computed from beside its own tensor, or None.
    """

    adapter: int
    weight: str
    index: int
    transposed: bool = False
    part: RowMap = WHOLE
    strength: float = 1.0
    operand: Operand | None = None


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How sums, which are made in float64, are rounded: all that changes values beside the plan's terms.

    Attributes:
        rounding: "nearest" or "stochastic".
        seed: of stochastic rounding, and of methods that drop values by chance.
        method: by which the changes of several adapters are combined, "ties", "dare" or "dare-ties"; "" for their sum.
        density: share of the values of each change that stay, of a method.
        sign: who elects the signs of ties: "total" or "frequency", see `Sparsity`.
    """

    rounding: str = "nearest"
    seed: int = 0
    method: str = ""
    density: float = 1.0
    sign: str = "total"


@dataclass(frozen=True, slots=True)
class FileOptions:
    """What the caller asked of the weight files; None keeps what the base has.

    Attributes:
        container: "safetensors" or "torch".
        dtype: safetensors name of the dtype of every floating tensor.
        max_shard_nbytes: most bytes of tensors in a file.
    """

    container: str | None = None
    dtype: str | None = None
    max_shard_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class QuantizedOutput:
    """What becomes of the weights of a quantized base.

    Attributes:
        scheme: of the base, by its name in `containers.quantized.SCHEMES`.
        is_dense: whether all are written dense; else those that no update reaches stay in codes.
        on_loading: see `Quantized`.
        is_recoded: whether those that updates reach are quantized again; else they are written dense.
    """

    scheme: str
    is_dense: bool
    on_loading: str = ""
    is_recoded: bool = False


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of an output file: dtype by its safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """A tensor of the output that is computed.

    Attributes:
        tensor: its name in the output.
        source: name of the base tensor that it starts from.
        dtype: safetensors name of the dtype in the output; that of `source` unless the plan changes it.
        shape: shape in the output; the first axis may be longer or shorter than the source's.
        terms: applied in order, see `Arithmetic`; the result is rounded once. None where only the dtype changes.
        row_axes: how many leading axes make the rows of the matrix that is computed: 2 for stacked experts, else 1.
        parts: tensors of the output that the result is written as, where it is quantized again; `tensor` is then
            the name of the weight that they mean, and `dtype` that of the values before.
    """

    tensor: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    row_axes: int = 1
    parts: tuple[PlannedTensor, ...] = ()

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the tensor seen as a matrix; a vector has one column."""
        return math.prod(self.shape[: self.row_axes]), math.prod(self.shape[self.row_axes :])

    @property
    def written(self) -> tuple[str, ...]:
        """The names of the tensors of the output that it makes."""
        return tuple(part.name for part in self.parts) or (self.tensor,)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file.

    Attributes:
        source: the base's file whose tensors it holds; the first of them where files are divided again.
        target: its name in the output.
        container: "safetensors", "torch" or "gguf".
        verbatim: whether header and offsets of `source` are kept byte for byte.
        tensors: all tensors, those that are aliases left out.
        aliases: name → the tensor of this file that it shares its bytes with.
        wrapper, metadata: see Tensors.
        edits: tensors that are computed; all others are copied from the base under their own name.
    """

    source: str
    target: str
    container: str
    verbatim: bool
    tensors: tuple[PlannedTensor, ...]
    aliases: dict[str, str] = field(default_factory=dict)
    wrapper: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file that is taken over as it is, from the base (`adapter` is None) or from an adapter."""

    name: str
    adapter: int | None = None


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A whole merge.

    Attributes:
        base: URI of the base.
        config_patch: changes to config.json, as paths of keys: (("text_config", "vocab_size"), 95).
        config_removed: paths of keys that config.json must not have any more.
        settings: JSON files next to config.json that are rewritten: (name, all that they say).
        index: name of the index to write anew, None where there is none or the base's is copied.
        left_out: what is not taken over from the base: other weight files, which would be stale, and subfolders.
        base_files: what the base's files were when the plan was made.
        quantized: for a quantized base, what becomes of its weights; else None.
    """

    base: str
    adapters: tuple[AdapterSource, ...]
    shards: tuple[ShardPlan, ...]
    copies: tuple[CopiedFile, ...]
    config_patch: tuple[tuple[tuple[str, ...], Json], ...] = ()
    index: str | None = None
    left_out: tuple[str, ...] = ()
    arithmetic: Arithmetic = Arithmetic()
    files: FileOptions = FileOptions()
    base_files: tuple[FileFingerprint, ...] = ()
    config_removed: tuple[tuple[str, ...], ...] = ()
    settings: tuple[tuple[str, Json], ...] = ()
    quantized: QuantizedOutput | None = None

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits of all shards."""
        return tuple(edit for shard in self.shards for edit in shard.edits)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists: what `--dry-run --format json` prints; schemas/merge-plan.schema.json fixes it."""
        return {"version": VERSION, **to_plain(self)}

    @classmethod
    def from_json(cls, value: Json) -> MergePlan:
        """A plan from what `to_json` gave.

        Raises: ConfigError (LF103): it is not of that form, or of another version.
        """
        if not isinstance(value, dict) or value.get("version") != VERSION:
            found = value.get("version") if isinstance(value, dict) else None
            raise ConfigError(f"version: expected {VERSION}, found {found!r:.20}", where="plan")
        plan = from_plain(cls, {name: one for name, one in value.items() if name != "version"}, "plan")
        fault = next(schema.check("merge-plan", value), None)
        if fault is not None:
            raise ConfigError(f"{json_path(fault[0])}: {fault[1]}", where="plan")
        return plan

    def only(self, target: str) -> MergePlan:
        """The same merge with one weight file alone. Raises LookupError: there is no such file."""
        found = [shard for shard in self.shards if shard.target == target]
        if not found:
            raise LookupError(target)
        return replace(self, shards=tuple(found))


def nbytes_of(tensor: PlannedTensor) -> int:
    """Bytes that the values of a planned tensor take."""
    return DType[tensor.dtype].itemsize * math.prod(tensor.shape)
