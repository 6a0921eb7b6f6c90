"""Converts between alpha and rank in files and the single scale of an update."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from loraformat.diagnostics import FindingLocation
from loraformat.errors import AssumptionContradicted, ConfigError
from loraformat.formats.kit.base import Hints

T = TypeVar("T", int, float, bool)

MAX_RANK = 65_536


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a format makes a factor of alpha and rank: alpha / rank, or alpha / sqrt(rank)."""

    by_root: bool = False

    def factor(self, alpha: float, rank: int) -> float:
        """The factor by which `up @ down` is multiplied."""
        return alpha / math.sqrt(rank) if self.by_root else alpha / rank

    def alpha(self, scale: float, rank: int, preferred: Iterable[float] = ()) -> float:
        """An alpha that gives `scale`: a preferred one if it does so exactly, else an integer, else a float.

        The float is exact up to the last bit of a float64.
        """
        wanted = scale * math.sqrt(rank) if self.by_root else scale * rank
        near = (round(wanted), wanted, math.nextafter(wanted, math.inf), math.nextafter(wanted, -math.inf))
        for candidate in (*preferred, *near):
            if self.factor(candidate, rank) == scale:
                return candidate
        return wanted


def agreed(
    stated: T | None, hinted: T | None, what: str, where: FindingLocation, *, settings: str = "", option: str = ""
) -> T | None:
    """What the file states, or the caller's hint where it states nothing.

    Args:
        option: by which the hint was given; "": the one for `what`.
        settings: another file, if it is that file and not the caller that gives the hint.

    Raises:
        AssumptionContradicted (LF024): the file and the caller differ.
        ConfigError (LF103): two files differ.
    """
    if stated is None or hinted is None or stated == hinted:
        return stated if stated is not None else hinted
    if settings:
        raise ConfigError(
            f"the file states {what} {_plain(stated)}, but {settings} states {_plain(hinted)}", where=where
        )
    message = f"the file states {what} {_plain(stated)}, but {_plain(hinted)} was given"
    option = option or ("--alpha" if what == "alpha" else "--assume")
    raise AssumptionContradicted(message, where=where, hint=f"leave {option} out, or correct the file")


def option_of(hints: Hints) -> str:
    """The option by which the caller gave a scale, perhaps by way of alpha."""
    return "--assume" if hints.alpha is None else "--alpha"


def _plain(value: float) -> str:
    """A number without the ".0" of a float that is an integer."""
    return str(value).lower() if isinstance(value, bool) else f"{value:.12g}"


def scale_of(alpha: float | None, rank: int, scaling: Scaling, hints: Hints, where: FindingLocation) -> float | None:
    """The factor of one module, or None where nobody stated alpha.

    Args:
        alpha: what the file states for this module.
        rank: declared rank of this module, at least 1.
        hints: its `alpha` and `scale` fill a gap.
    Raises: AssumptionContradicted (LF024): a hint contradicts the file or another hint.
    """
    alpha = agreed(alpha, hints.alpha, "alpha", where)
    stated = None if alpha is None else scaling.factor(alpha, rank)
    if stated is not None and hints.scale is not None and math.isclose(stated, hints.scale, rel_tol=1e-9):
        return stated
    return agreed(stated, hints.scale, "a scale of", where)
