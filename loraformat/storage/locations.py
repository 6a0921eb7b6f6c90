"""Locations as callers pass them: str or path objects."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import TypeAlias, Union

from loraformat.diagnostics import show
from loraformat.errors import StorageError, UsageError

# A folder, a file, or the address of a repository of the Hub; the last as text only.
Location: TypeAlias = Union[str, "os.PathLike[str]"]

# An address with a user or a password before the host, or a signature. Secret keys may hold slashes; the account of
# Azure has its container before an @.
_SECRET = re.compile(
    r"(s3|s3a|s3n|gs|gcs):/{1,2}(?!arn:[^/@]*(?:/|$))[^/]*[:@]"
    r"|(hf|https?):/{1,2}[^/]*@"
    r"|[a-z][a-z0-9+.-]+:/{1,2}[^/@]*:[^/@]*@"
    r"|[a-z][a-z0-9+.-]+:/{1,2}[^?]*\?(.*&)?(sig|signature|awsaccesskeyid|token|access_token|x-(amz|goog)-\w+)=",
    re.IGNORECASE,
)
_LONGEST = 200
_OF_STRENGTHS = 'write "PATH=0.7" for a strength other than 1'


def uri_of(location: Location) -> str:
    """A location as text.

    Raises: UsageError (LF021): it is neither text nor a path object, or a path object made of an address; a
        file: address of another machine. StorageError: an address with credentials in it, which are not repeated.
    """
    if not isinstance(location, (str, os.PathLike)):
        raise UsageError(f"expected a path, as str or os.PathLike, found {type(location).__name__}")
    text: object = os.fspath(location)
    if not isinstance(text, str):
        raise UsageError(f"expected a path as str, found {type(text).__name__}")
    if _SECRET.match(text):
        hint = "pass credentials the way the service's own tools do, and treat these as leaked"
        raise StorageError("an address must not contain credentials", where=f"{text.partition(':')[0]}://…", hint=hint)
    joined = re.match(r"(hf|s3|gs|az|abfs):(/(?!/)|\\)", text)
    if joined is not None:
        rest = text[joined.end() :].replace("\\", "/")  # pathlib of Windows turns the slashes, too
        address = f"{joined[1]}://{rest}"
        raise UsageError(
            "no such path: pathlib merges the two slashes of an address",
            where=show(text),
            hint=f'pass "{show(address)}"',
        )
    return _path_of(text) if text[:6].lower() == "file:/" else text


def _path_of(text: str, *, has_drives: bool = os.name == "nt") -> str:
    """The path that a file: address means. Raises: UsageError: it names another machine."""
    from urllib.parse import unquote

    host, slash, path = text[7:].partition("/") if text.startswith("//", 5) else ("", "/", text[6:])
    if host not in ("", "localhost") or not slash:
        raise UsageError("a file: address of another machine", where=show(text), hint="file:///path")
    path = unquote(path)
    return path if has_drives and path[1:2] == ":" else f"/{path}"


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
