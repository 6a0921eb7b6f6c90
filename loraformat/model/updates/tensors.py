"""Updates with other tensors in the place of theirs: another dtype, say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from typing_extensions import assert_never

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base_dependent import Carried, OfBase, Projected, Recoded, Tiled
from loraformat.model.updates.kinds import (
    Diff,
    Factor,
    FromBase,
    Hadamard,
    Kronecker,
    LowRank,
    Modulated,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    Update,
)


def with_tensors(update: Update, change: Callable[[LazyTensor], LazyTensor]) -> Update:
    """The update with each of its tensors changed; what it means besides stays."""
    match update:
        case LowRank():
            magnitude = update.magnitude
            vector = None if magnitude is None else replace(magnitude, vector=change(magnitude.vector))
            return replace(update, up=change(update.up), down=change(update.down), magnitude=vector)
        case Hadamard():
            first, second = (change(update.up1), change(update.down1)), (change(update.up2), change(update.down2))
            return Hadamard(*first, *second, update.scale)
        case Kronecker():
            return replace(update, left=tuple(map(change, update.left)), right=tuple(map(change, update.right)))
        case Diff():
            return replace(update, difference=change(update.difference))
        case Replace():
            return replace(update, value=change(update.value))
        case Rows():
            return replace(update, values=change(update.values))
        case FromBase():
            return update
        case Scaled() | Rotated() | Multiplied() | Modulated():
            return _factor_with_tensors(update, change)
        case Tiled() | Projected() | Recoded() | Carried():
            return _of_base_with_tensors(update, change)
        case _:
            assert_never(update)


def _factor_with_tensors(update: Factor, change: Callable[[LazyTensor], LazyTensor]) -> Update:
    if isinstance(update, Scaled):
        rows, cols = (None if vector is None else change(vector) for vector in (update.rows, update.cols))
        return replace(update, rows=rows, cols=cols)
    if isinstance(update, Rotated):
        return replace(update, blocks=change(update.blocks))
    return replace(update, up=change(update.up), down=change(update.down))


def _of_base_with_tensors(update: OfBase, change: Callable[[LazyTensor], LazyTensor]) -> Update:
    if isinstance(update, Tiled):
        return replace(update, blocks=change(update.blocks))
    if isinstance(update, Recoded):
        return replace(update, basis=change(update.basis), core=change(update.core))
    if isinstance(update, Carried):
        return replace(update, vector=change(update.vector))
    encoders, decoders = (tuple(map(change, factors)) for factors in (update.encoders, update.decoders))
    return replace(update, up=change(update.up), down=change(update.down), encoders=encoders, decoders=decoders)
