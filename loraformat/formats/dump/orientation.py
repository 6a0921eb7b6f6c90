"""Which axis of a factor is the rank: decided by shapes, never by guessing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from loraformat.diagnostics import in_weights
from loraformat.errors import ConfigError
from loraformat.formats.kit.pairs.spelling import Pair
from loraformat.matching import is_embedding
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


def solve(
    pairs: Mapping[str, Pair], rank: int | None, shapes: Mapping[str, Shape], *, transposed: Collection[str] = ()
) -> dict[str, str]:
    """How to read each pair.

    Args:
        pairs: complete pairs of matrices by module path.
        rank: stated in the file or by the caller, or None.
        shapes: of the base's weights by module path, as far as they are known.
        transposed: the modules whose weights the base stores as (in, out).
    Raises: ConfigError (LF103): shapes cannot decide, or no reading fits.
    """
    candidates = {
        module: _candidates(module, pair, rank, _Base(shapes.get(module), module in transposed))
        for module, pair in pairs.items()
    }
    decided = {found[0].name for found in candidates.values() if len(found) == 1}
    solved = {}
    for module, found in candidates.items():
        agreeing = found if len(found) == 1 else [reading for reading in found if decided == {reading.name}]
        if len(agreeing) != 1:
            names = " or ".join(reading.name for reading in found)
            raise ConfigError(f"the shapes fit {names}", where=in_weights(module), hint="pass the base with --base")
        solved[module] = agreeing[0].name
    _check_roles(solved)
    unknown = {name for module, name in solved.items() if module not in shapes}
    if len(unknown) > 1:
        raise ConfigError(
            f"the factors seem to be stored in different ways: {'; '.join(sorted(unknown))}",
            hint="pass the base with --base",
        )
    return solved


def _check_roles(solved: Mapping[str, str]) -> None:
    """Raises: ConfigError (LF103): some linear layers have A on the side of the inputs, others on that of the outputs.

    Shapes decide for each layer alone, but for a square one only the usual roles come into question.
    """
    linear = {module: name in (SWAPPED, SWAPPED_TRANSPOSED) for module, name in solved.items() if not is_table(module)}
    if len(set(linear.values())) > 1:
        one, other = (next(module for module, swapped in linear.items() if swapped is side) for side in (True, False))
        raise ConfigError(
            f"{one} must be {solved[one]}, but {other} must be {solved[other]}: A and B change roles",
            where=in_weights(one),
            hint="swap the names of A and B with --map, or rename the pairs that differ",
        )


def is_table(module: str) -> bool:
    """Whether a module has the name of an embedding, whose factors minLoRA and others store with exchanged roles."""
    return is_embedding(f"{module}.weight") or "emb" in module.rpartition(".")[2].lower()


def _candidates(module: str, pair: Pair, rank: int | None, base: _Base) -> list[Reading]:
    assert pair.a is not None
    assert pair.b is not None
    found = base.fitting(readings(pair.a.shape, pair.b.shape))
    if rank is not None:
        found = [reading for reading in found if reading.rank == rank] or found
    if not found:
        against = "" if base.shape is None else f" for a weight {base.shape}"
        message = f"A and B have no common rank in any orientation: A {pair.a.shape}, B {pair.b.shape}{against}"
        raise ConfigError(message, where=in_weights(module))
    least = min(reading.rank for reading in found)
    return [reading for reading in found if reading.rank == least]


@dataclass(frozen=True, slots=True)
class _Base:
    shape: Shape | None
    is_transposed: bool

    def fitting(self, found: list[Reading]) -> list[Reading]:
        """The readings that give the weight's shape, those that keep the roles of A and B before the others.

        Only embeddings swap the roles (minLoRA), so a weight that is known to be stored as (in, out) is tried
        transposed before that.
        """
        straight = [reading for reading in found if reading.name in (PEFT, TRANSPOSED)]
        if self.shape is None:
            return straight
        size = (self.shape[0], math.prod(self.shape[1:])) if self.shape else ()
        direct = [reading for reading in straight if (reading.rows, reading.cols) == size]
        transposed = [reading for reading in straight if (reading.cols, reading.rows) == self.shape]
        swapped = [reading for reading in found if reading not in straight and (reading.rows, reading.cols) == size]
        later = (transposed, swapped) if self.is_transposed else (swapped, transposed)
        return direct or later[0] or later[1]


def transposed(name: str, a: LazyTensor, b: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
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
