"""The writer of a read-only format, which refuses."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.diagnostics import Finding
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.kit.base import DEFAULT_OPTIONS, WriteOptions
from loraformat.formats.kit.losses import unsupported_update
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle

WRITES = False
CONTAINERS: tuple[str, ...] = ()
HOLDS: tuple[str, ...] = ()
LOSES = ""


def losses(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:  # noqa: ARG001
    """One error: there is no writer."""
    yield unsupported_update("", "an adapter", "a read-only format")


def write(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:  # noqa: ARG001
    """Raises: UnsupportedUpdate (LF013), always."""
    raise UnsupportedUpdate(
        "loraformat reads this format but does not write it", hint="run loraformat formats to list those that it writes"
    )
