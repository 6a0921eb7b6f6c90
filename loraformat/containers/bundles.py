"""Bundles of files: opened without reading them, and written."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import cast

from loraformat.containers import safetensors, strict_json
from loraformat.containers.layout import Layout
from loraformat.containers.sniff import HEAD_NBYTES, looks_like_safetensors, refuse_stand_in
from loraformat.errors import ContainerError
from loraformat.model.bundle import Bundle, File, Json, JsonFile, RawFile, TensorFile, Tensors
from loraformat.model.tensors import LazyTensor, bytes_of, row_blocks
from loraformat.storage import WEIGHT_SUFFIXES, Output, Source, Store, TarStore, Writer, open_store_of_adapter

_ARCHIVE = ".nemo"
# Of a checkpoint of torch.distributed: what says where each tensor is, and how the files of the tensors end.
METADATA, SHARD_SUFFIX = ".metadata", ".distcp"
_YAML_NBYTES = 1 << 20
_CONFIG_NBYTES = 1 << 20
_INDEX_NBYTES = 100_000_000
_TOKENIZER_NBYTES = 256 << 20
_TOKENIZER_NAMES = ("tokenizer", "vocab", "added_tokens", "special_tokens", "merges")
_BLOCK_NBYTES = 64 << 20

Progress = Callable[[int, int], None]


def open_bundle(uri: str) -> Bundle:
    """The files of a folder or of a `.nemo` archive, top level only, or one file.

    Nothing but the headers of an archive is read until a file is asked for.

    Raises: StorageError: there is no such folder or file; InvalidHeader, TruncatedFile: a damaged archive.
    """
    store = open_store_of_adapter(uri)
    if store.is_single_file and uri.lower().endswith(_ARCHIVE):
        members = TarStore(store, next(iter(store.files())))
        return bundle_of_store(members, uri)
    return bundle_of_store(store, uri, is_single_file=store.is_single_file)


def bundle_of_store(store: Source, uri: str, *, is_single_file: bool = False) -> Bundle:
    """The files of a store that is open already; `uri` is for messages."""
    sizes = store.files()
    files = {name: _file(store, name, nbytes) for name, nbytes in sizes.items()}
    if METADATA in sizes and not is_single_file:
        files = _with_shards(store, files)
    if is_single_file:
        files = {name: _by_magic(store, file) for name, file in files.items()}
    return Bundle(uri, files, is_single_file, store.folders(), store)


def save_bundle(bundle: Bundle, store: Store | Output, progress: Progress | None = None) -> tuple[str, ...]:
    """Write every file of a bundle, one tensor or 64 MiB of one at a time; the names written.

    Args:
        store: an Output where names of the bundle have a folder, "transformer/adapter_config.json".
        progress: called with bytes done and bytes in all.

    Raises: StorageError, ContainerError; what the lazies of the bundle raise.
    """
    opened = {name: file.open() for name, file in bundle.files.items() if isinstance(file, TensorFile)}
    layouts = {name: _layout(name, tensors) for name, tensors in opened.items()}
    total = sum(
        layouts[name].nbytes if isinstance(file, TensorFile) else file.nbytes for name, file in bundle.files.items()
    )
    done = 0
    for path, file in sorted(bundle.files.items()):
        with _folder_of(path, store) as (folder, name):
            if isinstance(file, TensorFile):
                _write_tensors(folder, name, layouts[path], opened[path].entries)
                done += layouts[path].nbytes
            else:
                data = file.read()
                with folder.create(name, len(data)) as writer:
                    writer.write(data)
                done += len(data)
        if progress is not None:
            progress(done, max(done, total))
    return tuple(sorted(bundle.files))


@contextmanager
def _folder_of(path: str, store: Store | Output) -> Iterator[tuple[Store, str]]:
    """The folder of a file of the output, and the file's name in it."""
    folder, _, name = path.rpartition("/")
    if not folder:
        yield store, name
        return
    with cast("Output", store).subfolder(folder) as inner:
        yield inner, name


def open_tensors(store: Source, path: str, *, lone: str = "") -> Tensors:
    """The header of a weight file; its container is chosen by its first bytes, except that `.safetensors` is believed.

    Args:
        lone: what a tensor is called that a file holds without a name: a `.npy` file, or torch.save of one tensor; ""
            refuses such files.

    Raises: ContainerError and its subclasses, StorageError.
    """
    if is_safetensors(store, path):
        header = safetensors.read_header(store, path)
        return Tensors("safetensors", safetensors.lazy_tensors(store, path, header), header.metadata)
    if is_gguf(store, path):
        from loraformat.containers.gguf import header as gguf_header
        from loraformat.containers.gguf import tensors as gguf_tensors

        found = gguf_header.read_header(store, path)
        entries = gguf_tensors.lazy_tensors(store, path, found)
        return Tensors("gguf", entries, extras=gguf_tensors.plain_settings(found))
    if path.lower().endswith(".npz"):
        from loraformat.containers import npz

        return Tensors("npz", npz.read_arrays(store, path))
    if lone and path.lower().endswith(".npy"):
        from loraformat.containers import npz

        return Tensors("npy", {lone: npz.read_array(store, path)})
    from loraformat.containers import torch_zip

    archive = torch_zip.read_archive(store, path, lone=lone)
    entries = torch_zip.lazy_tensors(store, path, archive)
    return Tensors("torch", entries, wrapper=archive.wrapper, extras=archive.extras)


