"""Adapters of few values at scattered places: SHiRA in the weight, FourierFT in its spectrum.

Source: peft 0.21.2, tuners/shira/layer.py `get_delta_weight`; tuners/fourierft/layer.py `get_delta_weight`,
`update_layer`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, double, require
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import Diff, LowRank

if TYPE_CHECKING:
    from torch import Tensor


def _shira(source: Source, module: str, parts: Parts) -> Chains:
    values, indices = parts.get("shira_weight"), parts.get("shira_indices")
    if values is None or indices is None:
        return {}
    fits = indices.shape == (2, values.numel)
    require(fits, module, f"shira_indices {indices.shape} does not fit shira_weight {values.shape}")
    # A mask is made of the weight as it is stored: PEFT has no SHiRA for transposed layers.
    shape = source.shape(module)

    def rows(start: int, stop: int) -> Tensor:
        places = indices.load().to(DType.I64.torch)
        require(
            bool((places >= 0).all()) and bool((places < places.new_tensor(shape)[:, None]).all()), module, _OUTSIDE
        )
        here = (places[0] >= start) & (places[0] < stop)
        block = values.load().to(DType.F32.torch).new_zeros(stop - start, shape[1])
        return block.index_put((places[0, here] - start, places[1, here]), values.load().float()[here], accumulate=True)

    return {f"{module}.weight": (Diff(LazyTensor(shape, DType.F32, rows)),)}


_OUTSIDE = "shira_indices lie outside the base weight"

SHIRA = Tuner(
    parts={"shira_weight": (1,), "shira_indices": (2,)},
    read=_shira,
    settings=("init_weights", "mask_type", "r", "random_seed"),
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

    def up() -> Tensor:
        waves = _angles(_places(seed, count, out, into)[0], out)
        return _joined(waves.cos(), -waves.sin()).T

    def down() -> Tensor:
        waves, values = _angles(_places(seed, count, out, into)[1], into), double(spectrum)[:, None]
        return _joined(waves.cos() * values, waves.sin() * values)

    scale = source.number("scaling", 150) / (out * into)
    factors = computed((out, 2 * count), up), computed((2 * count, into), down)
    return {f"{module}.weight": (LowRank(*factors, scale),)}


def _places(seed: int, count: int, out: int, into: int) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the trained values: the first of a seeded permutation of all places."""
    import torch

    places = torch.randperm(out * into, generator=torch.Generator().manual_seed(seed))[:count]
    return places // into, places % into


def _angles(frequencies: Tensor, length: int) -> Tensor:
    """(count, length): 2π f p / length, reduced modulo one turn while it is an integer."""
    import torch

    return (frequencies[:, None] * torch.arange(length) % length).to(torch.float64) * (2 * math.pi / length)


def _joined(one: Tensor, other: Tensor) -> Tensor:
    import torch

    return torch.cat([one, other])


FOURIERFT = Tuner(
    parts={"fourierft_spectrum": (1,)},
    read=_fourier,
    settings=("init_weights", "n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"),
)
