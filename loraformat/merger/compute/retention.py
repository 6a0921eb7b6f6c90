"""How much of an update survives the rounding to the output's dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, overload

from loraformat.algebra.retention import is_lost
from loraformat.arithmetic import Tally, fold
from loraformat.diagnostics import Finding, FindingLocation
from loraformat.merger.plan.findings import update_lost_to_rounding
from loraformat.model.results.verbs import Retention

if TYPE_CHECKING:
    from loraformat.model.floats import Floats
    from loraformat.model.tensors import Values


def tally_of(base: Floats, written: Values, update: Floats, *, is_recoded: bool = False) -> Tally:
    """The tally of some rows.

    Args:
        base, written: values as stored and as written; one that is not finite in the base cannot change.
        update: what was to be added.
        is_recoded: whether they are written in codes, whose errors are summed too.
    """
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):
        change = np.where(np.isfinite(base), written - base, 0.0)
        kept, whole = (float(fold((one * update).reshape(-1), 0)) for one in (change, update))
        error = float(fold(np.square(change - update).reshape(-1), 0)) if is_recoded else 0.0
    return Tally(
        kept=kept,
        whole=whole,
        unchanged=change.size - int(np.count_nonzero(change)),
        numel=change.size,
        largest=float(np.abs(update).max(initial=0.0)),
        error=error,
    )


def retentions(
    tallies: Mapping[str, Tally], errors: Mapping[str, float | None] = MappingProxyType({})
) -> tuple[Retention, ...]:
    """The figures of each weight, sorted by name, to the six digits that do not depend on the machine.

    Args:
        errors: ‖W - decoded W‖ by the name of the weight, where the base was quantized and decoded first.
    """
    return tuple(
        Retention(
            weight=name,
            share=_six_digits(_share((tally,))),
            unchanged=tally.unchanged / max(1, tally.numel),
            norm=_six_digits(math.sqrt(tally.whole)),
            largest=_six_digits(tally.largest),
            base_change=total_base_change({name: tally}, errors),
            code_error=total_code_error({name: tally}),
        )
        for name, tally in sorted(tallies.items())
    )


def total_base_change(tallies: Mapping[str, Tally], errors: Mapping[str, float | None]) -> float | None:
    """‖W - decoded W‖ / ‖D‖ over some weights; None where that of one is not known, or nothing was added."""
    found = [errors.get(name) for name in tallies]
    whole = math.fsum(tally.whole for tally in tallies.values())
    known = [error for error in found if error is not None]
    if not whole or len(known) < len(found):
        return None
    return _six_digits(math.sqrt(math.fsum(error * error for error in known) / whole))


def total_code_error(tallies: Mapping[str, Tally]) -> float | None:
    """‖W' - (W + D)‖ / ‖D‖ over the weights that were quantized again; None where there is none."""
    recoded = [tally for tally in tallies.values() if tally.error]
    whole = math.fsum(tally.whole for tally in recoded)
    return _six_digits(math.sqrt(math.fsum(tally.error for tally in recoded) / whole)) if whole else None


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
