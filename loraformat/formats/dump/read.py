"""Dumps, file to Adapter: headers, and values stored next to the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

from loraformat.formats.dump.orientation import SWAPPED, SWAPPED_TRANSPOSED, is_table, solve, transposed
from loraformat.formats.kit import factors
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.formats.kit.pairs.read import Dialect, Layer, base_shape, read_pairs
from loraformat.formats.kit.pairs.spelling import EVERY, Pair
from loraformat.matching import CONV1D
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle
from loraformat.model.updates import LowRank


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a dump. Names are those of the file.

    Raises:
        MissingFile (LF101): not exactly one tensor file.
        ConfigError (LF103): the shapes do not say which axis is the rank; the file states two alphas or ranks.
        FormatError (LF012): two names mean the same tensor.
    """
    return read_pairs(bundle, Dialect(spellings=EVERY, build=_build), hints)


def _build(pairs: Mapping[str, Pair], rank: int | None, hints: Hints) -> dict[str, Layer]:
    matrices = {module: pair for module, pair in pairs.items() if _is_matrix_pair(pair)}
    shapes = {
        module: shape for module, pair in matrices.items() if (shape := base_shape(module, pair, hints)) is not None
    }
    names = solve(matrices, rank, shapes, transposed=[module for module in matrices if _is_transposed(module, hints)])
    layers = {}
    for module, pair in pairs.items():
        a, b = pair.factors
        update = factors.embedding(a, b, None) if pair.is_embedding else factors.linear(a, b, None)
        if module in names:
            down, up = transposed(names[module], a, b)
            is_swapped = names[module] in (SWAPPED, SWAPPED_TRANSPOSED) and is_table(module)
            update = LowRank(up, down, None, None, _kernel(module, down.shape[1], hints), is_embedding=is_swapped)
        layers[module] = Layer(update, update.rank)
    return layers


def _is_transposed(module: str, hints: Hints) -> bool:
    """Whether the base stores the weight as (in, out): the caller says so, or its class has Conv1D layers there."""
    layers = CONV1D.get(str(hints.config.get("model_type")), ())
    return bool(hints.is_transposed(module)) or module.rpartition(".")[2] in layers


def _is_matrix_pair(pair: Pair) -> bool:
    return not pair.is_embedding and [len(factor.shape) for factor in pair.factors] == [2, 2]


def _kernel(module: str, cols: int, hints: Hints) -> tuple[int, ...]:
    """The kernel of a convolution whose factors are matrices; only the base can tell."""
    shape = (hints.weights or {}).get(f"{module}.weight", ())
    return shape[2:] if len(shape) > 2 and math.prod(shape[1:]) == cols else ()