def is_safetensors(store: Source, path: str) -> bool:
    """Whether a weight file is to be read as safetensors."""
    if path.lower().endswith(".safetensors"):
        return True
    return looks_like_safetensors(store.read(path, 0, min(9, store.size(path))))


def is_gguf(store: Source, path: str) -> bool:
    """Whether a weight file is to be read as GGUF."""
    return path.lower().endswith(".gguf") or store.read(path, 0, min(4, store.size(path))) == b"GGUF"


def json_limit(name: str) -> int:
    """The most bytes that are parsed of a JSON file of this name."""
    lower = name.lower()
    if lower.endswith(".index.json"):
        return _INDEX_NBYTES
    return _TOKENIZER_NBYTES if lower.startswith(_TOKENIZER_NAMES) else _CONFIG_NBYTES


def _file(store: Source, name: str, nbytes: int) -> File:
    def read() -> bytes:
        store.check_inside(name)
        return store.read(name)

    lower = name.lower()
    if lower.endswith(WEIGHT_SUFFIXES):
        return TensorFile(name, nbytes, cache(lambda: open_tensors(store, name)))
    if lower.endswith(".json"):
        return JsonFile(name, nbytes, read, cache(lambda: load_json(store, name, nbytes)))
    if lower.endswith((".yaml", ".yml")):
        return JsonFile(name, nbytes, read, cache(lambda: _load_yaml(store, name, nbytes)))
    return RawFile(name, nbytes, read)


def _with_shards(store: Source, files: Mapping[str, File]) -> dict[str, File]:
    """The files of a checkpoint of torch.distributed as one weight file, `.metadata`."""
    shards = {name: file for name, file in files.items() if name.endswith(SHARD_SUFFIX)}
    if not shards:
        return dict(files)

    def opened() -> Tensors:
        from loraformat.containers.distributed.tensors import open_distributed

        return open_distributed(store)

    nbytes = sum(file.nbytes for file in shards.values())
    others = {name: file for name, file in files.items() if name not in shards}
    return {**others, METADATA: TensorFile(METADATA, nbytes, cache(opened))}


def _by_magic(store: Source, file: File) -> File:
    """A file that the user named, as a weight file when it begins like one, whatever it is called."""
    if not isinstance(file, RawFile):
        return file
    head = store.read(file.name, 0, min(file.nbytes, 9))
    if not looks_like_safetensors(head) and not head.startswith((b"PK\x03\x04", b"GGUF")):
        return file
    return TensorFile(file.name, file.nbytes, cache(lambda: open_tensors(store, file.name)))


def load_json(store: Source, name: str, nbytes: int) -> Json:
    """The value of a JSON file, of which no more is read than its limit.

    Raises: InvalidJson, GitLfsPointer, WebPage, StorageError.
    """
    limit = json_limit(name)
    data = store.read(name, 0, min(nbytes, limit + 1))
    refuse_stand_in(data[:HEAD_NBYTES], name)
    return strict_json.parse(data, name, limit=limit)


def _load_yaml(store: Source, name: str, nbytes: int) -> Json:
    from loraformat import strict_yaml

    return strict_yaml.parse(store.read(name, 0, min(nbytes, _YAML_NBYTES + 1)), name)


def _layout(name: str, tensors: Tensors) -> Layout:
    shapes = {key: (lazy.dtype, lazy.shape) for key, lazy in tensors.entries.items()}
    if tensors.container == "torch":
        from loraformat.containers.torch_file import layout as torch_layout

        return torch_layout.plan_file(shapes, wrapper=tensors.wrapper, extras=tensors.extras)
    if tensors.container == "safetensors":
        return safetensors.plan_file(shapes, metadata=tensors.metadata)
    if tensors.container == "gguf":
        from loraformat.containers.gguf import layout as gguf_layout

        return gguf_layout.plan_file(shapes, gguf_layout.encoded(tensors.extras))
    raise ContainerError(f'no container is called "{tensors.container}"', where=name)


def _write_tensors(store: Store, name: str, layout: Layout, tensors: Mapping[str, LazyTensor]) -> None:
    checksums: dict[str, int] = {}
    with store.create(name, layout.nbytes) as writer:
        for key, lazy in tensors.items():
            checksums[key] = _write_tensor(writer, layout.entries[key].span.offset, key, lazy)
        for offset, data in layout.frame(checksums if layout.needs_checksums else {}):
            writer.write_at(offset, data)


def _write_tensor(writer: Writer, offset: int, name: str, lazy: LazyTensor) -> int:
    """The CRC-32 of the bytes written."""
    crc32 = 0
    for start, stop in row_blocks(lazy.shape, lazy.dtype.itemsize, _BLOCK_NBYTES):
        data = memoryview(lazy.raw(start, stop)) if lazy.raw is not None else _bytes_of(name, lazy, start, stop)
        crc32 = zlib.crc32(data, crc32)
        writer.write_at(offset, data)
        offset += data.nbytes
    return crc32


def _bytes_of(name: str, lazy: LazyTensor, start: int, stop: int) -> memoryview:
    value = lazy.read(start, stop)
    shape = (stop - start, *lazy.shape[1:]) if lazy.shape else ()
    assert value.shape == shape, f"{name}: expected shape {shape}, loaded {value.shape}"
    assert value.dtype == lazy.dtype.numpy, f"{name}: expected {lazy.dtype}, loaded {value.dtype}"
    return bytes_of(value, lazy.dtype)
