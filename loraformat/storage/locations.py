"""Where something lies, as callers give it: text, or a path object."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import TypeAlias, Union

from loraformat.diagnostics import show
from loraformat.errors import UsageError

# A folder, a file, or the address of a repository of the Hub; the last as text only.
Location: TypeAlias = Union[str, "os.PathLike[str]"]

_LONGEST = 200
_OF_STRENGTHS = 'an adapter of another strength than 1 is written "PATH=0.7"'


def uri_of(location: Location) -> str:
    """A location as text.

    Raises: UsageError (LF021): it is neither text nor a path object, or a path object made of an address of the Hub.
    """
    if not isinstance(location, (str, os.PathLike)):
        raise UsageError(f"expected a path, as str or os.PathLike, found {type(location).__name__}")
    text: object = os.fspath(location)
    if not isinstance(text, str):
        raise UsageError(f"expected a path of text, found one of {type(text).__name__}")
    if text.startswith("hf:/") and not text.startswith("hf://"):
        address = f"hf://{text[4:].lstrip('/')}"
        raise UsageError(
            "no such path: pathlib joins the two slashes of an address",
            where=show(text),
            hint=f'give "{show(address)}"',
        )
    return text


def uri_or_none(location: Location | None) -> str | None:
    """As `uri_of`; None for None."""
    return None if location is None else uri_of(location)


def listed(locations: Iterable[Location], what: str = "paths") -> tuple[str, ...]:
    """Several locations, or other texts, as a tuple.

    Args:
        what: a noun for the message.

    Raises: UsageError (LF021): one stands alone where several are meant, they have no order, or one is not text.
    """
    if isinstance(locations, (str, bytes, os.PathLike)):
        said = show(locations, _LONGEST)
        raise UsageError(f'expected a list of {what}, found "{said}" alone', hint=f'write ["{said}"]')
    if isinstance(locations, (Mapping, AbstractSet)) or not isinstance(locations, Iterable):
        raise UsageError(f"expected a list of {what}, found {type(locations).__name__}", hint=_OF_STRENGTHS)
    return tuple(map(uri_of, locations))
