"""Which axis of a factor is the rank: decided by shapes, never by guessing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loraformat.errors import ConfigError
from loraformat.formats.dump.spelling import Pair
from loraformat.model.tensors import LazyTensor

PEFT = "A (rank, in), B (out, rank)"
TRANSPOSED = "A (in, rank), B (rank, out)"
SWAPPED = "A (out, rank), B (rank, in)"
SWAPPED_TRANSPOSED = "A (rank, out), B (in, rank)"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a pair.

    Attributes:
        name: one of the four above.
        rank, rows, cols: of the update.
    """

    name: str
    rank: int
    rows: int
    cols: int


def readings(a: Shape, b: Shape) -> list[Reading]:
    """All ways to read two matrices in which they share a rank; names of the factors kept first."""
    (a0, a1), (b0, b1) = a, b
    found = []
    if a0 == b1:
        found += [Reading(PEFT, a0, b0, a1), Reading(SWAPPED_TRANSPOSED, a0, a1, b0)]
    if a1 == b0:
        found += [Reading(TRANSPOSED, a1, b1, a0), Reading(SWAPPED, a1, a0, b1)]
    return sorted(found, key=lambda reading: reading.name in (SWAPPED, SWAPPED_TRANSPOSED))


def solve(pairs: Mapping[str, Pair], rank: int | None, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """How to read each pair.

    Args:
        pairs: complete pairs of matrices by module path.
        rank: stated in the file or by the caller, or None.
        shapes: of the base's weights by module path, as far as they are known.
    Raises: ConfigError (LF103): shapes cannot decide, or no reading fits.
    """
    candidates = {module: _candidates(module, pair, rank, shapes.get(module)) for module, pair in pairs.items()}
    decided = {found[0].name for found in candidates.values() if len(found) == 1}
    solved = {}
    for module, found in candidates.items():
        agreeing = found if len(found) == 1 else [reading for reading in found if decided == {reading.name}]
        if len(agreeing) != 1:
            names = " or ".join(reading.name for reading in found)
            raise ConfigError(
                f"the shapes do not decide between {names}", where=module, hint="give the base with --base"
            )
        solved[module] = agreeing[0].name
    unknown = {name for module, name in solved.items() if module not in shapes}
    if len(unknown) > 1:
        raise ConfigError(
            f"the factors seem to be stored in different ways: {'; '.join(sorted(unknown))}",
            hint="give the base with --base",
        )
    return solved


def _candidates(module: str, pair: Pair, rank: int | None, base: Shape | None) -> list[Reading]:
    assert pair.a is not None
    assert pair.b is not None
    found = readings(pair.a.shape, pair.b.shape)
    if base is not None:
        found = [reading for reading in found if _fits(reading, base)]
    else:
        found = [reading for reading in found if reading.name in (PEFT, TRANSPOSED)]
    if rank is not None:
        found = [reading for reading in found if reading.rank == rank] or found
    if not found:
        against = "" if base is None else f" for a weight {base}"
        message = f"no reading gives a common rank: A {pair.a.shape}, B {pair.b.shape}{against}"
        raise ConfigError(message, where=module)
    least = min(reading.rank for reading in found)
    found = [reading for reading in found if reading.rank == least]
    straight = [reading for reading in found if reading.name in (PEFT, TRANSPOSED)]
    return straight or found


def _fits(reading: Reading, base: Shape) -> bool:
    size = (reading.rows, reading.cols)
    return len(base) > 1 and size in ((base[0], math.prod(base[1:])), base[::-1])


def turned(name: str, a: LazyTensor, b: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """(down (rank, cols), up (rows, rank)) of a pair read as `name`."""
    match name:
        case "A (rank, in), B (out, rank)":
            return a, b
        case "A (in, rank), B (rank, out)":
            return a.T, b.T
        case "A (out, rank), B (rank, in)":
            return b, a
        case _:
            return b.T, a.T
