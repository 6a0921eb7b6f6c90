"""Bytes to named tensors and back. Knows nothing of LoRA; torch is imported only where values are read or written."""

from __future__ import annotations

from collections.abc import Mapping

from loraformat import strict_json
from loraformat.containers import safetensors
from loraformat.containers.adapter_folder import open_adapter_files
from loraformat.containers.base_weights import weight_of
from loraformat.containers.bundles import bundle_of_store, open_bundle, open_tensors, save_bundle
from loraformat.containers.checkpoints import checkpoint_of_store, open_checkpoint, open_weights
from loraformat.containers.layout import Layout
from loraformat.containers.rows import bytes_of, read_raw_rows, read_rows, read_rows_into
from loraformat.containers.torch_file.checksum import combine_crc32
from loraformat.model.tensors import DType
from loraformat.storage.base import Source

__all__ = [
    "Layout",
    "bundle_of_store",
    "bytes_of",
    "check_records",
    "checkpoint_of_store",
    "combine_crc32",
    "open_adapter_files",
    "open_bundle",
    "open_checkpoint",
    "open_tensors",
    "open_weights",
    "plan_file",
    "read_raw_rows",
    "read_rows",
    "read_rows_into",
    "save_bundle",
    "strict_json",
    "weight_of",
]


def check_records(store: Source, path: str) -> None:
    """See torch_zip, which only those who read a torch file need to import."""
    from loraformat.containers.torch_file import archive as torch_zip

    torch_zip.check_records(store, path)


def plan_file(
    container: str,
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str] | None = None,
    wrapper: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
    name: str = "archive",
) -> Layout:
    """Where each tensor will stand in a new file of `container`, "safetensors" or "torch".

    Args:
        metadata: of a safetensors file.
        wrapper, aliases, name: of a torch file, see `torch_layout.plan_file`.

    Raises: ContainerError: a name or a size that the container cannot hold.
    """
    if container == "safetensors":
        assert not wrapper
        assert not aliases
        return safetensors.plan_file(tensors, metadata=metadata)
    assert container == "torch"
    from loraformat.containers.torch_file import layout as torch_layout

    return torch_layout.plan_file(tensors, wrapper=wrapper, aliases=aliases, name=name)
