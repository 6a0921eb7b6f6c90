"""Bundles in memory, without containers: for tests of formats, which are pure."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraformat.model.bundle import Bundle, File, JsonFile, RawFile, TensorFile, Tensors
from loraformat.model.tensors import LazyTensor

Content = Any
CONTAINERS = {"safetensors": "safetensors", "pt": "torch", "bin": "torch", "pth": "torch", "lora": "torch"}


def bundle(files: Mapping[str, Content], *, single: bool = False) -> Bundle:
    """A bundle of name → content: a dict of tensors, JSON for `*.json`, or bytes."""
    return Bundle("memory", {name: file(name, content) for name, content in sorted(files.items())}, single)


def file(name: str, content: Content) -> File:
    kind = CONTAINERS.get(name.rpartition(".")[2])
    if isinstance(content, Tensors):
        return TensorFile(name, 0, lambda: content)
    if kind and isinstance(content, dict):
        return TensorFile(name, 0, lambda: tensors(content, kind))
    if kind:
        return TensorFile(name, len(content), lambda: Tensors(kind, {}))
    if name.endswith((".json", ".yaml")) and not isinstance(content, bytes):
        encoded = json.dumps(content).encode()
        return JsonFile(name, len(encoded), lambda: encoded, lambda: content)
    return RawFile(name, len(content), lambda: content)


def tensors(
    entries: Mapping[str, Tensor], container: str = "safetensors", *, wrapper: tuple[str, ...] = (), **extras: Any
) -> Tensors:
    lazies = {name: LazyTensor.of(value) for name, value in entries.items()}
    return Tensors(container, lazies, wrapper=wrapper, extras=extras)


def loaded(written: Bundle) -> dict[str, Any]:
    """The content of a bundle, values and all: what `bundle` takes."""
    return {name: _with_header(each) for name, each in written.files.items()}


def _with_header(each: File) -> Any:
    """A file's content; with its header where that says more than whose tensors these are."""
    content = content_of(each)
    if not isinstance(each, TensorFile):
        return content
    header = each.open()
    if header.container == "gguf":
        return tensors(content, "gguf", **header.extras)
    return replace(tensors(content), metadata=header.metadata) if header.metadata.keys() - {"format"} else content


def content_of(each: File) -> Any:
    if isinstance(each, TensorFile):
        return {name: entry.torch().clone() for name, entry in each.open().entries.items()}
    return each.load() if isinstance(each, JsonFile) else each.read()


def save(written: Bundle, folder: Any) -> None:
    """To disk by the upstream libraries, for second opinions."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, each in written.files.items():
        if not isinstance(each, TensorFile):
            (folder / name).write_bytes(each.read())
            continue
        values = {key: value.contiguous() for key, value in content_of(each).items()}
        if each.open().container == "safetensors":
            save_file(values, folder / name, metadata=dict(each.open().metadata))
        else:
            torch.save(values, folder / name)


def open_folder(folder: Any) -> Bundle:
    """From disk by the upstream libraries; top level only."""
    from safetensors.torch import load

    files: dict[str, Content] = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            files[path.name] = load(content)
        elif path.suffix in (".pt", ".bin"):
            files[path.name] = torch.load(io.BytesIO(content), weights_only=True)
        elif path.suffix == ".json":
            files[path.name] = json.loads(content)
        elif path.is_file():
            files[path.name] = content
    return bundle(files)
