"""s3://bucket/prefix addresses, normalized."""

from __future__ import annotations

import re
from typing import NamedTuple

from loraformat.diagnostics import show
from loraformat.errors import StorageError

SCHEME = "s3://"
# Outputs that a run has not finished, for processes that write files into them; see `location_of`.
UNFINISHED = "s3+unfinished://"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_WORD = re.compile(r"[0-9a-f]{8,64}")
_MOST_KEY_NBYTES = 900  # S3 allows 1024; names of files come after the prefix
_FORM = "s3://bucket/prefix"


class Address(NamedTuple):
    """A bucket and the prefix of a folder or the key of one object, without slashes around it; "" for all of it."""

    bucket: str
    path: str

    @property
    def uri(self) -> str:
        """The address as text."""
        return f"{SCHEME}{self.bucket}/{self.path}" if self.path else f"{SCHEME}{self.bucket}"

    @property
    def prefix(self) -> str:
        """What the keys of the files of this folder begin with."""
        return f"{self.path}/" if self.path else ""

    def key(self, name: str) -> str:
        """The key of a file of this folder."""
        return f"{self.prefix}{name}"

    def below(self, name: str) -> Address:
        """A subfolder."""
        return Address(self.bucket, self.key(name))


def parsed(uri: str) -> Address:
    """The address that a URI spells.

    Raises: StorageError: it is not s3://bucket/prefix, or holds credentials, which are not repeated.
    """
    rest = uri[len(SCHEME) :]
    bucket, _, path = rest.partition("/")
    if bucket.lower().startswith("arn:") and "@" not in bucket:
        hint = "use the name of the bucket, or the alias of the access point"
        raise StorageError("ARNs of access points are not supported", where=f"{SCHEME}arn:…", hint=hint)
    if "@" in bucket or ":" in bucket:
        raise StorageError(
            "an address must not contain credentials",
            where=SCHEME + "…",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and treat these as leaked",
        )
    if _BUCKET.fullmatch(bucket) is None:
        raise StorageError(f'"{show(bucket, 80)}" is not the name of a bucket', where=show(uri), hint=_FORM)
    path = path.rstrip("/")
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        text = 'a prefix with an empty part, "." or ".." in it, which object stores do not resolve'
        raise StorageError(text, where=show(uri), hint=_FORM)
    if len(path.encode("utf-8", "surrogateescape")) > _MOST_KEY_NBYTES or not _is_text(path):
        raise StorageError("not a valid prefix: too long, or not valid text", where=show(uri), hint=_FORM)
    return Address(bucket, path)


def normalized(uri: str) -> str:
    """An address in its one spelling. Raises: StorageError: see `parsed`."""
    return parsed(uri).uri


def location_of(address: Address, word: str) -> str:
    """The URI of an unfinished output, which has a word of its own."""
    return f"{UNFINISHED}{word}/{address.uri[len(SCHEME) :]}"


def parsed_location(location: str) -> tuple[Address, str]:
    """The address of an unfinished output, and its word. Raises: StorageError: it is not a location."""
    word, _, rest = location[len(UNFINISHED) :].partition("/")
    if _WORD.fullmatch(word) is None:
        raise StorageError("not the location of an unfinished output", where=show(location))
    return parsed(f"{SCHEME}{rest}"), word


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in path
