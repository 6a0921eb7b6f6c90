"""Rows of tables of embeddings: how long they are before and after, and which of them change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.model.results.weight_figures import TableRecord

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Rows:
    """Norms of the rows of one table.

    Attributes:
        stored: rows that the base has.
        before, after: (rows,) float64.
        changed: (rows,) whether any value of the row differs.
    """

    stored: int
    before: Tensor
    after: Tensor
    changed: Tensor

    @classmethod
    def of(cls, rows: int, stored: int) -> Rows:
        """Nothing measured yet."""
        import torch

        before, after = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
        return cls(stored, before, after, torch.zeros(rows, dtype=torch.bool))

    def add(self, start: int, base: Tensor, result: Tensor) -> None:
        """Rows from `start` on; each row comes once, from any thread."""
        rows = slice(start, start + base.shape[0])
        self.before[rows], self.after[rows] = base.norm(dim=1), result.norm(dim=1)
        self.changed[rows] = (base != result).any(dim=1)


def table_record(weight: str, rows: Rows) -> TableRecord:
    """The rows in figures."""
    changed = rows.after[: rows.stored][rows.changed[: rows.stored]]
    new = rows.after[rows.stored :]
    return TableRecord(
        weight=weight,
        rows_before=rows.stored,
        rows_after=rows.after.numel(),
        changed=changed.numel(),
        norm_before=_median(rows.before[: rows.stored]) or 0.0,
        norm_changed=_median(changed),
        norm_new=_median(new),
        norm_new_least=float(new.min()) if new.numel() else None,
        norm_new_most=float(new.max()) if new.numel() else None,
    )


def _median(values: Tensor) -> float | None:
    return float(values.quantile(0.5)) if values.numel() else None
