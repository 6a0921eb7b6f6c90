"""Tensors that two checkpoints both have, compared value by value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from loraformat.containers import CONTAINERS
from loraformat.engine import open_engine
from loraformat.model.checkpoint import BaseWeight, Checkpoint
from loraformat.model.floats import quietly
from loraformat.model.results.differences import MOST_RANK, WeightDifference
from loraformat.model.tensors import has_equal_values, row_blocks

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_BLOCK_NBYTES = 8 << 20
_LONGEST_KERNEL = 16

_Figure = TypeVar("_Figure", int, float)


def tensor_differences(
    first: Checkpoint,
    second: Checkpoint,
    *,
    tolerance: float = 0.0,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[WeightDifference, ...]:
    """A difference for each tensor that both have, sorted by name.

    Tensors are compared in blocks of rows; one that differs is held as a whole, since its rank is that of all rows.

    Raises: StorageError: a read failed. ContainerError: a record of a `.pt` file does not have its checksum.
    """
    for side in (first, second):
        for file in side.files.values():
            CONTAINERS[file.container].check(side.store, file.name)

    def compared(name: str) -> WeightDifference:
        return _difference(name, first.weights[name], second.weights[name], tolerance)

    names = sorted(first.tensors.keys() & second.tensors.keys())
    sizes = [math.prod(first.tensors[name].shape) * first.tensors[name].dtype.itemsize for name in names]
    found, done = [], 0
    results = open_engine(jobs).map(compared, names)
    for nbytes, difference in zip(sizes, results, strict=True):
        found.append(difference)
        done += nbytes
        if progress is not None:
            progress(done, sum(sizes))
    return tuple(found)


def _difference(name: str, one: BaseWeight, other: BaseWeight, tolerance: float) -> WeightDifference:
    bare = WeightDifference(weight=name, status="incomparable", shape=one.shape, shape_after=other.shape)
    is_resized = one.shape != other.shape
    if is_resized and not (one.shape[1:] == other.shape[1:] and len(one.shape) > 1):
        return replace(bare, reason="their shapes differ")
    if not (one.dtype.is_floating and other.dtype.is_floating):
        same = not is_resized and one.dtype == other.dtype and has_equal_values(one, other)
        return replace(bare, status="equal") if same else replace(bare, reason="they differ and are not real numbers")
    sums = _summed(one, other)
    before, after, apart = (math.sqrt(value) for value in (sums.before, sums.after, sums.apart))
    is_close = apart <= tolerance * before and not sums.is_unordered
    status = "resized" if is_resized else "equal" if is_close else "changed"
    found = replace(
        bare,
        status=status,
        norm=before,
        norm_after=after,
        distance=apart,
        relative=apart / before if before else None,
        cosine=sums.inner / (before * after) if before and after else None,
        changed=sums.changed / max(1, sums.numel),
        largest=sums.largest,
    )
    return found if sums.whole is None else _with_ranks(found, sums.whole)


@dataclass(slots=True)
class _Sums:
    before: float = 0.0
    after: float = 0.0
    apart: float = 0.0
    inner: float = 0.0
    changed: int = 0
    numel: int = 0
    largest: float = 0.0
    is_unordered: bool = False
    whole: Values | None = None


@quietly
def _summed(one: BaseWeight, other: BaseWeight) -> _Sums:
    import numpy as np

    sums = _Sums()
    shape = (min(one.shape[0], other.shape[0]), *one.shape[1:]) if one.shape else ()
    for start, stop in row_blocks(shape, one.dtype.itemsize, _BLOCK_NBYTES):
        before, after = (weight.read(start, stop) for weight in (one, other))
        wide = np.float64 if max(one.dtype.itemsize, other.dtype.itemsize) > 4 else np.float32
        before, after = before.astype(wide, copy=False), after.astype(wide, copy=False)
        apart = after - before
        sums.before += _square(before)
        sums.after += _square(after)
        sums.apart += _square(apart)
        sums.inner += float((before * after).sum(dtype=np.float64))
        sums.changed += int((before != after).sum())
        sums.numel += apart.size
        sums.largest = max(sums.largest, float(abs(apart).max()) if apart.size else 0.0)
        sums.is_unordered = sums.is_unordered or not np.isfinite(apart).all()
        if sums.whole is None and apart.ndim > 1 and apart.any():
            # What went before was equal, and what comes stands in place.
            sums.whole = np.zeros(shape, np.float32)
        if sums.whole is not None:
            sums.whole[start:stop] = apart
    if sums.is_unordered:
        sums.whole = None
    return sums


def _square(values: Values) -> float:
    import numpy as np

    return float((values * values).sum(dtype=np.float64))


def _with_ranks(found: WeightDifference, whole: Values) -> WeightDifference:
    """The difference with the ranks of D; of a stack of experts those of every expert that differs, folded."""
    from loraformat.algebra import energy_ranks

    are_experts = _are_matrices(found.weight, whole)
    matrices = [matrix for matrix in whole if matrix.any()] if are_experts else [whole.reshape(len(whole), -1)]
    is_stack = are_experts and whole.shape[0] > 1
    ranks = [energy_ranks(matrix, (0.9, 0.99), most=MOST_RANK) for matrix in matrices]
    effective = _ordered([each for each, _ in ranks])
    rank_90, rank_99 = (_ordered([each[at] for _, each in ranks]) for at in (0, 1))
    middle = len(ranks) // 2
    return replace(
        found,
        effective_rank=effective[middle],
        rank_90=rank_90[middle],
        rank_99=rank_99[middle],
        experts=len(ranks) if is_stack else None,
        rank_90_most=rank_90[-1] if is_stack else None,
        rank_99_most=rank_99[-1] if is_stack else None,
    )


def _are_matrices(name: str, whole: Values) -> bool:
    """Whether a tensor is a row of matrices, one for each expert; the kernel of a convolution is short or says so."""
    return (
        whole.ndim == 3 and "conv" not in name and (not name.endswith(".weight") or whole.shape[-1] > _LONGEST_KERNEL)
    )


def _ordered(figures: Sequence[_Figure | None]) -> list[_Figure | None]:
    """Ascending, None, which is above what was looked for, last."""
    return sorted(figures, key=lambda figure: (figure is None, figure or 0))
