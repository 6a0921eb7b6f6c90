"""VeRA and PVeRA: two random factors that all modules share, and two trained vectors for each module.

ΔW = (λb ∘ B[:out]) (λd ∘ A[:, :in]). Source: peft 0.21.2, tuners/vera/layer.py `get_delta_weight`; tuners/vera/model.py
`_init_vera_A_vera_B`, `_find_dim`; tuners/pvera/layer.py
`get_delta_weight`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.diagnostics import in_file
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, require
from loraformat.formats.peft.tuners.torch_random import TorchGenerator
from loraformat.model.floats import float64_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _vera(source: Source, module: str, parts: Parts) -> Chains:
    lambda_b, lambda_d = parts.get("vera_lambda_b"), parts.get("vera_lambda_d")
    if lambda_b is None or lambda_d is None:
        return {}
    return _update(source, module, lambda_b, lambda_d, _projections(source, lambda_d.numel))


def _pvera(source: Source, module: str, parts: Parts) -> Chains:
    """The mean: the second halves of λd and A are logarithms of variances, which a merge leaves out as PEFT does."""
    lambda_b, lambda_d = parts.get("pvera_lambda_b"), parts.get("pvera_lambda_d")
    a, b = source.shared.get("pvera_A"), source.shared.get("pvera_B")
    if lambda_b is None or lambda_d is None:
        return {}
    if a is None or b is None:
        raise UnsupportedUpdate("the projections are not in the file", where=in_file(CONFIG, "save_projection"))
    means = lambda_d.rows(0, lambda_d.numel // 2), a.rows(0, a.shape[0] // 2)
    return _update(source, module, lambda_b, means[0], (means[1], b))


def _update(
    source: Source, module: str, lambda_b: LazyTensor, lambda_d: LazyTensor, projections: tuple[LazyTensor, LazyTensor]
) -> Chains:
    out, into = source.shape(module, out=lambda_b.numel)
    rank, (a, b) = lambda_d.numel, projections
    fits = a.shape[0] == b.shape[1] == rank and a.shape[1] >= into and b.shape[0] >= out
    require(fits, module, f"projections of {a.shape} and {b.shape} do not fit {out} x {into} at rank {rank}")
    up = computed((out, rank), lambda: float64_of(lambda_b)[:, None] * float64_of(b)[:out])
    down = computed((rank, into), lambda: float64_of(lambda_d)[:, None] * float64_of(a)[:, :into])
    return {f"{module}.weight": (LowRank(up, down, 1.0),)}


def _projections(source: Source, rank: int) -> tuple[LazyTensor, LazyTensor]:
    """(A, B): from the file, or made from the seed as PEFT makes them, as large as the largest module asks."""
    a, b = source.shared.get("vera_A"), source.shared.get("vera_B")
    if a is not None and b is not None:
        return a, b
    sizes = [
        source.shape(module, out=parts["vera_lambda_b"].numel)
        for module, parts in source.layers.items()
        if "vera_lambda_b" in parts
    ]
    out, into = max(size[0] for size in sizes), max(size[1] for size in sizes)
    seed = source.integer("projection_prng_key", 0, low=0)
    return (
        computed((rank, into), lambda: _random(seed, rank, out, into)[0]),
        computed((out, rank), lambda: _random(seed, rank, out, into)[1]),
    )


def _random(seed: int, rank: int, out: int, into: int) -> list[NDArray[np.float32]]:
    """A, (rank, in), and B, (out, rank): Kaiming's uniform distribution for rectifiers; A is drawn before B."""
    generator = TorchGenerator(seed)
    return [
        generator.uniform(shape, math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1])))
        for shape in ((rank, into), (out, rank))
    ]


VERA = Tuner(
    parts={"vera_lambda_b": (1,), "vera_lambda_d": (1,)},
    read=_vera,
    settings=("d_initial", "init_weights", "projection_prng_key", "r", "save_projection", "vera_dropout"),
    shared={"vera_A": (2,), "vera_B": (2,)},
)

PVERA = Tuner(
    parts={"pvera_lambda_b": (1,), "pvera_lambda_d": (1,)},
    read=_pvera,
    settings=(
        *("d_initial", "generator_seed", "init_weights", "projection_prng_key", "pvera_dropout", "r"),
        *("sample_at_inference", "save_projection"),
    ),
    shared={"pvera_A": (2,), "pvera_B": (2,)},
)
