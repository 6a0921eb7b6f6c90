"""A kind of update that the package does not have, in the four parts that it needs, and a tuner that stores it.

W' = W + 1 vᵀ: every row of the weight has a vector added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from loraformat.formats.peft import tuners
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner
from loraformat.merger.compute.kinds.arithmetic import ARITHMETIC
from loraformat.merger.compute.kinds.placement import Placement
from loraformat.merger.compute.kinds.steps import Addition, finite
from loraformat.merger.verify.reference.kinds.effect import Effect
from loraformat.merger.verify.reference.kinds.effects import EFFECTS
from loraformat.merger.verify.reference.sources import factor_values
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import KINDS, Kind

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


# 1: its class.
@dataclass(frozen=True, slots=True)
class Shifted:
    """W' = W + 1 vᵀ."""

    vector: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(0, in): the number of outputs only the base tells."""
        return (0, self.vector.numel)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] == self.vector.numel


# 2: its line.
SHIFTED = Kind(name="shifted", formula="W + 1@v.T", family="multiplicative (IA3, OFT …)", unit="shift")


# 3: its arithmetic.
def shifted(update: Shifted, place: Placement) -> Addition:
    vector = finite(update.vector.load(), place.where)
    if place.transposed:
        return Addition(lambda start, stop: vector[start:stop, None].repeat(place.shape[1], axis=1))
    return Addition(lambda start, stop: vector[None].repeat(stop - start, axis=0))


# 4: its line in the reference.
class Shift(Effect):
    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:
        vector = factor_values(self.landed.update.vector)
        return value + (vector[low:high, None] if self.landed.is_transposed else vector)


def _read(source: Source, module: str, parts: Parts) -> Chains:
    del source
    return {f"{module}.weight": (Shifted(parts["toy_shift"]),)}  # type: ignore[dict-item]


TOY = Tuner(parts={"toy_shift": (1,)}, read=_read)
TABLES: dict[str, tuple[Any, Any]] = {
    "KINDS": (KINDS, SHIFTED),
    "ARITHMETIC": (ARITHMETIC, shifted),
    "EFFECTS": (EFFECTS, Shift),
}


def add(monkeypatch: pytest.MonkeyPatch, *, without: str = "") -> None:
    """Give the package the kind, but for its line in one table, and PEFT's reader the tuner."""
    for name, (table, line) in TABLES.items():
        if name != without:
            monkeypatch.setitem(table, Shifted, line)
    real = tuners._Tuners.__getitem__
    monkeypatch.setitem(tuners._HOMES, "TOY", ("toy", "TOY"))
    monkeypatch.setattr(tuners._Tuners, "__getitem__", lambda self, name: TOY if name == "TOY" else real(self, name))
