"""Adapters of few values at scattered places: SHiRA and Supertuning in the weight, FourierFT in its spectrum.

Source: peft 0.21.2, tuners/shira/layer.py `get_delta_weight`; tuners/fourierft/layer.py `get_delta_weight`,
`update_layer`; tuners/supertuning/layer.py `get_delta_weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from loraformat.arithmetic import cos_and_sin
from loraformat.diagnostics import in_file
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, integers, require
from loraformat.formats.peft.tuners.torch_random import TorchGenerator
from loraformat.model.floats import float64_of
from loraformat.model.tensors import DType, LazyTensor, rounded
from loraformat.model.updates import Dense, LowRank

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats
    from loraformat.model.tensors import Values

    Places = NDArray[np.int64]


def _shira(source: Source, module: str, parts: Parts) -> Chains:
    values, indices = parts.get("shira_weight"), parts.get("shira_indices")
    if values is None or indices is None:
        return {}
    fits = indices.shape == (2, values.numel)
    require(fits, module, f"shira_indices {indices.shape} does not fit shira_weight {values.shape}")
    # A mask is made of the weight as it is stored: PEFT has no SHiRA for transposed layers.
    shape = source.shape(module)
    difference = scattered(module, values, lambda: integers(indices), shape)
    return {f"{module}.weight": (Dense(difference),)}


def scattered(module: str, values: LazyTensor, where: Callable[[], Places], shape: tuple[int, int]) -> LazyTensor:
    """(out, in), zero but for `values` at the places (2, n) that `where` gives; those of one place add up, in order."""

    def rows(start: int, stop: int) -> Values:
        import numpy as np

        places = where()
        is_inside = bool((places >= 0).all()) and bool((places < np.array(shape)[:, None]).all())
        require(is_inside, module, _OUTSIDE)
        here = (places[0] >= start) & (places[0] < stop)
        flat = (places[0, here] - start) * shape[1] + places[1, here]
        filled, owners = np.unique(flat, return_inverse=True)
        totals = np.zeros(len(filled))
        with np.errstate(invalid="ignore"):
            np.add.at(totals, owners, float64_of(values)[here])
        block = np.zeros((stop - start) * shape[1], np.float32)
        block[filled] = rounded(totals, DType.F32)
        return block.reshape(stop - start, shape[1])

    return LazyTensor(shape, DType.F32, rows)


_OUTSIDE = "indices lie outside the base weight"

SHIRA = Tuner(
    parts={"shira_weight": (1,), "shira_indices": (2,)},
    read=_shira,
    settings=("init_weights", "mask_type", "r", "random_seed"),
)


def _super(source: Source, module: str, parts: Parts) -> Chains:
    values, indices = parts.get("supertuning_values"), parts.get("supertuning_indices")
    if values is None:
        return {}
    if indices is None:
        # They are those of the largest weights of the base.
        raise UnsupportedUpdate("the indices are not in the file", where=in_file(CONFIG, "save_precomputed_indices"))
    require(indices.shape == values.shape, module, f"indices {indices.shape} do not fit values {values.shape}")
    shape = source.shape(module)
    difference = scattered(module, values, lambda: _rows_and_columns(indices, shape[1]), shape)
    a, b = parts.get("supertuning_lora_A.weight"), parts.get("supertuning_lora_B.weight")
    if source.raw.get("r") is None:
        return {f"{module}.weight": (Dense(difference),)}
    if a is None or b is None:
        return {}
    scale = source.number("lora_alpha", 1) / a.shape[0]
    return {f"{module}.weight": (LowRank(b, a, scale), Dense(difference))}


def _rows_and_columns(indices: LazyTensor, columns: int) -> Places:
    import numpy as np

    places = integers(indices)
    return np.stack([places // columns, places % columns])


SUPERTUNING = Tuner(
    parts={
        "supertuning_values": (1,),
        "supertuning_indices": (1,),
        "supertuning_lora_A.weight": (2,),
        "supertuning_lora_B.weight": (2,),
    },
    read=_super,
    settings=(
        *("init_weights", "lora_alpha", "lora_dropout", "r", "save_precomputed_indices", "select_top", "sparsity"),
    ),
)


def _fourier(source: Source, module: str, parts: Parts) -> Chains:
    """The real part of the inverse transform of n values, as a product of rank 2n.

    cos(a + b) = cos a cos b - sin a sin b.
    """
    spectrum = parts.get("fourierft_spectrum")
    if spectrum is None:
        return {}
    out, into = source.shape(module)
    count, seed = spectrum.numel, source.integer("random_loc_seed", 777, low=0)
    require(count <= out * into, module, f"{count} frequencies do not fit {out} x {into}")

    def up() -> Floats:
        import numpy as np

        cos, sin = _waves(places_of(seed, count, out, into)[0], out)
        return np.asarray(np.concatenate([cos, -sin]).T)

    def down() -> Floats:
        import numpy as np

        (cos, sin), values = _waves(places_of(seed, count, out, into)[1], into), float64_of(spectrum)[:, None]
        return np.concatenate([cos * values, sin * values])

    scale = source.number("scaling", 150) / (out * into)
    factors = computed((out, 2 * count), up), computed((2 * count, into), down)
    return {f"{module}.weight": (LowRank(*factors, scale),)}


def places_of(seed: int, count: int, out: int, into: int) -> Places:
    """(2, count): rows and columns of the trained values, the first of a seeded permutation of all places."""
    import numpy as np

    places = TorchGenerator(seed).permutation_start(out * into, count)
    return np.stack([places // into, places % into])


def _waves(frequencies: NDArray[np.int64], length: int) -> tuple[Floats, Floats]:
    """Cosines and sines of 2π f p / length, (count, length), of which there are no more values than p has."""
    import numpy as np

    points = np.arange(length)
    cos, sin = cos_and_sin(points.astype(np.float64) * (2 * math.pi / length))
    numbers = frequencies[:, None] * points % length
    return cos[numbers], sin[numbers]


FOURIERFT = Tuner(
    parts={"fourierft_spectrum": (1,)},
    read=_fourier,
    settings=("init_weights", "n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"),
)
