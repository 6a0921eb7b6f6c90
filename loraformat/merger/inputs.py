"""What a plan refers to, opened: the base and the adapters, each through one opening of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraformat.merger.plan.data import Term
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle, OpenedFiles
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.updates.kinds import Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a plan refers to, opened.

    Attributes:
        base: with the one opening of its files.
        adapters: as `MergePlan.adapters`.
        bundles: the files of each adapter, by the opening through which it was read; none for adapters in memory.
    """

    base: Checkpoint
    adapters: Sequence[Adapter]
    bundles: Sequence[Bundle] = ()

    @property
    def store(self) -> OpenedFiles:
        """The base's files, as they were when it was opened."""
        return self.base.store

    def bundle(self, number: int) -> Bundle | None:
        """The files of an adapter; None where it is in memory."""
        return self.bundles[number] if self.bundles else None

    def update(self, term: Term) -> Update:
        """The update that a term of the plan means."""
        return self.adapters[term.adapter].updates[term.weight][term.index]

    @property
    def has_views(self) -> bool:
        """Whether the base has tensors that do not stand row-major, which torch puts into order."""
        return any(not weight.is_copyable for weight in self.base.weights.values())
