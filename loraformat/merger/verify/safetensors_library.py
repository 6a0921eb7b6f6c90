"""The safetensors library as a second reader of what we wrote."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loraformat.containers import bytes_of, read_rows
from loraformat.errors import MergeError
from loraformat.merger.plan.data import ShardPlan
from loraformat.model.checkpoint import StoredTensor
from loraformat.storage import LocalStore, Store


def check_with_library(output: Store, shard: ShardPlan, tensors: Mapping[str, StoredTensor]) -> None:
    """Open a written file with `safetensors.safe_open` and compare names, dtypes, shapes and a row of each tensor.

    Raises: MergeError (LF801): the library reads something else, or nothing.
    """
    from safetensors import SafetensorError, safe_open

    if not isinstance(output, LocalStore):  # the library opens paths
        return
    path = os.path.join(output.folder, shard.target)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            found = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
            if found != {name: (tensor.dtype.safetensors, tensor.shape) for name, tensor in tensors.items()}:
                raise MergeError("the safetensors library reads other tensors than we do", where=shard.target)
            for name, tensor in tensors.items():
                _compare_row(output, name, tensor, slices[name])
    except SafetensorError as error:
        raise MergeError(f"the safetensors library cannot read the file: {error}", where=shard.target) from error


def _compare_row(output: Store, name: str, tensor: StoredTensor, theirs: object) -> None:
    """The run along the last axis that the tensor's name picks; nothing for scalars and where there are no values."""
    *leading, length = tensor.shape or (0,)
    rows = math.prod(leading)
    if not rows * length:
        return
    row = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % rows
    ours = read_rows(output, replace(tensor, shape=(rows, length)), row, row + 1)
    if bytes_of(theirs[_place(row, leading)]) != bytes_of(ours):  # type: ignore[index]
        where = tensor.file
        raise MergeError(f"{name}: the safetensors library reads other values than we do in row {row}", where=where)


def _place(row: int, leading: Sequence[int]) -> tuple[slice, ...]:
    """Where row `row` of the tensor seen as a matrix stands along its leading axes."""
    place = []
    for size in reversed(leading):
        row, index = divmod(row, size)
        place.append(slice(index, index + 1))
    return (*reversed(place), slice(None))
