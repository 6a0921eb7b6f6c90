"""Rows of a written tensor compared with what they must be, computed again in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.containers import read_rows
from loraformat.errors import MergeError
from loraformat.merger.apply import apply, blocks_of
from loraformat.merger.compute import Steps, compute_dtype
from loraformat.merger.copies import Inputs, as_matrix
from loraformat.merger.plan import Edit
from loraformat.merger.rounding import round_nearest
from loraformat.merger.windows import read_window
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType
from loraformat.storage.base import Store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROWS_AT_ONCE = 8


def compare_rows(
    edit: Edit,
    steps: Steps,
    inputs: Inputs,
    output: Store,
    stored: StoredTensor,
    rows: tuple[int, int],
    accumulate: str,
) -> None:
    """Compare rows of an edited tensor: equal to the exact value rounded, or else as near as the arithmetic allows.

    Args:
        steps: of the edit, in float64.
        rows: (start, stop), whole units of the edit.
        accumulate: as in Arithmetic.

    Raises: MergeError (LF801): a value is farther away.
    """
    import torch

    start, stop = rows
    exact = read_window(inputs, edit, start, stop, torch.float64)
    apply(exact, start, *steps.get())
    found = read_rows(output, as_matrix(stored, edit.row_axes), start, stop).reshape(exact.shape)
    rounded = torch.empty_like(found)
    round_nearest(rounded, exact)
    if torch.equal(_bits(rounded), _bits(found)):
        return
    base = read_window(inputs, edit, start, stop, torch.float64)
    accumulated = compute_dtype(edit, inputs, accumulate)
    for low, high in blocks_of(0, stop - start, _ROWS_AT_ONCE):
        near = slice(low, high)
        wide = found[near].to(torch.float64)
        room = _room(base[near], exact[near], wide, DType[edit.dtype].torch, accumulated)
        bad = (((wide - exact[near]).abs() > room) | ~wide.isfinite() & base[near].isfinite()).nonzero()
        if len(bad):
            row, column = (int(number) for number in bad[0])
            raise MergeError(
                f"{edit.tensor}: row {start + low + row}, column {column} is {float(wide[row, column])!r} in the file, "
                f"computed again it is {float(exact[low + row, column])!r}",
                where=stored.file,
                hint="the disk or the memory of this machine may be faulty",
            )


def _bits(values: Tensor) -> Tensor:
    """All bytes of a tensor: unlike its values they are equal where they are NaN."""
    import torch

    return values.contiguous().reshape(-1).view(torch.uint8)


def _room(base: Tensor, exact: Tensor, found: Tensor, dtype: torch.dtype, accumulated: torch.dtype) -> Tensor:
    """How far a value may be from the exact one: a unit in the last place, and what the sums before lose."""
    import torch

    info = torch.finfo(dtype)
    _, exponent = torch.frexp(torch.maximum(exact.abs(), found.abs()).clamp(min=info.smallest_normal))
    unit = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    # Products of a few hundred terms, against the largest value of their row.
    lost = 2.0**-16 if accumulated == torch.float32 else 2.0**-44
    largest = (base.abs() + (exact - base).abs()).nan_to_num(0.0, 0.0, 0.0)
    return unit + lost * largest.amax(dim=1, keepdim=True) if exact.numel() else unit
