"""A base model from its headers: its tensors, their files, and config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraformat.model.bundle import Json, OpenedFiles
from loraformat.model.tensors import DType, Entry, Span

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

# The file that makes a folder a pipeline of diffusers.
PIPELINE = "model_index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, with its place.

    Attributes:
        file: name of the weight file, a single path component.
        span: bytes in that file; for a strided view, all of its storage.
        strides: in elements, for a view that is not row-major without gaps; else None.
        offset: elements from the start of `span` to the first element; 0 unless strided.
        storage: names the bytes: tensors of one file with equal (storage, offset, shape, strides) are one tensor under
            several names (tied weights of a `.pt` file). None where the container has no sharing (safetensors).
        encoded: the name of the quantized weight whose shape this is; its values are decoded from other tensors, and
            its span is empty. "" for a tensor that stands in the file.
        block_type: of a GGUF file, the type of the blocks whose bytes the rows are ("Q4_K"); "" for plain numbers.
    """

    file: str
    dtype: DType
    shape: tuple[int, ...]
    span: Span
    strides: tuple[int, ...] | None = None
    offset: int = 0
    storage: str | None = None
    encoded: str = ""
    block_type: str = ""

    @property
    def entry(self) -> Entry:
        """As an Entry; only for a tensor that stands in the file, without strides."""
        assert self.strides is None
        assert not self.encoded
        return Entry(self.dtype, self.shape, self.span)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One weight file of a checkpoint.

    Attributes:
        container: "safetensors", "torch" or "gguf".
        nbytes: size of the file.
        names: its tensors, in the order of the header.
        metadata: safetensors `__metadata__`.
        data_start: first byte after the header (safetensors, GGUF); 0 for torch files.
        wrapper: see Tensors.wrapper.
        has_extras: whether the torch file holds anything beside tensors, which a rewrite would lose.
    """

    name: str
    container: str
    nbytes: int
    names: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_start: int = 0
    wrapper: tuple[str, ...] = ()
    has_extras: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWeight:
    """A weight of a base: its shape and dtype, and methods that read its values.

    >>> import loraformat
    >>> weight = loraformat.open_checkpoint("fixtures/minigpt/base").weights["token_embedding.weight"]
    >>> weight.read(0, 2).shape
    (2, 64)

    Attributes:
        parts: the stored tensors that it is made of.
        read: `read(start, stop)` gives those rows of the first axis as an array of `dtype.numpy`, in memory of their
            own; a weight of shape `()` is read as `read(0, 1)`.
        read_into: `read_into(start, stop, buffer)` fills a buffer of the right length with the bytes of the same rows,
            row-major and little-endian; None where they do not stand so.
        round_into: `round_into(start, stop, buffer, dtype)` fills a buffer with the same rows, each number rounded to a
            dtype of 16 bits, and says whether all are finite; None where nothing is gained by it.
        as_matrix: `as_matrix(2)` is a stack of matrices as one matrix with the rows of all of them; `as_matrix(1)` is
            the weight itself.
    """

    name: str
    parts: tuple[StoredTensor, ...]
    shape: tuple[int, ...]
    dtype: DType
    read: Callable[[int, int], Values]
    read_into: Callable[[int, int, memoryview], None] | None
    as_matrix: Callable[[int], BaseWeight]
    round_into: Callable[[int, int, memoryview, DType], bool] | None = None

    @property
    def is_copyable(self) -> bool:
        """Whether `raw` gives its bytes."""
        return self.read_into is not None

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a weight of shape `()`."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def raw(self, start: int, stop: int) -> bytearray:
        """The bytes of rows `start:stop`; only where `is_copyable`."""
        assert self.read_into is not None
        buffer = bytearray((stop - start) * self.row_nbytes)
        self.read_into(start, stop, memoryview(buffer))
        return buffer


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight that a quantized base stores as several tensors: codes, scales, zero points.

    Attributes:
        name: what the weight is called in a dense checkpoint.
        shape: in a dense checkpoint.
        dtype: in a dense checkpoint, unless the caller asks for another one.
        parts: names of all stored tensors that belong to it, in any file of the base, those included that only a
            runtime needs. A dense weight is written to the file of the first.
        layout: what its scheme knows of it beside that.
        remark: what the settings of the base say otherwise, or leave open, and what was taken for true; else "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    parts: tuple[str, ...]
    layout: object = None
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Quantized:
    """How a base is quantized.

    Attributes:
        scheme: its name in `containers.quantized.SCHEMES`.
        stored: the same base as its files store it: codes, scales and all weights that are not quantized.
        weights: the quantized weights, by name.
        on_loading: for a dense base that is read as bitsandbytes quantizes it on loading, the settings:
            "nf4,double"; else "".
    """

    scheme: str
    stored: Checkpoint
    weights: Mapping[str, QuantizedWeight]
    on_loading: str = ""


@dataclass(frozen=True, slots=True)
class TaskHead:
    """How a base differs from its files because the adapter was trained on a class with the head of a task.

    Attributes:
        name: the class: "LlamaForSequenceClassification".
        head: weights that the base lacks and the adapter brings; in the base they have no rows.
        dropped: stored weights that the class does not have.
        renamed: stored name → name in the class, where they differ.
        rewritten: weight files whose tensors are not those of the file any more.
        config: what config.json has to say, by key.
    """

    name: str
    head: tuple[str, ...]
    dropped: tuple[str, ...]
    renamed: Mapping[str, str]
    rewritten: frozenset[str]
    config: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model.

    >>> import loraformat
    >>> base = loraformat.open_checkpoint("fixtures/minigpt/base")
    >>> base.config["model_type"], base.parameters
    ('MiniGPT', 111940)

    Attributes:
        uri: folder or file.
        files: weight files by name.
        tensors: all weights, by name: the tensors of the index (or of all files where there is none), but those of a
            scheme that is known (`quantized`) as the weights that they are decoded to.
        index: name of the `*.index.json`, or None.
        config: config.json, or {} where there is none.
        others: every other regular file beside the weights (config.json and index included) → size.
        folders: names of subfolders, which are not looked into.
        layers: for a base whose layers were repeated: which stored layer each copies; else ().
        task: for a base that gets the head of a task: what that changes; else None.
        quantization_files: JSON files beside config.json in which tools say that a base is quantized → values.
        weights: name → weight with its values, for all `tensors`; empty for headers without files.
        opened: the files, or None for headers alone. Whoever needs bytes of the base reads them here or by `weights`:
            files that are opened again may be others.
        quantized: how some of the weights are stored; None where all are tensors of the files.
        settings: of a GGUF file, what its header says of the model; else {}.
        components: of a pipeline of diffusers: name → the base that its folder holds; {} for one model.
    """

    uri: str
    files: Mapping[str, WeightFile]
    tensors: Mapping[str, StoredTensor]
    index: str | None = None
    config: Mapping[str, Json] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    task: TaskHead | None = None
    quantization_files: Mapping[str, Json] = field(default_factory=dict)
    weights: Mapping[str, BaseWeight] = field(default_factory=dict)
    opened: OpenedFiles | None = None
    quantized: Quantized | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)
    components: Mapping[str, Checkpoint] = field(default_factory=dict)

    @property
    def as_stored(self) -> Checkpoint:
        """Every tensor that can be copied, as in the files.

        A base with other layers or another head than its files has no quantized weight that could be copied.
        """
        if self.quantized is None or self.layers or self.task is not None:
            return self
        return self.quantized.stored

    @property
    def store(self) -> OpenedFiles:
        """The files of a checkpoint that is not headers alone."""
        assert self.opened is not None
        return self.opened

    @property
    def parameters(self) -> int:
        """Elements of all tensors; one that has several names counts once."""
        seen: set[tuple[object, ...]] = set()
        total = 0
        for name, tensor in self.tensors.items():
            key = (tensor.file, tensor.storage, tensor.offset, tensor.shape) if tensor.storage else (name,)
            if key not in seen:
                seen.add(key)
                total += math.prod(tensor.shape)
        return total
