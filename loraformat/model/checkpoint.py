"""A base model as headers: which tensors stand where, and what config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraformat.model.bundle import Json
from loraformat.model.tensors import DType, Entry, Span


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
    """

    file: str
    dtype: DType
    shape: tuple[int, ...]
    span: Span
    strides: tuple[int, ...] | None = None
    offset: int = 0
    storage: str | None = None

    @property
    def entry(self) -> Entry:
        """As an Entry; only for a tensor without strides."""
        assert self.strides is None
        return Entry(self.dtype, self.shape, self.span)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One weight file of a checkpoint.

    Attributes:
        container: "safetensors" or "torch".
        nbytes: size of the file.
        names: its tensors, in the order of the header.
        metadata: safetensors `__metadata__`.
        data_start: first byte after the header (safetensors); 0 for torch files.
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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model.

    Attributes:
        uri: folder or file.
        files: weight files by name.
        tensors: all tensors of the index (or of all files where there is none), by name.
        index: name of the `*.index.json`, or None.
        config: config.json, or {} where there is none.
        others: every other regular file beside the weights (config.json and index included) → size.
        folders: names of subfolders, which are not looked into.
    """

    uri: str
    files: Mapping[str, WeightFile]
    tensors: Mapping[str, StoredTensor]
    index: str | None = None
    config: Mapping[str, Json] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    folders: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements of all tensors; one that has several names counts once."""
        seen: set[tuple[object, ...]] = set()
        total = 0
        for name, tensor in self.tensors.items():
            key = (tensor.file, tensor.storage, tensor.offset, tensor.shape) if tensor.storage else (name,)
            if key not in seen:
                seen.add(key)
                count = 1
                for size in tensor.shape:
                    count *= size
                total += count
        return total
