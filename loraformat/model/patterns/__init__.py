"""Regular expressions from configs, matched in linear time."""

from __future__ import annotations

__all__ = ["fullmatch", "keys", "matching"]


def fullmatch(pattern: str, text: str) -> bool | None:
    r"""Whether the whole text matches, as `re.fullmatch` says; None where it was not evaluated.

    >>> fullmatch(r".*\.(q|v)_proj", "layers.0.q_proj")
    True
    """
    # Most adapters have no pattern, and need no matcher.
    from loraformat.model.patterns import matching

    return matching.fullmatch(pattern, text)
