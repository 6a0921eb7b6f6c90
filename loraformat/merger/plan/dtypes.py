"""A dtype for the whole output, where one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from loraformat.merger.plan.data import Edit
from loraformat.merger.plan.edits import Edits
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.tensors import DType
from loraformat.naming import levels_of

# What transformers calls it: `torch_dtype` up to version 4, `dtype` since version 5.
_CONFIG_KEYS = ("dtype", "torch_dtype")


def in_dtype(found: Edits, base: Checkpoint, dtype: DType, kept: AbstractSet[str] = frozenset()) -> Edits:
    """The same edits with `dtype` as output, and an edit without terms for every other floating tensor.

    All floating tensors change, not only those that an adapter touches: a checkpoint of two dtypes is loaded in one of
    them by most libraries, which would round again.

    Args:
        kept: tensors that belong to the codes of quantized weights.
    """
    edits = {
        name: edit if is_always_single(base, edit.shape) else replace(edit, dtype=dtype.safetensors)
        for name, edit in found.edits.items()
    }
    for name, stored in base.tensors.items():
        is_other = stored.dtype.is_floating and stored.dtype is not dtype and not is_always_single(base, stored.shape)
        if is_other and name not in edits and name not in kept:
            edits[name] = Edit(name, name, dtype.safetensors, stored.shape, ())
    return Edits(dict(sorted(edits.items())), found.untied, found.resized)


def is_always_single(base: Checkpoint, shape: tuple[int, ...]) -> bool:
    """Whether a tensor keeps its dtype whatever is asked for: llama.cpp computes with vectors in float32 alone.

    Source: llama.cpp of llama_cpp_python 0.3.36, conversion/base.py `prepare_tensors`.
    """
    return bool(base.settings) and len(shape) < 2


def dtype_patch(config: Mapping[str, Json], dtype: DType) -> list[tuple[tuple[str, ...], str]]:
    """What config.json must say about the dtype, where it says anything."""
    return [
        ((*path, key), dtype.torch_name)
        for path, level in levels_of(config)
        for key in _CONFIG_KEYS
        if level.get(key) not in (None, dtype.torch_name)
    ]
