"""Adapters that rotate: OFT, BOFT, HRA and RoAd.

Source: peft 0.21.2, tuners/oft/layer.py `OFTRotationModule.get_weight`; tuners/boft/layer.py `get_delta_weight`,
`block_butterfly_perm`; tuners/hra/layer.py `get_delta_weight`; tuners/road/layer.py `_prepare_cols`, `_apply_road`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from loraformat.arithmetic import cos_and_sin, fold, multiply, row_squares, solved
from loraformat.diagnostics import in_file
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, require
from loraformat.model.floats import float64_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Multiplied, Rotated, Scaled

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


# As many as are computed; a series that needs more does not converge.
_MOST_TERMS = 100


def _oft(source: Source, module: str, parts: Parts) -> Chains:
    linear, table = parts.get("oft_R.weight"), parts.get("oft_embedding_R.weight")
    stored = linear if linear is not None else table
    if stored is None:
        return {}
    if "oft_block_size" not in source.raw:
        raise UnsupportedUpdate(
            "OFT as written by PEFT before 0.14 is not supported", where=in_file(CONFIG, "oft_block_size")
        )
    count, size = stored.shape[0], (1 + math.isqrt(1 + 8 * stored.shape[1])) // 2
    require(
        size * (size - 1) // 2 == stored.shape[1], module, f"oft_R {stored.shape} does not hold triangles of a matrix"
    )
    is_shared = source.flag("block_share")
    require(
        count == 1 or not is_shared,
        module,
        f"oft_R {stored.shape} holds {count} blocks, but block_share needs exactly one",
    )
    terms = (
        source.integer("num_cayley_neumann_terms", 5, high=_MOST_TERMS)
        if source.flag("use_cayley_neumann", default=True)
        else None
    )
    is_old = _is_old_series(source)
    eps = source.number("eps", 6e-5) if source.flag("coft") else None

    def value() -> Floats:
        skew = _skew(stored, size, eps)
        blocks = _cayley_neumann(skew, terms, is_old=is_old) if terms else _cayley(skew)
        # PEFT multiplies the inputs of a layer by R, so W by Rᵀ, and the rows of a table by R.
        return blocks.transpose(0, 2, 1) if stored is linear else blocks

    blocks = computed((count, size, size), value)
    return {f"{module}.weight": (Rotated(blocks, "right", is_shared=is_shared),)}


def _is_old_series(source: Source) -> bool:
    """Whether the Cayley-Neumann series counts its last power twice, as PEFT did before 0.18.

    The version stands in the config since then. Source: peft 0.17.1, tuners/oft/layer.py `_cayley_batch`; 0.21.2,
    tuners/oft/config.py `check_kwargs`, which refuses such adapters.
    """
    if source.raw.get("use_cayley_neumann") is None:
        return False
    numbers = source.text("peft_version", "0").split(".")[:2]
    return not all(part.isdigit() for part in numbers) or [int(part) for part in numbers] < [0, 18]


def _skew(stored: LazyTensor, size: int, eps: float | None) -> Floats:
    """The skew-symmetric blocks, (count, size, size), of their upper triangles, kept short with `eps` (COFT)."""
    import numpy as np

    values = float64_of(stored)
    blocks = np.zeros((len(values), size, size))
    rows, cols = np.triu_indices(size, 1)
    blocks[:, rows, cols] = values
    blocks = np.asarray(blocks - blocks.transpose(0, 2, 1))
    if eps is None:
        return blocks
    norms = np.sqrt(2 * row_squares(values))[:, None, None]
    factors = np.minimum(eps / math.sqrt(len(values)) / norms, 1)
    return np.asarray(blocks * np.where(np.isnan(factors), 1.0, factors))


def _cayley(skew: Floats) -> Floats:
    """(I - S) (I + S)⁻¹ of each block; its factors commute."""
    import numpy as np

    unit = np.eye(skew.shape[-1])
    return solved(unit + skew, unit - skew)


def _cayley_neumann(skew: Floats, terms: int, *, is_old: bool) -> Floats:
    """PEFT's short form of `_cayley`: I + 2S + 2S² + … + Sⁿ with n = terms - 1 (3 for 3 terms), the last power once.

    Before 0.18 the last power counted twice, and 3 terms were 3.
    """
    import numpy as np

    total = np.eye(skew.shape[-1]) + np.zeros_like(skew)
    is_short = is_old or terms <= 2
    last, power = terms - 1 if is_short else max(terms - 1, 3), skew
    for exponent in range(1, last + 1):
        total = total + (1 if exponent == last and not is_short else 2) * power
        power = multiply(power, skew)
    return total


OFT = Tuner(
    parts={"oft_R.weight": (2,), "oft_embedding_R.weight": (2,)},
    read=_oft,
    settings=(
        *("block_share", "coft", "eps", "init_weights", "module_dropout", "num_cayley_neumann_terms", "oft_block_size"),
        *("r", "use_cayley_neumann"),
    ),
)


def _boft(_source: Source, module: str, parts: Parts) -> Chains:
    stored, factors = parts.get("boft_R"), parts.get("boft_s")
    if stored is None or factors is None:
        return {}
    levels, count, size, width = stored.shape
    require(size == width, module, f"boft_R {stored.shape} does not hold square blocks")
    has_butterflies = levels == 1 or (size % 2 == 0 and count % 2 ** (levels - 1) == 0)
    require(has_butterflies, module, f"boft_R {stored.shape} does not fit a butterfly of {levels} levels")
    rotations = []
    for level in range(levels):
        blocks = computed((count, size, size), _butterfly_blocks(stored, level))
        order = None if levels == 1 else _butterfly_order(count, size, level)
        rotations.append(Rotated(blocks, "right", order=order))
    return {f"{module}.weight": (*rotations, Scaled(factors.reshape(factors.numel)))}


def _butterfly_blocks(stored: LazyTensor, level: int) -> Callable[[], Floats]:
    def value() -> Floats:
        import numpy as np

        values = float64_of(stored)[level]
        return np.asarray(_cayley((values - values.transpose(0, 2, 1)) / 2).transpose(0, 2, 1))

    return value


def _butterfly_order(count: int, size: int, level: int) -> tuple[int, ...]:
    """Which column is taken at each place: in runs of half a block, the even runs of a stretch go before the odd ones.

    A stretch is 2^level blocks long.
    """
    run, columns = size // 2, count * size
    stretch = columns // (count // 2**level)
    runs = stretch // run
    sorted_runs = [*range(0, runs, 2), *range(1, runs, 2)]
    places = [
        start + number * run + offset
        for start in range(0, columns, stretch)
        for number in sorted_runs
        for offset in range(run)
    ]
    order = [0] * columns
    for column, taken in enumerate(places):
        order[taken] = column
    return tuple(order)


BOFT = Tuner(
    parts={"boft_R": (4,), "boft_s": (2,)},
    read=_boft,
    settings=("boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor", "init_weights"),
)


def _hra(source: Source, module: str, parts: Parts) -> Chains:
    vectors = parts.get("hra_u")
    if vectors is None:
        return {}
    length, rank = vectors.shape
    is_orthogonal = source.flag("apply_GS")
    up = computed((length, rank), lambda: _reflections(float64_of(vectors), is_orthogonal)[0])
    down = computed((rank, length), lambda: _reflections(float64_of(vectors), is_orthogonal)[1])
    return {f"{module}.weight": (Multiplied(up, down),)}


def _reflections(vectors: Floats, is_orthogonal: bool) -> tuple[Floats, Floats]:
    """(up, down) with I + up @ down = Π (I - 2 u uᵀ), first vector first; vectors: (in, rank)."""
    import numpy as np

    ups, units = np.zeros_like(vectors), np.zeros_like(vectors.T)
    for number, column in enumerate(vectors.T):
        vector = column
        for other in units[:number] if is_orthogonal else ():
            vector = vector - fold(other * vector, 0) * other
        vector = vector / np.sqrt(fold(vector * vector, 0))
        before = fold(units[:number] * vector, 1)
        ups[:, number] = -2 * (vector + fold(ups[:, :number] * before, 1))
        units[number] = vector
    return ups, units


HRA = Tuner(parts={"hra_u": (2,)}, read=_hra, settings=("apply_GS", "init_weights", "r"))

# How many values RoAd trains for an output.
_ROAD_VALUES = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def _road(source: Source, module: str, parts: Parts) -> Chains:
    theta, alpha = parts.get("road_theta"), parts.get("road_alpha")
    if theta is None or alpha is None:
        return {}
    variant, group = source.text("variant", "road_1"), source.integer("group_size", 64)
    if variant not in _ROAD_VALUES:
        raise UnsupportedUpdate(f"RoAd variant {variant} is not supported", where=in_file(CONFIG, "variant"))
    out = round(theta.numel / _ROAD_VALUES[variant])
    fits = theta.numel == alpha.numel and out % group == 0 and group % 2 == 0
    require(fits, module, f"road_theta {theta.shape} and road_alpha {alpha.shape} do not form groups of {group}")
    blocks = computed((out // group, group, group), lambda: _road_blocks(variant, group, theta, alpha))
    weight = Rotated(blocks, "left")
    return {f"{module}.weight": (weight,), f"{module}.bias": (Rotated(blocks, "left", is_bias=True),)}


def _road_blocks(variant: str, group: int, theta: LazyTensor, alpha: LazyTensor) -> Floats:
    """Each output x of a group turns with its partner half a group on: (x cos - y sin, y cos + x sin) times alpha."""
    import numpy as np

    half = group // 2
    angles, lengths = float64_of(theta), float64_of(alpha)
    if variant == "road_4":
        angles, lengths = angles.reshape(-1, 2, 2, half), lengths.reshape(-1, 2, 2, half)
        cosines, sines = lengths[:, 0] * cos_and_sin(angles[:, 0])[0], lengths[:, 1] * cos_and_sin(angles[:, 1])[1]
    else:
        shape = (-1, 1 if variant == "road_1" else 2, half)
        angles, lengths = angles.reshape(shape), lengths.reshape(shape)
        cos, sin = cos_and_sin(angles)
        cosines, sines = (np.broadcast_to(lengths * each, (len(lengths), 2, half)) for each in (cos, sin))
    blocks = np.zeros((len(cosines), 2, half, 2, half))
    places = np.arange(half)
    blocks[:, 0, places, 0, places] = cosines[:, 0]
    blocks[:, 1, places, 1, places] = cosines[:, 1]
    blocks[:, 0, places, 1, places] = -sines[:, 0]
    blocks[:, 1, places, 0, places] = sines[:, 1]
    return blocks.reshape(-1, group, group)


ROAD = Tuner(
    parts={"road_theta": (1,), "road_alpha": (1,)},
    read=_road,
    settings=("group_size", "init_weights", "variant"),
)
