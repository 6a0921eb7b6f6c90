"""The containers of weight files: how a file of each is detected, opened and laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from loraformat.containers import safetensors
from loraformat.containers.bundles import is_gguf, is_safetensors
from loraformat.containers.layout import Layout
from loraformat.errors import FormatError
from loraformat.model.checkpoint import StoredTensor, WeightFile
from loraformat.model.tensors import DType
from loraformat.storage.base import Source

Opened = tuple[WeightFile, dict[str, StoredTensor]]
Shapes = Mapping[str, tuple[DType, tuple[int, ...]]]


class PlanFile(Protocol):
    """Lays out a file before any value is there."""

    def __call__(
        self,
        tensors: Shapes,
        *,
        metadata: Mapping[str, str],
        wrapper: tuple[str, ...],
        aliases: Mapping[str, str],
        name: str,
        like: tuple[Source, str] | None,
    ) -> Layout:
        """Where each tensor will stand. Raises ContainerError: a name or a size that the container cannot hold.

        Args: like: the file whose tensors they are, for a container whose header holds the model's settings.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """How a file holds named tensors.

    Attributes:
        name: as WeightFile.container and ShardPlan.container have it.
        file_name: the name of a file in this container, from its name in another.
        index_name: of the index over several files; None where such a checkpoint is not divided again.
        holds: whether a file is of this container.
        open: headers of a file: (store, name, bytes). Raises ContainerError and its subclasses.
        plan_file: see PlanFile.
        check: compares what the file's own checksums speak for. Raises ContainerError.
        depends_on_values: whether what frames the tensors depends on their values, as CRC-32s do.
        shares_storage: whether several names can have the same bytes.
        has_metadata: whether a header has room for text about the file.
    """

    name: str
    file_name: Callable[[str], str]
    index_name: str
    holds: Callable[[Source, str], bool]
    open: Callable[[Source, str, int], Opened]
    plan_file: PlanFile
    check: Callable[[Source, str], None]
    depends_on_values: bool
    shares_storage: bool
    has_metadata: bool


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _safetensors_name(name: str) -> str:
    stem = _stem(name)
    return (stem.replace("pytorch_model", "model", 1) if stem.startswith("pytorch_model") else stem) + ".safetensors"


def _open_safetensors(store: Source, name: str, nbytes: int) -> Opened:
    header = safetensors.read_header(store, name)
    tensors = {key: safetensors.stored(name, entry) for key, entry in header.entries.items()}
    file = WeightFile(name, "safetensors", nbytes, tuple(tensors), header.metadata, header.data_start)
    return file, tensors


def _plan_safetensors(
    tensors: Shapes,
    *,
    metadata: Mapping[str, str],
    wrapper: tuple[str, ...],
    aliases: Mapping[str, str],
    name: str,
    like: tuple[Source, str] | None,
) -> Layout:
    assert not wrapper
    assert not aliases
    del name, like
    return safetensors.plan_file(tensors, metadata=metadata)


def _torch_name(name: str) -> str:
    stem = _stem(name)
    return (f"pytorch_{stem}" if stem == "model" or stem.startswith("model-") else stem) + ".bin"


def _open_torch(store: Source, name: str, nbytes: int) -> Opened:
    from loraformat.containers.torch_zip import read_archive

    archive = read_archive(store, name)
    names = tuple(archive.tensors)
    file = WeightFile(name, "torch", nbytes, names, wrapper=archive.wrapper, has_extras=bool(archive.extras))
    return file, dict(archive.tensors)


def _plan_torch(
    tensors: Shapes,
    *,
    metadata: Mapping[str, str],
    wrapper: tuple[str, ...],
    aliases: Mapping[str, str],
    name: str,
    like: tuple[Source, str] | None,
) -> Layout:
    from loraformat.containers.torch_file.layout import plan_file

    del like
    assert not metadata
    return plan_file(tensors, wrapper=wrapper, aliases=aliases, name=name)


def _check_torch(store: Source, name: str) -> None:
    from loraformat.containers.torch_zip import check_records

    check_records(store, name)


def _open_gguf(store: Source, name: str, nbytes: int) -> Opened:
    from loraformat.containers.gguf.header import read_header
    from loraformat.containers.gguf.tensors import stored

    header = read_header(store, name)
    if header.value("general.type") == "adapter":
        raise FormatError("this is an adapter, not a base model", where=name, hint="pass the file of the base model")
    if header.value("split.count") not in (None, 0, 1):
        text = f"this is one of {header.value('split.count')} files that a model was split into"
        raise FormatError(text, where=name, hint="join them with llama-gguf-split --merge")
    tensors = {key: stored(name, info) for key, info in header.tensors.items()}
    return WeightFile(name, "gguf", nbytes, tuple(tensors), data_start=header.data_start), tensors


def _plan_gguf(
    tensors: Shapes,
    *,
    metadata: Mapping[str, str],
    wrapper: tuple[str, ...],
    aliases: Mapping[str, str],
    name: str,
    like: tuple[Source, str] | None,
) -> Layout:
    from loraformat.containers.gguf import layout

    assert not metadata
    assert not wrapper
    assert not aliases
    assert like is not None
    del name
    return layout.plan_file(tensors, layout.like(*like, tensors))


# By name. The last is asked first whether a file is of it; the first takes what no other does.
CONTAINERS: dict[str, Container] = {
    "torch": Container(
        name="torch",
        file_name=_torch_name,
        index_name="pytorch_model.bin.index.json",
        holds=lambda store, name: True,  # noqa: ARG005
        open=_open_torch,
        plan_file=_plan_torch,
        check=_check_torch,
        depends_on_values=True,
        shares_storage=True,
        has_metadata=False,
    ),
    "gguf": Container(
        name="gguf",
        file_name=lambda name: f"{_stem(name)}.gguf",
        index_name="model.gguf.index.json",
        holds=is_gguf,
        open=_open_gguf,
        plan_file=_plan_gguf,
        check=lambda store, name: None,  # noqa: ARG005 - it has no checksums
        depends_on_values=False,
        shares_storage=False,
        has_metadata=False,
    ),
    "safetensors": Container(
        name="safetensors",
        file_name=_safetensors_name,
        index_name="model.safetensors.index.json",
        holds=is_safetensors,
        open=_open_safetensors,
        plan_file=_plan_safetensors,
        check=lambda store, name: None,  # noqa: ARG005 - it has no checksums
        depends_on_values=False,
        shares_storage=False,
        has_metadata=True,
    ),
}


def container_of(store: Source, name: str) -> Container:
    """The container of a weight file."""
    return next(one for one in reversed(CONTAINERS.values()) if one.holds(store, name))
