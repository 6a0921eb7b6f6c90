"""The safetensors library as a second reader of what we wrote."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from loraformat.containers import read_raw_rows
from loraformat.errors import MergeError
from loraformat.merger.plan.data import ShardPlan
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType
from loraformat.storage import LocalStore, Store

if TYPE_CHECKING:
    from loraformat.model.tensors import Values


class _Slice(Protocol):
    """A tensor as the library shows it."""

    def __getitem__(self, place: tuple[slice, ...], /) -> Values: ...
    def get_dtype(self) -> str: ...
    def get_shape(self) -> Sequence[int]: ...


# The library makes arrays of these, and has no type of numpy for the others; where those begin it tells by its order.
_READABLE = {
    *(DType.F64, DType.F32, DType.F16, DType.I64, DType.I32, DType.I16, DType.I8),
    *(DType.U64, DType.U32, DType.U16, DType.U8, DType.BOOL),
}


def check_with_library(output: Store, shard: ShardPlan, tensors: Mapping[str, StoredTensor]) -> None:
    """Open a written file with `safetensors.safe_open`; compare names, dtypes, shapes, order and a row of each tensor.

    The library needs PyTorch to make values of bfloat16 and of 8-bit floats. Of those the bytes are compared that stand
    where the library's own reading of the header puts them: it allows no gap between tensors, nor one after the last.

    Raises: MergeError (LF801): the library reads something else, or nothing.
    """
    from safetensors import SafetensorError, safe_open

    if not isinstance(output, LocalStore):  # the library opens paths
        return
    path = os.path.join(output.folder, shard.target)
    slices: dict[str, _Slice] = {}
    try:
        with safe_open(path, framework="np") as file:
            slices.update((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 - it is not a dict
            found = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
            if found != {name: (tensor.dtype.safetensors, tensor.shape) for name, tensor in tensors.items()}:
                raise MergeError("the safetensors library reads other tensors than loraformat", where=shard.target)
            begin = output.size(shard.target) - sum(tensor.span.nbytes for tensor in tensors.values())
            for name in _order(file, tensors):
                _compare_row(output, name, tensors[name], slices, begin)
                begin += math.prod(found[name][1]) * DType[found[name][0]].itemsize
    except SafetensorError as error:
        raise MergeError(f"the safetensors library cannot read the file: {error}", where=shard.target) from error
    finally:
        # Each maps the file, and an error keeps this frame: Windows could not remove the unfinished output.
        slices.clear()


def _order(file: object, tensors: Mapping[str, StoredTensor]) -> Sequence[str]:
    """The names in the order in which the library finds the tensors; in ours where it is too old to tell (0.5)."""
    if hasattr(file, "offset_keys"):
        return list(file.offset_keys())
    return sorted(tensors, key=lambda name: tensors[name].span)


def _compare_row(output: LocalStore, name: str, tensor: StoredTensor, theirs: Mapping[str, _Slice], begin: int) -> None:
    """The run along the last axis that the tensor's name picks; nothing for scalars and where there are no values.

    Args:
        theirs: all tensors; no slice is held here, since each maps the file.
        begin: where the tensor begins in the file, by the library.
    """
    *leading, length = tensor.shape or (0,)
    rows = math.prod(leading)
    if not rows * length:
        return
    row = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % rows
    ours = read_raw_rows(output, replace(tensor, shape=(rows, length)), row, row + 1)
    if tensor.dtype in _READABLE:
        other = theirs[name][_place(row, leading)].tobytes()
    else:
        other = output.read(tensor.file, begin + row * len(ours), len(ours))
    if other != ours:
        where = tensor.file
        raise MergeError(
            f"{name}: the safetensors library reads other values than loraformat in row {row}", where=where
        )


def _place(row: int, leading: Sequence[int]) -> tuple[slice, ...]:
    """Where row `row` of the tensor seen as a matrix stands along its leading axes."""
    place = []
    for size in reversed(leading):
        row, index = divmod(row, size)
        place.append(slice(index, index + 1))
    return (*reversed(place), slice(None))
