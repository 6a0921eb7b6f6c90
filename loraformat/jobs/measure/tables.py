"""Rows of embedding tables: their norms before and after, and which of them change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.model.results.weight_figures import TableRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats


@dataclass(slots=True)
class Rows:
    """Norms of the rows of one table.

    Attributes:
        stored: rows that the base has.
        before, after: (rows,) float64.
        changed: (rows,) whether any value of the row differs.
    """

    stored: int
    before: Floats
    after: Floats
    changed: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: int, stored: int) -> Rows:
        """Nothing measured yet."""
        import numpy as np

        return cls(stored, np.zeros(rows), np.zeros(rows), np.zeros(rows, bool))

    def add(self, start: int, base: Floats, result: Floats) -> None:
        """Rows from `start` on; each row comes once, from any thread."""
        import numpy as np

        rows = slice(start, start + base.shape[0])
        self.before[rows], self.after[rows] = (np.linalg.norm(each, axis=1) for each in (base, result))
        self.changed[rows] = (base != result).any(axis=1)


def table_record(weight: str, rows: Rows) -> TableRecord:
    """The rows in figures."""
    changed = rows.after[: rows.stored][rows.changed[: rows.stored]]
    new = rows.after[rows.stored :]
    return TableRecord(
        weight=weight,
        rows_before=rows.stored,
        rows_after=rows.after.size,
        changed=changed.size,
        norm_before=_median(rows.before[: rows.stored]) or 0.0,
        norm_changed=_median(changed),
        norm_new=_median(new),
        norm_new_least=float(new.min()) if new.size else None,
        norm_new_most=float(new.max()) if new.size else None,
    )


def _median(values: Floats) -> float | None:
    import numpy as np

    return float(np.median(values)) if values.size else None
