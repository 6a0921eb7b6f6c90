"""A bundle: the files of an adapter, by name, unopened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, Union

from loraformat import strict_json
from loraformat.model.tensors import LazyTensor

# What a merge writes about its output, which is true of that output alone: never copied into another one.
MANIFEST = "loraformat.manifest.json"
DIGESTS = "loraformat.digests.json"
CARD = "README.md"  # the model card of the Hub
# What a repository of the Hub has beside an output: the card, in which people write, and settings of git.
NOT_LISTED = (CARD, ".gitattributes")

Json: TypeAlias = strict_json.Json


class OpenedFiles(Protocol):
    """The files of an adapter or a base, opened once: later reads give what was there then, or an error."""

    uri: str

    @property
    def is_single_file(self) -> bool:
        """Whether it is one file rather than a folder."""

    def files(self) -> Mapping[str, int]:
        """Names of the files → sizes in bytes."""

    def folders(self) -> tuple[str, ...]:
        """Names of the subfolders."""

    def size(self, path: str) -> int:
        """Size of a file in bytes."""

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """A range of a file, or all from `offset` on."""

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `offset` on."""

    def identity(self, path: str) -> tuple[str | int, ...]:
        """What tells a file from any other that may stand under its name at another time."""

    def check_inside(self, path: str) -> None:
        """Raises: StorageError: `path` leads out of the folder, so that its content must not be copied."""


@dataclass(frozen=True, slots=True)
class FileFingerprint:
    """What tells a file from others.

    Attributes:
        header_sha256: of the header of a weight file: a safetensors header's bytes, or the names, places and CRC-32s of
            all records of a torch file; None for other files.
        sha256: of the whole file; None where it was not computed.
    """

    name: str
    nbytes: int
    header_sha256: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file whose bytes are passed through. `read()` gives all of them."""

    name: str
    nbytes: int
    read: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class JsonFile:
    """A file called `*.json` or `*.yaml`. `load()` parses it strictly, `read()` gives its bytes.

    Raises (from `load`): InvalidJson (LF005), InvalidYaml (LF009).
    """

    name: str
    nbytes: int
    read: Callable[[], bytes]
    load: Callable[[], Json]


@dataclass(frozen=True, slots=True)
class Tensors:
    """What the header of a tensor file says.

    Attributes:
        container: "safetensors", "torch" (the zip that torch.save writes), "npz" (the one that savez writes) or "gguf".
        entries: name → lazy tensor, in the order of the file.
        metadata: safetensors `__metadata__`; empty for torch files.
        wrapper: keys of the dicts around the state dict of a torch file (`("model_state_dict",)`), outermost first.
        extras: what stood beside the tensors in a torch file's dicts: dotted key → plain value (config, args); the
            settings of a GGUF header.
    """

    container: str
    entries: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    wrapper: tuple[str, ...] = ()
    extras: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file that looks like a tensor container by name or by magic. `open()` reads its header.

    Raises (from `open`): ContainerError and its subclasses.
    """

    name: str
    nbytes: int
    open: Callable[[], Tensors]


File: TypeAlias = Union[RawFile, JsonFile, TensorFile]


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of an adapter, top level only, sorted by name. Nothing is read until a file is asked for.

    Attributes:
        uri: where it came from, for messages; empty for a bundle in memory.
        is_single_file: whether the user named one file rather than a folder.
        folders: names of its subfolders, which are not looked into.
        named: the folder above, where that is the one that the user named; else "".
        opened: the files on disk, through which all of `files` are read; None for a bundle in memory.
    """

    uri: str
    files: Mapping[str, File]
    is_single_file: bool = False
    folders: tuple[str, ...] = ()
    opened: OpenedFiles | None = None
    named: str = ""

    def json(self, name: str) -> Json:
        """The parsed content of `name`; the file must be there and be a JsonFile."""
        found = self.files[name]
        assert isinstance(found, JsonFile)
        return found.load()

    def tensors(self, name: str) -> Tensors:
        """The header of `name`; the file must be there and be a TensorFile."""
        found = self.files[name]
        assert isinstance(found, TensorFile)
        return found.open()

    def tensor_files(self) -> tuple[TensorFile, ...]:
        """All files that look like tensor containers, by name."""
        return tuple(file for _, file in sorted(self.files.items()) if isinstance(file, TensorFile))
