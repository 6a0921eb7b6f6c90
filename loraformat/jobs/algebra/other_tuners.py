"""Adapters of other tuners as LoRA: exactly if they are low-rank, otherwise approximated by SVD."""

from __future__ import annotations

import math
from collections.abc import Iterator

from loraformat.algebra.decomposition import Decomposition, decomposed
from loraformat.algebra.rank_rules import RankRule
from loraformat.algebra.row_blocks import InMemory, leading
from loraformat.diagnostics import Finding
from loraformat.errors import UnsupportedUpdate, UsageError
from loraformat.formats.kit.losses import approximated_update
from loraformat.jobs.algebra.factoring import Form, low_rank_of
from loraformat.jobs.algebra.output import with_updates
from loraformat.jobs.algebra.sources import (
    forms_of,
    matrices,
    ranks_before,
    require_additive,
    sums_of,
    values_of,
    vectors_of,
)
from loraformat.merger import delta
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.factor_changes import FactorChange
from loraformat.model.tensors import DType
from loraformat.model.updates import LowRank, Update

# Of an update in float32 all that is not rounding.
EXACT = 1e-6


def as_lora(
    adapter: Adapter, uri: str, base: Checkpoint | None, *, rank: int | None = None, error: float | None = None
) -> tuple[Adapter, tuple[Finding, ...]]:
    """The adapter with LoRA in the place of every other update of a matrix, and LF713 where that is not exact.

    What is LoRA already stays: LoRA, and AdaLoRA, MiSS and VeRA, which are read as what they are. LoHa, LoKr and others
    that add a matrix get the least rank that meets the rule. DoRA, IA3, OFT and others that depend on the base become
    their change of it first.

    Args:
        uri: of the adapter, for messages.
        base: what it was trained on; needed for what depends on it, and for the kernels of convolutions.
        rank, error: see `RankRule`; without either, all that is not rounding of float32.

    Raises: UnsupportedUpdate (LF013): an update depends on the base and none is given. UsageError (LF021): without a
        rule an update would have more than half of the full rank.
    """
    rule = RankRule(rank=rank, error=EXACT if rank is None and error is None else error)
    if base is None:
        require_additive(adapter, uri, "--to-lora without --base")
    updates: dict[str, tuple[Update, ...]] = {}
    changes: list[FactorChange] = []
    for weight, chain in adapter.updates.items():
        if all(isinstance(each, LowRank) and each.magnitude is None for each in sums_of(chain)) and _is_plain(chain):
            updates[weight] = chain
            continue
        found = _change(adapter, weight, chain, base, rule)
        chosen = max(rule.least(each) for each in found)
        if rule.error == EXACT and rank is None and chosen > max(1, min(found[0].shape) // 2):
            raise UsageError(
                f"{weight}: the update has rank {chosen} of {min(found[0].shape)}, so LoRA would save nothing",
                where="--to-lora",
                hint="use --rank N or --error F to approximate it",
            )
        kept = values_of(chain) if base is None or _is_plain(chain) else ()
        if chosen:
            form = _form(weight, chain, base)
            before = ranks_before(sums_of(chain))
            update, change = low_rank_of(weight, found, chosen, before, form, DType.F32)
            changes.append(change)
            updates[weight] = (*kept, update, *vectors_of(chain))
    made = with_updates(adapter, updates, is_fresh=bool(changes))
    return made, tuple(_losses(changes))


def _is_plain(chain: tuple[Update, ...]) -> bool:
    """Whether nothing in a chain depends on the base but what is replaced."""
    count = len(sums_of(chain)) + len(values_of(chain)) + len(vectors_of(chain))
    return count == len(chain) and all(
        not (isinstance(update, LowRank) and update.magnitude is not None) for update in chain
    )


def _change(
    adapter: Adapter, weight: str, chain: tuple[Update, ...], base: Checkpoint | None, rule: RankRule
) -> list[Decomposition]:
    """Decompositions of what a weight's updates add."""
    import numpy as np

    if _is_plain(chain):
        every = matrices(sums_of(chain), weight)
        return [leading(InMemory(each), rule) if isinstance(each, np.ndarray) else decomposed(each) for each in every]
    dense = delta(adapter, weight, base, dtype="float64").astype(np.float64)
    is_stack = any(form.is_stack for form in forms_of(chain))
    if dense.ndim < 2 or values_of(chain):
        raise UnsupportedUpdate("LoRA cannot express what is done to it", where=weight)
    experts = list(dense) if is_stack else [dense]
    return [leading(InMemory(each.reshape(each.shape[0], -1)), rule) for each in experts]


def _form(weight: str, chain: tuple[Update, ...], base: Checkpoint | None) -> Form:
    """What the weight is: by a low-rank update, else a convolution where the base says so."""
    known = list(forms_of(chain))
    if known:
        return Form.of(known)
    stored = None if base is None else base.weights.get(weight)
    return Form(kernel=stored.shape[2:] if stored is not None and len(stored.shape) > 2 else ())


def _losses(changes: list[FactorChange]) -> Iterator[Finding]:
    """LF713 about all updates of which more was left out than rounding."""
    lossy = [each for each in changes if each.error > 2 * EXACT]
    if lossy:
        norm = math.hypot(*(each.norm for each in lossy))
        error = math.hypot(*(each.error * each.norm for each in lossy)) / norm
        worst = max(each.error for each in lossy)
        yield approximated_update("", [each.weight for each in lossy], error, worst)
