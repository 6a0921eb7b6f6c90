"""State-dict dumps of hand-written LoRA code: one file, any spelling, either orientation. Read only."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.diagnostics import Finding
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.base import DEFAULT_OPTIONS, Match, WriteOptions
from loraformat.formats.dump.read import read, the_file
from loraformat.formats.dump.spelling import pairs_of
from loraformat.formats.findings import unsupported_update
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle

NAME = "dump"
TITLE = "a state dict of hand-written LoRA code in one .pt, .pth, .bin or .safetensors file"
SPEC = "docs/formats/dump.md"
WRITES = False

__all__ = ["NAME", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write"]


def sniff(bundle: Bundle) -> Match | None:
    """A single tensor file, or the only one of a folder, in which factors come in pairs; opens its header.

    A folder with an adapter_config.json is another tool's: what its factors mean stands there.
    """
    file = the_file(bundle)
    if file is None or "adapter_config.json" in bundle.files:
        return None
    pairs, _ = pairs_of(file.open().entries)
    if not pairs:
        return None
    first = min(pairs)
    return Match(certain=False, because=f"{file.name} has factors for {len(pairs)} modules, first {first}")


def losses(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:  # noqa: ARG001
    """One error: there is no writer."""
    yield unsupported_update(
        "", "an adapter", "a dump, which states neither alpha nor base: nothing should write more of them"
    )


def write(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:  # noqa: ARG001
    """Raises: UnsupportedUpdate (LF013), always."""
    raise UnsupportedUpdate("dumps are read, not written", hint="write native or peft")
