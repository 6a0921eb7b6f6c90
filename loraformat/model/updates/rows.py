"""Some rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.model.tensors import LazyTensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a table are replaced, or appended if they are beyond its end.

    Attributes:
        indices: row numbers in the order of `values`, each at most once.
        values: (len(indices), cols), absolute rows, not differences.
        follows_tie: see Replace.
    """

    indices: tuple[int, ...]
    values: LazyTensor
    follows_tie: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(least number of rows that the table must have, cols); cols is 0 where `values` is no matrix."""
        cols = self.values.shape[1] if len(self.values.shape) > 1 else 0
        return (max(self.indices, default=-1) + 1, cols)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a table of `shape` has rows as long."""
        return len(shape) == 2 and self.shape[1] == shape[1]
