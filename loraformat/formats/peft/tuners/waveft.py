"""WaveFT: a few trained wavelet coefficients; with Haar's wavelet each is a square of four values of the weight.

Source: peft 0.21.2, tuners/waveft/layer.py `get_delta_weight`; tuners/waveft/waverec2d.py `waverec2d`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from loraformat.diagnostics import in_file
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, require
from loraformat.formats.peft.tuners.sparse import places_of, scattered
from loraformat.model.floats import float64_of
from loraformat.model.tensors import DType, LazyTensor, rounded
from loraformat.model.updates import Dense

if TYPE_CHECKING:
    from loraformat.formats.peft.tuners.sparse import Places
    from loraformat.model.floats import Floats
    from loraformat.model.tensors import Values


def _read(source: Source, module: str, parts: Parts) -> Chains:
    spectrum = parts.get("waveft_spectrum")
    if spectrum is None:
        return {}
    has_transform, family = source.flag("use_idwt", default=True), source.text("wavelet_family", "db1")
    if has_transform and family != "db1":
        raise UnsupportedUpdate(
            f"WaveFT with the wavelet {family} is not supported", where=in_file(CONFIG, "wavelet_family")
        )
    out, into = source.shape(module)
    count, seed = spectrum.numel, source.integer("random_loc_seed", 777, low=0)
    require(count <= out * into, module, f"{count} coefficients do not fit {out} x {into}")
    scale = source.number("scaling", 25)

    # Drawing the places takes a permutation of all of them, and rows are read a few at a time.
    @lru_cache(maxsize=1)
    def drawn() -> Places:
        return places_of(seed, count, out, into)

    if not has_transform:
        return {f"{module}.weight": (Dense(scattered(module, spectrum, drawn, (out, into)), scale),)}

    @lru_cache(maxsize=1)
    def squares() -> tuple[Places, Floats]:
        return _squares(drawn(), out, into)

    def values(start: int, stop: int) -> Values:
        import numpy as np

        with np.errstate(invalid="ignore"):
            return rounded((float64_of(spectrum) * squares()[1]).reshape(-1)[start:stop], DType.F32)

    spread = LazyTensor((4 * count,), DType.F32, values)
    return {f"{module}.weight": (Dense(scattered(module, spread, lambda: squares()[0], (out, into)), scale),)}


def _squares(places: Places, out: int, into: int) -> tuple[Places, Floats]:
    """(places, factors) of the four values of each coefficient, (2, 4 n) and (4, n).

    The quarters of the spectrum are average and detail along rows and columns: a detail changes its sign in the second
    half of a square, one in the right half along the rows. An odd side is one longer in the spectrum; what falls
    outside is zero.
    """
    import numpy as np

    half = np.array([[(out + 1) // 2], [(into + 1) // 2]])
    corner, is_detail = places % half, places >= half
    found, factors = [], []
    for down in (0, 1):
        for right in (0, 1):
            place = 2 * corner + np.array([[down], [right]])
            sign = (1 - 2 * (is_detail[1] & (down == 1))) * (1 - 2 * (is_detail[0] & (right == 1)))
            is_inside = (place < np.array([[out], [into]])).all(axis=0)
            found.append(place * is_inside)
            factors.append(sign * is_inside / 2)
    return np.concatenate(found, axis=1), np.stack(factors)


WAVEFT = Tuner(
    parts={"waveft_spectrum": (1,)},
    read=_read,
    settings=(
        *(
            "init_weights",
            "n_frequency",
            "n_frequency_pattern",
            "proportional_parameters",
            "random_loc_seed",
            "scaling",
        ),
        *("use_idwt", "wavelet_family"),
    ),
)
