"""Updates that add: products of factors, dense deltas, DoRA, and what is computed from the base and added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from loraformat.merger.verify.reference.kinds.effect import Effect, FactorMatrix, Landed, Matrix, product
from loraformat.merger.verify.reference.kinds.networks import activated
from loraformat.merger.verify.reference.sources import factor_values
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import (
    BiasFromWeight,
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    SubtractedInit,
    Update,
    WeightNetwork,
)

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


class _Product:
    """up @ down, or its transpose."""

    def __init__(self, up: LazyTensor, down: LazyTensor, *, is_transposed: bool) -> None:
        self._up, self._down, self._is_transposed = FactorMatrix(up), FactorMatrix(down), is_transposed

    def rows(self, low: int, high: int) -> Floats:
        if self._is_transposed:
            return product(self._down.all[:, low:high].T, self._up.all.T)
        return product(self._up.rows(low, high), self._down.all)


class _Sum(Effect):
    """W + factor · Δ."""

    @cached_property
    def delta(self) -> Callable[[int, int], Floats]:
        update, is_transposed = self.landed.update, self.landed.is_transposed
        if isinstance(update, Hadamard):
            one = _Product(update.up1, update.down1, is_transposed=is_transposed)
            two = _Product(update.up2, update.down2, is_transposed=is_transposed)
            return lambda low, high: one.rows(low, high) * two.rows(low, high)
        if isinstance(update, Kronecker):
            return _kronecker(update, is_transposed=is_transposed)
        if isinstance(update, Dense):
            delta = FactorMatrix(update.delta)
            return (lambda low, high: delta.all.T[low:high]) if is_transposed else delta.rows
        assert isinstance(update, LowRank)
        factors = update.up, update.down
        if update.is_stack:
            factors = update.expert(self.landed.expert or 0)
        return _Product(*factors, is_transposed=is_transposed).rows

    def change(self, low: int, high: int) -> Floats:
        first = self.landed.first
        return self.landed.factor * self.delta(first + low, first + high)

    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:  # noqa: ARG002
        return value + self.change(low, high).reshape(value.shape)


def _kronecker(update: Kronecker, *, is_transposed: bool) -> Callable[[int, int], Floats]:
    import numpy as np

    left, right = (_chain(side) for side in (update.left, update.right))
    if is_transposed:
        left, right = left.T, right.T
    count = len(right)

    def rows(low: int, high: int) -> Floats:
        parts = []
        for outer in range(low // count, -(-high // count)):
            inner = right[max(low - outer * count, 0) : min(high - outer * count, count)]
            parts.append(np.kron(left[outer : outer + 1], inner))
        return np.concatenate(parts)

    return rows


def _chain(factors: tuple[LazyTensor, ...]) -> Floats:
    first, *others = (FactorMatrix(factor).all for factor in factors)
    for other in others:
        first = first @ other
    return first


class _Dora(_Sum):
    """m (W + ΔW) / ‖W₀ + ΔW‖, W₀ the weight without other updates.

    Source: Liu et al., DoRA, 2024, equation 5; peft 0.21.2, tuners/lora/dora.py.
    """

    @cached_property
    def magnitude(self) -> Floats:
        update = self.landed.update
        assert isinstance(update, LowRank)
        assert update.magnitude is not None
        return factor_values(update.magnitude.vector).reshape(-1)

    @property
    def is_per_row(self) -> bool:
        update = self.landed.update
        assert isinstance(update, LowRank)
        assert update.magnitude is not None
        return (update.magnitude.axis == 1) is not self.landed.is_transposed

    @property
    def needs_all_rows(self) -> bool:
        return not self.is_per_row

    @cached_property
    def column_norms(self) -> Floats:
        import numpy as np

        squares = np.zeros(self.matrix.cols)
        for start, rows in self.matrix.origin():
            squares += ((rows + self.change(start, start + len(rows))) ** 2).sum(axis=0)
        return np.sqrt(squares)

    def prepare(self) -> None:
        if not self.is_per_row:
            _ = self.column_norms

    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:
        import numpy as np

        change = self.change(low, high)
        with np.errstate(all="ignore"):
            if not self.is_per_row:
                return (value + change) * (self.magnitude / self.column_norms)
            norms = ((origin + change) ** 2).sum(axis=1) ** 0.5
            factors = self.magnitude[self.landed.first + low : self.landed.first + high] / norms
            return np.asarray((value + change) * factors[:, None])


class _TakenOff(Effect):
    """W less a part of W₀, from its singular vectors, or from those of its QR decomposition as it is stored."""

    @property
    def needs_all_rows(self) -> bool:
        return True

    @cached_property
    def part(self) -> tuple[Floats, Floats]:
        """(left, right), whose product it is."""
        import numpy as np

        update = self.landed.update
        assert isinstance(update, SubtractedInit)
        whole, rank = np.concatenate([rows for _, rows in self.matrix.base()]), update.rank
        if update.recipe == "olora":
            kept = np.linalg.qr(whole)[0][:, :rank]
            return kept * self.landed.factor, kept.T @ whole
        left = np.linalg.svd(whole, full_matrices=False)[0]
        kept = left[:, :rank] if update.recipe == "pissa" else left[:, left.shape[1] - rank :]
        return kept, kept.T @ whole

    def prepare(self) -> None:
        _ = self.part

    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:  # noqa: ARG002
        left, right = self.part
        return value - left[low:high] @ right


class _Projection(Effect):
    """W + scale · up f(down W₀)."""

    @property
    def needs_all_rows(self) -> bool:
        return True

    @cached_property
    def up(self) -> Floats:
        assert isinstance(self.landed.update, WeightNetwork)
        return FactorMatrix(self.landed.update.up).all

    @cached_property
    def inner(self) -> Floats:
        import numpy as np

        update = self.landed.update
        assert isinstance(update, WeightNetwork)
        down = FactorMatrix(update.down).all
        if self.landed.is_transposed:
            found = np.concatenate([down @ rows.T for _, rows in self.matrix.base()], axis=1)
        else:
            found = sum(down[:, start : start + len(rows)] @ rows for start, rows in self.matrix.base())  # type: ignore[assignment]
        return activated(update, found)

    def prepare(self) -> None:
        _ = self.inner

    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:  # noqa: ARG002
        up = self.up
        change: Floats = self.inner[:, low:high].T @ up.T if self.landed.is_transposed else up[low:high] @ self.inner
        return value + self.landed.factor * change


class _Carrying(Effect):
    """b + W c, W another weight of the base."""

    @property
    def needs_all_rows(self) -> bool:
        return True

    @cached_property
    def product(self) -> Floats:
        import numpy as np

        update = self.landed.update
        assert isinstance(update, BiasFromWeight)
        vector = factor_values(update.vector).reshape(-1)
        blocks, is_transposed = self.matrix.other(update.weight)
        if is_transposed:
            return np.asarray(sum(vector[start : start + len(rows)] @ rows for start, rows in blocks))
        return np.concatenate([rows @ vector for _, rows in blocks])

    def prepare(self) -> None:
        _ = self.product

    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:  # noqa: ARG002
        return value + self.product[low:high].reshape(value.shape)


def _low_rank(landed: Landed, matrix: Matrix) -> Effect:
    is_plain = isinstance(landed.update, LowRank) and landed.update.magnitude is None
    return _Sum(landed, matrix) if is_plain else _Dora(landed, matrix)


SUMS: Mapping[type[Update], Callable[[Landed, Matrix], Effect]] = {
    LowRank: _low_rank,
    Hadamard: _Sum,
    Kronecker: _Sum,
    Dense: _Sum,
    SubtractedInit: _TakenOff,
    WeightNetwork: _Projection,
    BiasFromWeight: _Carrying,
}
