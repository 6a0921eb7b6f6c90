"""`ADAPTER=0.7`: an adapter and how strongly it is merged."""

from __future__ import annotations

import math
import os

from loraformat.errors import StorageError


def with_strength(argument: str) -> tuple[str, float]:
    """("lora", 0.7) for "lora=0.7"; a path that exists is a path, whatever it contains, and has strength 1.

    Raises: StorageError (LF020): what follows the last `=` is no finite number.
    """
    if os.path.exists(argument) or "=" not in argument:
        return argument, 1.0
    path, _, text = argument.rpartition("=")
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not path or not math.isfinite(strength):
        raise StorageError(
            f"no such file, and what follows = is no strength: expected a finite number, found {text!r}",
            where=argument,
            hint="give ADAPTER=0.7",
        )
    return path, strength
