"""Reads an output back and checks that it changes every weight like its source."""

from __future__ import annotations

from collections.abc import Sequence

from loraformat.algebra.agreement import Agreement, agreement
from loraformat.diagnostics import counted
from loraformat.errors import RoundTripFailed
from loraformat.formats.kit.base import Hints
from loraformat.io import read_bundle
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle
from loraformat.model.results.verbs import RoundTrip
from loraformat.model.updates import LowRank, Update


def compare(written: Bundle, wanted: Adapter, *, to: str, hints: Hints, roundoff: float) -> RoundTrip:
    """What reading `written` as the format `to` gives, compared with `wanted`.

    Args:
        hints: what the caller said about the source; only the base's names and shapes count here.
        roundoff: see `algebra.agreement`.

    Raises: RoundTripFailed (LF710): a weight is missing or added, or an update differs by more than rounding does.
    """
    found = read_bundle(
        written,
        format=to,
        hints=Hints(
            weights=hints.weights,
            components=hints.components,
            component=hints.component,
            config=hints.config,
            settings=hints.settings,
        ),
    ).adapter
    added = found.updates.keys() - wanted.updates.keys()
    lacking = sorted(
        [
            *(wanted.updates.keys() - found.updates.keys()),
            *(weight for weight in added if not _is_nothing(found.updates[weight])),
        ]
    )
    if lacking:
        raise _failed(f"{counted(len(lacking), 'weight', 'is')} changed in only one of them", lacking)
    exact, worst = 0, 0.0
    for weight, chain in wanted.updates.items():
        compared = _chain(found.updates[weight], chain, roundoff)
        if compared is None or not all(each.holds for each in compared):
            raise _failed("its update was lost", [weight])
        exact += all(each.is_exact for each in compared)
        worst = max([worst, *(each.error for each in compared)])
    return RoundTrip(weights=len(wanted.updates), exact=exact, worst=worst, roundoff=roundoff)


def _is_nothing(chain: Sequence[Update]) -> bool:
    """Whether updates add zeros alone: factors that a format wants for every weight of a group."""
    return all(isinstance(update, LowRank) and not update.up.load().any() for update in chain)


def _chain(found: Sequence[Update], wanted: Sequence[Update], roundoff: float) -> list[Agreement] | None:
    if len(found) != len(wanted):
        return None
    return [agreement(one, other, roundoff) for one, other in zip(found, wanted, strict=True)]


def _failed(message: str, weights: list[str]) -> RoundTripFailed:
    return RoundTripFailed(f"read back, {message}: {', '.join(weights[:3])}", where="convert", hint="please report it")
