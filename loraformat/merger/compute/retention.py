"""How much of an update survives the rounding to the output's dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, overload

from loraformat.algebra.retention import is_lost
from loraformat.arithmetic import Tally
from loraformat.diagnostics import Finding, FindingLocation
from loraformat.merger.plan.findings import update_lost_to_rounding
from loraformat.model.results.verbs import Retention

if TYPE_CHECKING:
    from torch import Tensor


def change_of(written: Tensor, base: Tensor, out: Tensor) -> Tensor:
    """C in `out`; zero where the base is not finite, which no update can change."""
    change = out.copy_(written).sub_(base)
    is_finite = base.isfinite()
    return change if bool(is_finite.all()) else change.masked_fill_(~is_finite, 0)


def tally_of(change: Tensor, update: Tensor) -> Tally:
    """The tally of one tile: C and D, contiguous and of one dtype. C is lost.

    A tile is the unit of these sums as it is of the arithmetic: tiles are added in the order of rows, so that neither
    windows nor threads show in the figures.
    """
    import torch

    flat_change, flat_update = change.reshape(-1), update.reshape(-1)
    low, high = torch.aminmax(flat_update) if flat_update.numel() else (torch.zeros(()), torch.zeros(()))
    kept, whole = float(torch.dot(flat_change, flat_update)), float(torch.dot(flat_update, flat_update))
    # Twice as fast as count_nonzero. float32 counts exactly up to 2^24.
    wide = torch.float64 if change.numel() > 1 << 24 else None
    changed = int(flat_change.ne_(0).sum(dtype=wide))
    return Tally(
        kept=kept,
        whole=whole,
        unchanged=change.numel() - changed,
        numel=change.numel(),
        largest=max(abs(float(low)), abs(float(high))),
    )


def retentions(tallies: Mapping[str, Tally]) -> tuple[Retention, ...]:
    """The figures of each weight, sorted by name, to the six digits that do not depend on the machine."""
    return tuple(
        Retention(
            weight=name,
            share=_six_digits(_share((tally,))),
            unchanged=tally.unchanged / max(1, tally.numel),
            norm=_six_digits(math.sqrt(tally.whole)),
            largest=_six_digits(tally.largest),
        )
        for name, tally in sorted(tallies.items())
    )


def total_share(tallies: Mapping[str, Tally]) -> float | None:
    """Σ C·D / Σ D·D over all weights; None where nothing was added, or what was has squares beyond float64."""
    return _six_digits(_share(tallies[name] for name in sorted(tallies)))


def rounding_findings(base: str, tallies: Mapping[str, Tally], dtypes: Iterable[str]) -> tuple[Finding, ...]:
    """LF803 where less than LEAST_SHARE of all updates together survived."""
    share = total_share(tallies)
    if share is None or not is_lost(share):
        return ()
    return (update_lost_to_rounding(FindingLocation(subject=base), share, sorted(set(dtypes))),)


@overload
def _six_digits(value: float) -> float: ...
@overload
def _six_digits(value: float | None) -> float | None: ...
def _six_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _share(tallies: Iterable[Tally]) -> float | None:
    found = tuple(tallies)
    try:
        whole, kept = math.fsum(tally.whole for tally in found), math.fsum(tally.kept for tally in found)
    except (ValueError, OverflowError):  # infinity minus itself, or a sum beyond float64
        return None
    return kept / whole if 0 < whole < math.inf else None
