"""`ADAPTER=0.7`: an adapter and its strength."""

from __future__ import annotations

import math
import os
import re

from loraformat.errors import UsageError

_LONGEST = 400


# What float() takes beyond it (1_0, digits of other scripts, "nan") is a slip of the keyboard more often than a number.
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)


def number_of(text: str) -> float | None:
    """The finite number that a text is, None for anything else: 0.7, -1, 1e-3, but not nan, inf, 1e400, 0x10 or 1_0."""
    number = float(text) if len(text) <= _LONGEST and _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def with_strength(argument: str) -> tuple[str, float]:
    """("lora", 0.7) for "lora=0.7"; a path that exists is a path, whatever it contains, and has strength 1.

    Raises: UsageError (LF021): what follows the last `=` is not a finite number.
    """
    if os.path.exists(argument) or "=" not in argument:
        return argument, 1.0
    path, _, text = argument.rpartition("=")
    strength = number_of(text)
    if not path or strength is None:
        raise UsageError(
            f"no such file, and the strength after '=' is not a finite number: {text!r}",
            where=argument,
            hint="write ADAPTER=0.7",
        )
    return path, strength
