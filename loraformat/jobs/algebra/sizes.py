"""Ranks of a whole adapter: within a number of bytes, and below a limit that keeps a bound from being met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from loraformat.algebra.decomposition import Decomposition
from loraformat.algebra.rank_rules import RankRule, ranks_of
from loraformat.diagnostics import Finding
from loraformat.errors import UsageError
from loraformat.formats.kit.losses import bound_not_met
from loraformat.model.results.factor_changes import FactorChange
from loraformat.model.tensors import DType
from loraformat.model.updates import Update, tensors

# Of a safetensors header, for each tensor beside its name: a prefix, dtype, shape, offsets; and the metadata.
_ENTRY_NBYTES = 160
_METADATA_NBYTES = 1024


def ranks_within(
    rule: RankRule,
    dtype: DType,
    steps: Mapping[str, Callable[[], Sequence[Decomposition]]],
    others: Sequence[Update],
) -> dict[str, int]:
    """Ranks so that the weight file, with what is carried over and its header, takes at most `rule.size` bytes.

    Args:
        steps: weight → its decompositions; each is called once, and nothing but singular values is kept of it.
        others: updates that are carried over.

    Raises: UsageError (LF021): there is no place for a single rank.
    """
    import numpy as np

    assert rule.size is not None
    taken = _METADATA_NBYTES + sum(each.nbytes for update in others for _, each in tensors(update))
    taken += _ENTRY_NBYTES * len(others) + sum(2 * (len(weight) + _ENTRY_NBYTES) for weight in steps)
    spectra: dict[str, list[Decomposition]] = {}
    costs: dict[str, int] = {}
    none = np.empty((0, 0))
    for weight, step in steps.items():
        found = step()
        costs[weight] = sum(sum(each.shape) for each in found) * dtype.itemsize
        # The vectors of all updates together would be many times the adapter.
        spectra[weight] = [replace(each, left=none, right=none) for each in found]
    left = rule.size - taken
    if left < min(costs.values(), default=0):
        raise UsageError(
            f"{rule.size} bytes are too few even for rank 1: names and copied tensors alone take {taken}",
            where="--size",
        )
    return ranks_of(replace(rule, size=left), spectra, costs)


def not_met(changes: tuple[FactorChange, ...], rule: RankRule) -> Iterator[Finding]:
    """LF711 where `max_rank` keeps an update from meeting a bound of its error or energy."""
    if rule.max_rank is None:
        return
    short = []
    for each in changes:
        energies = [share for share in (rule.energy, (rule.sv_fro or 0.0) ** 2 or None) if share is not None]
        is_short = any((each.energy or 0.0) < share for share in energies)
        is_short |= rule.error is not None and (each.optimum or 0.0) > rule.error
        if is_short and each.rank == rule.max_rank:
            short.append(each)
    if short:
        worst = max(short, key=lambda each: each.optimum or 0.0)
        yield bound_not_met("", [each.weight for each in short], rule.max_rank, worst.optimum or 0.0)
