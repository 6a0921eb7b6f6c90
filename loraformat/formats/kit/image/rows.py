"""Selecting rows of an update, swapping its halves, stacking updates: splitting and fusing modules.

All of it is exact unless noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.errors import UnsupportedUpdate
from loraformat.formats.kit.blocks import block_columns, stacked
from loraformat.formats.kit.normalize import multiplied
from loraformat.model.floats import float64_of
from loraformat.model.tensors import DType, LazyTensor, rounded
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Magnitude, Replace, Update, kind_of

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

Span = tuple[int, int]


def rows_of(update: Update) -> int:
    """How many rows an update has; 0 where a damaged file leaves none."""
    shape = update.shape if isinstance(update, (LowRank, Hadamard, Kronecker, Dense, Replace)) else ()
    return shape[0] if shape else 0


def inputs_of(update: Update) -> int | None:
    """How many inputs its module has; None for a vector."""
    shape = update.shape if isinstance(update, (LowRank, Hadamard, Kronecker, Dense, Replace)) else ()
    return shape[1] if len(shape) > 1 else None


def select(update: Update, spans: Sequence[Span]) -> Update:
    """The rows of all spans, one span after the other.

    Raises: UnsupportedUpdate (LF013): rows cannot be taken from such an update.
    """
    whole = (0, rows_of(update))
    if list(spans) == [whole]:
        return update
    if isinstance(update, LowRank):
        magnitude = update.magnitude
        if magnitude is not None and magnitude.axis == 1:
            magnitude = Magnitude(_selected(magnitude.vector, spans), 1)
        elif magnitude is not None and sorted(spans) != _covering(spans, whole[1]):
            raise UnsupportedUpdate(
                "a DoRA magnitude for each input of a fused module cannot be split: its norms run over all rows",
                hint="pass a base in which the module is not split",
            )
        return replace(update, up=_selected(update.up, spans), magnitude=magnitude)
    if isinstance(update, Hadamard):
        return replace(update, up1=_selected(update.up1, spans), up2=_selected(update.up2, spans))
    if isinstance(update, Kronecker):
        return _selected_kronecker(update, spans)
    if isinstance(update, Dense):
        return replace(update, delta=_selected(update.delta, spans))
    if isinstance(update, Replace):
        return replace(update, value=_selected(update.value, spans))
    raise UnsupportedUpdate(f"{kind_of(update).noun} of a fused module")


def _covering(spans: Sequence[Span], rows: int) -> list[Span]:
    """The same spans where they cover all rows once; else nothing."""
    ordered = sorted(spans)
    ends = [0, *(stop for _, stop in ordered)]
    is_whole = [start for start, _ in ordered] == ends[:-1] and ends[-1] == rows
    return ordered if is_whole else []


def exchange_halves(update: Update) -> Update:
    """The second half of the rows before the first."""
    rows = rows_of(update)
    return select(update, [(rows // 2, rows), (0, rows // 2)])


def _selected(tensor: LazyTensor, spans: Sequence[Span]) -> LazyTensor:
    parts = [tensor.rows(start, stop) for start, stop in spans]
    return stacked(parts)


def _selected_kronecker(update: Kronecker, spans: Sequence[Span]) -> Update:
    """Whole rows of blocks keep their factors; others become a matrix."""
    height = update.right[0].shape[0]
    if height and all(start % height == stop % height == 0 for start, stop in spans):
        blocks = [(start // height, stop // height) for start, stop in spans]
        return replace(update, left=(_selected(update.left[0], blocks), *update.left[1:]))
    dense = dense_of(update)
    return replace(dense, delta=_selected(dense.delta, spans))


def dense_of(update: Update) -> Dense:
    """The update as a matrix (rows, cols), its scale kept; computed in float64 when loaded, rounded once to float32.

    Raises: UnsupportedUpdate (LF013): it depends on the base.
    """
    if isinstance(update, Dense):
        return update
    if not isinstance(update, (LowRank, Hadamard, Kronecker)) or getattr(update, "magnitude", None) is not None:
        raise UnsupportedUpdate(f"{kind_of(update).noun} as a matrix")
    shape = update.shape

    def read(start: int, stop: int) -> Values:
        import numpy as np

        whole: Values = _product(update).reshape(shape)
        return np.ascontiguousarray(rounded(whole[start:stop], DType.F32))

    return Dense(LazyTensor(shape, DType.F32, read), update.scale)


def _product(update: Update) -> Values:
    import numpy as np

    from loraformat.arithmetic import multiply

    if isinstance(update, Kronecker):
        sides = [
            float64_of(side[0]) if len(side) == 1 else multiply(*map(float64_of, side))
            for side in (update.left, update.right)
        ]
        found: Values = np.kron(*sides)
        return found
    assert isinstance(update, (LowRank, Hadamard))
    made = [multiply(float64_of(up), float64_of(down)) for up, down in update.products]
    return made[0] if len(made) == 1 else np.asarray(made[0] * made[1])


def stack(parts: Sequence[tuple[Update | None, int]]) -> Update:
    """One update of the rows of all parts, one below the other.

    Args:
        parts: an update, or None for rows that nothing is added to, and how many rows it has.

    Low-rank parts become one low-rank update whose rank is the sum of theirs, each in its own block of `up`; parts that
    share `down`, which a fused module was split into, get their rank back. LoHa likewise. Other parts, and mixtures,
    become a matrix.

    Raises: UnsupportedUpdate (LF013): DoRA in some parts, or magnitudes for each input.
    """
    there = [update for update, _ in parts if update is not None]
    if all(isinstance(update, LowRank) for update in there):
        return _stacked_low_rank(parts)
    if all(isinstance(update, Hadamard) for update in there):
        return _stacked_hadamard(parts)
    if all(isinstance(update, Replace) for update in there) and len(there) == len(parts):
        return Replace(stacked(_one_dtype([update.value for update in there if isinstance(update, Replace)])))
    return _stacked_dense(parts)


def _scale_of(updates: Sequence[LowRank] | Sequence[Hadamard]) -> float | None:
    scales = {update.scale for update in updates}
    return next(iter(scales)) if len(scales) == 1 else 1.0


def _stacked_low_rank(parts: Sequence[tuple[Update | None, int]]) -> LowRank:
    updates = [(update, rows) for update, rows in parts if isinstance(update, LowRank)]
    magnitude = _stacked_magnitude(parts)
    first = updates[0][0]
    is_shared = len(updates) == len(parts) and all(
        each.down is first.down and each.scale == first.scale for each, _ in updates
    )
    if is_shared:
        return replace(first, up=stacked([each.up for each, _ in updates]), magnitude=magnitude)
    scale = _scale_of([each for each, _ in updates])
    ups = _one_dtype([multiplied(each.up, _factor(each.scale, scale)) for each, _ in updates])
    downs = _one_dtype([each.down for each, _ in updates])
    return replace(
        first,
        up=block_columns(list(zip(ups, _runs(parts), strict=True)), sum(rows for _, rows in parts)),
        down=stacked(downs),
        scale=scale,
        magnitude=magnitude,
    )


def _factor(own: float | None, common: float | None) -> float:
    return 1.0 if own is None or own == common else own / (common or 1.0)


def _runs(parts: Sequence[tuple[Update | None, int]]) -> list[list[Span]]:
    """Where the rows of each update stand."""
    found, start = [], 0
    for update, rows in parts:
        if update is not None:
            found.append([(start, start + rows)])
        start += rows
    return found


def _stacked_magnitude(parts: Sequence[tuple[Update | None, int]]) -> Magnitude | None:
    magnitudes = [update.magnitude if isinstance(update, LowRank) else None for update, _ in parts]
    if all(each is None for each in magnitudes):
        return None
    vectors = [each.vector for each in magnitudes if each is not None and each.axis == 1]
    if len(vectors) < len(parts):
        raise UnsupportedUpdate("DoRA of a part of a fused module: the norms of the other rows are those of the base")
    return Magnitude(stacked(_one_dtype([vector.reshape(vector.numel) for vector in vectors])), 1)


def _stacked_hadamard(parts: Sequence[tuple[Update | None, int]]) -> Hadamard:
    updates = [update for update, _ in parts if isinstance(update, Hadamard)]
    scale, rows = _scale_of(updates), sum(count for _, count in parts)
    firsts = _one_dtype([multiplied(each.up1, _factor(each.scale, scale)) for each in updates])
    seconds = _one_dtype([each.up2 for each in updates])
    return Hadamard(
        block_columns(list(zip(firsts, _runs(parts), strict=True)), rows),
        stacked(_one_dtype([each.down1 for each in updates])),
        block_columns(list(zip(seconds, _runs(parts), strict=True)), rows),
        stacked(_one_dtype([each.down2 for each in updates])),
        scale,
    )


def _stacked_dense(parts: Sequence[tuple[Update | None, int]]) -> Dense:
    found = [None if update is None else dense_of(update) for update, _ in parts]
    width = next(each.shape[1:] for each in found if each is not None)
    dtype = next((each.delta.dtype for each in found if each is not None), DType.F32)
    if len({(each.delta.dtype, each.scale) for each in found if each is not None}) > 1:
        dtype = DType.F64
    rows = [count for _, count in parts]
    scales = {each.scale for each in found if each is not None}
    scale = next(iter(scales)) if len(scales) == 1 else 1.0

    def read(start: int, stop: int) -> Values:
        import numpy as np

        blocks = [
            np.zeros((count, *width), dtype.numpy)
            if each is None
            else (each.delta.load() * _factor(each.scale, scale)).astype(dtype.numpy).reshape(count, *width)
            for each, count in zip(found, rows, strict=True)
        ]
        return np.concatenate(blocks)[start:stop]

    return Dense(LazyTensor((sum(rows), *width), dtype, read), scale)


def _one_dtype(tensors: Sequence[LazyTensor]) -> list[LazyTensor]:
    """The tensors in one dtype that holds the values of all."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return list(tensors)
    return [tensor.to(DType.F64 if DType.F64 in dtypes else DType.F32) for tensor in tensors]
