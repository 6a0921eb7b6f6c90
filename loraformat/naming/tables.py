"""Tables of names, generated from other projects."""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any


@cache
def table(name: str) -> dict[str, Any]:
    """The JSON object in a file of this package."""
    # Not by importlib.resources, which costs more to import than the table to read.
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as file:
        content = json.load(file)
    assert isinstance(content, dict)
    return content
