"""Updates that multiply the weight, or write it in another basis."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from loraformat.merger.verify.reference.kinds.effect import Effect, FactorMatrix, Landed, Matrix
from loraformat.merger.verify.reference.sources import factor_values
from loraformat.model.tensors import DType
from loraformat.model.updates import BlockAffine, ElementwiseScale, FRoD, Multiplied, Rotated, Scaled, Update

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_LEAST_LENGTH, _LEAST_SINGULAR = 1e-12, 1e-6
_LOST = 2.0**-48  # of sums of a few hundred terms


class _Multiplication(Effect):
    """An update that multiplies: on blocks of W, whole columns of it where it is transposed."""

    is_sum = False

    @abstractmethod
    def of(self, weight: Floats, low: int, high: int) -> Floats:
        """W after it: rows `low:high` of W and all columns, or where it is transposed such columns and all rows."""

    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:
        before = origin if self.is_sum else value
        after = self.of(before.T, low, high).T if self.landed.is_transposed else self.of(before, low, high)
        return value + (after - before) if self.is_sum else after


class _Scaling(_Multiplication):
    def __init__(self, landed: Landed, matrix: Matrix) -> None:
        super().__init__(landed, matrix)
        assert isinstance(landed.update, Scaled)
        self.is_sum = landed.update.is_sum

    @cached_property
    def vectors(self) -> tuple[Floats | None, Floats | None]:
        update = self.landed.update
        assert isinstance(update, Scaled)
        rows, cols = (None if one is None else factor_values(one).reshape(-1) for one in (update.rows, update.cols))
        return rows, cols

    def of(self, weight: Floats, low: int, high: int) -> Floats:
        rows, cols = self.vectors
        if rows is not None:
            weight = weight * (rows if self.landed.is_transposed else rows[low:high])[:, None]
        if cols is not None:
            cols = cols[low:high] if self.landed.is_transposed else cols.repeat(weight.shape[1] // len(cols))
            weight = weight * cols
        return weight


class _Modulation(_Multiplication):
    """W + W₀ ∘ (up @ down)."""

    is_sum = True

    @cached_property
    def factors(self) -> tuple[Floats, Floats]:
        assert isinstance(self.landed.update, ElementwiseScale)
        return FactorMatrix(self.landed.update.up).all, FactorMatrix(self.landed.update.down).all

    def of(self, weight: Floats, low: int, high: int) -> Floats:
        up, down = self.factors
        product = up @ down[:, low:high] if self.landed.is_transposed else up[low:high] @ down
        return weight * (1 + product)


class _Reflection(_Multiplication):
    """W (I + up @ down)."""

    def __init__(self, landed: Landed, matrix: Matrix) -> None:
        super().__init__(landed, matrix)
        self.unit = matrix.rows if landed.is_transposed else 1

    @property
    def needs_all_rows(self) -> bool:
        return self.landed.is_transposed

    @cached_property
    def factors(self) -> tuple[Floats, Floats]:
        assert isinstance(self.landed.update, Multiplied)
        return FactorMatrix(self.landed.update.up).all, FactorMatrix(self.landed.update.down).all

    def of(self, weight: Floats, low: int, high: int) -> Floats:  # noqa: ARG002
        up, down = self.factors
        return weight + weight @ up @ down


class _Rotation(_Multiplication):
    """L W or W R of diagonal blocks; rows or columns are taken in an order first, and put back."""

    def __init__(self, landed: Landed, matrix: Matrix) -> None:
        super().__init__(landed, matrix)
        assert isinstance(landed.update, Rotated)
        mixes_rows = (landed.update.side == "left") is not landed.is_transposed
        self._mixes_all = mixes_rows and landed.update.order is not None
        self.unit = matrix.rows if self._mixes_all else landed.update.size if mixes_rows else 1

    @property
    def needs_all_rows(self) -> bool:
        return self._mixes_all

    @cached_property
    def blocks(self) -> Floats:
        assert isinstance(self.landed.update, Rotated)
        return factor_values(self.landed.update.blocks)

    def of(self, weight: Floats, low: int, high: int) -> Floats:  # noqa: ARG002
        import numpy as np

        update = self.landed.update
        assert isinstance(update, Rotated)
        lines = weight if update.side == "left" else weight.T  # what is mixed: rows of W, or its columns
        first = 0 if self.unit == 1 else low // update.size
        order = np.arange(len(lines)) if update.order is None else np.asarray(update.order)
        mixed = np.empty_like(lines)
        for number in range(len(lines) // update.size):
            block = self.blocks[0 if update.is_shared else first + number]
            taken = order[number * update.size : (number + 1) * update.size]
            mixed[taken] = (block if update.side == "left" else block.T) @ lines[taken]
        return mixed if update.side == "left" else mixed.T


class _Tiling(_Multiplication):
    """T + (T + I) M for each tile T of W, M that of its row of tiles."""

    def __init__(self, landed: Landed, matrix: Matrix) -> None:
        super().__init__(landed, matrix)
        assert isinstance(landed.update, BlockAffine)
        self.unit = landed.update.size

    @cached_property
    def blocks(self) -> Floats:
        assert isinstance(self.landed.update, BlockAffine)
        return factor_values(self.landed.update.blocks)

    def of(self, weight: Floats, low: int, high: int) -> Floats:  # noqa: ARG002
        import numpy as np

        blocks, size = self.blocks, self.unit
        first = 0 if self.landed.is_transposed else low // size
        result = np.empty_like(weight)
        for top in range(0, weight.shape[0], size):
            for side in range(0, weight.shape[1], size):
                place = slice(top, top + size), slice(side, side + size)
                result[place] = weight[place] + (weight[place] + np.eye(size)) @ blocks[first + top // size]
        return result


class _Recoding(Effect):
    """W + (U core - W₀), U the columns of W₀ basis⁻ᵀ at the length 1, rounded as where the adapter is trained."""

    def __init__(self, landed: Landed, matrix: Matrix) -> None:
        super().__init__(landed, matrix)
        self.unit = matrix.rows if landed.is_transposed else 1

    @property
    def needs_all_rows(self) -> bool:
        return True

    @property
    def update(self) -> FRoD:
        assert isinstance(self.landed.update, FRoD)
        return self.landed.update

    @cached_property
    def core(self) -> Floats:
        return factor_values(self.update.core)

    @cached_property
    def inverse(self) -> Floats:
        import numpy as np

        basis = factor_values(self.update.basis)
        try:
            return np.asarray(np.linalg.inv(basis).T)
        except np.linalg.LinAlgError:
            return np.asarray(np.linalg.pinv(basis, rcond=_LEAST_SINGULAR).T)

    @cached_property
    def scales(self) -> Floats:
        import numpy as np

        whole = [rows for _, rows in self.matrix.base()]
        outputs = [np.concatenate(whole).T] if self.landed.is_transposed else whole
        lengths = sum(((rows @ self.inverse) ** 2).sum(axis=0) for rows in outputs) ** 0.5
        return np.asarray(np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > _LEAST_LENGTH))

    def prepare(self) -> None:
        _ = self.scales

    def units(self, origin: Floats, nudge: float = 0.0) -> Floats:
        """Rows of U; `nudge` times as far away from it as the sums before may be, of which some almost cancel."""
        outputs = origin.T if self.landed.is_transposed else origin
        found = outputs @ self.inverse * self.scales
        if nudge:
            largest = (abs(outputs) @ abs(self.inverse)).max(axis=1, keepdims=True, initial=0.0)
            found = found + nudge * _LOST * largest * self.scales * (1 + abs(found))
        return rounded(found, self.update.basis.dtype)

    def slack(self, origin: Floats) -> Floats | float:
        """What it makes of U where the last places of its values are not known, or decide how they are rounded."""
        moved = abs(self.units(origin, 1.0) - self.units(origin, -1.0)) @ abs(self.core)
        return moved.T if self.landed.is_transposed else moved

    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:  # noqa: ARG002
        change = self.units(origin) @ self.core
        return value + (change.T if self.landed.is_transposed else change) - origin


def rounded(values: Floats, dtype: DType) -> Floats:
    """Values rounded to float32 and then to `dtype`, as float64."""
    import numpy as np

    narrow = values.astype(np.float32)
    if dtype is DType.BF16:
        bits = narrow.view(np.uint32)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        return np.asarray(bits.astype(np.uint32).view(np.float32).astype(np.float64))
    return narrow.astype(np.float16 if dtype is DType.F16 else np.float32).astype(np.float64)


MULTIPLICATIVE: Mapping[type[Update], Callable[[Landed, Matrix], Effect]] = {
    Scaled: _Scaling,
    Rotated: _Rotation,
    Multiplied: _Reflection,
    ElementwiseScale: _Modulation,
    BlockAffine: _Tiling,
    FRoD: _Recoding,
}
