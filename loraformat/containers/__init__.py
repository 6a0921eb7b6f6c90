"""Bytes to named tensors and back. Knows nothing of LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from loraformat import strict_json
from loraformat.containers.adapter_folder import has_components, open_adapter_files, sources_of, with_components
from loraformat.containers.base_weights import weight_of
from loraformat.containers.bundles import bundle_of_store, open_bundle, open_tensors, save_bundle
from loraformat.containers.checkpoints import checkpoint_of_store, open_checkpoint, open_weights
from loraformat.containers.layout import Layout
from loraformat.containers.rows import read_raw_rows, read_rows, read_rows_into
from loraformat.containers.torch_file.checksum import combine_crc32
from loraformat.containers.weight_files import CONTAINERS, Container, container_of
from loraformat.model.tensors import DType
from loraformat.storage.base import Source

__all__ = [
    "CONTAINERS",
    "Container",
    "Layout",
    "bundle_of_store",
    "bundles",
    "checkpoint_of_store",
    "combine_crc32",
    "container_of",
    "fingerprints",
    "has_components",
    "layout",
    "open_adapter_files",
    "open_bundle",
    "open_checkpoint",
    "open_tensors",
    "open_weights",
    "plan_file",
    "quantized",
    "read_raw_rows",
    "read_rows",
    "read_rows_into",
    "save_bundle",
    "sources_of",
    "strict_json",
    "torch_zip",
    "weight_of",
    "with_components",
]


def plan_file(
    container: str,
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str] | None = None,
    wrapper: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
    name: str = "archive",
    like: tuple[Source, str] | None = None,
) -> Layout:
    """Where each tensor will stand in a new file of `container`, one of CONTAINERS.

    Args:
        metadata: where the container has room for it.
        wrapper, aliases, name: of a torch file, see `torch_file.layout.plan_file`.
        like: see `PlanFile`.

    Raises: ContainerError: a name or a size that the container cannot hold.
    """
    plan = CONTAINERS[container].plan_file
    return plan(tensors, metadata=metadata or {}, wrapper=wrapper, aliases=aliases or {}, name=name, like=like)
