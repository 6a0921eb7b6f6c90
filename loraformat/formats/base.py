"""What a format is: a module with a NAME, and sniff, read, losses and write. All of it pure: no disk, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from loraformat.diagnostics import Finding
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Match:
    """Why a bundle looks like a format.

    Attributes:
        certain: the tell-tale is conclusive; uncertain matches count only where no format is certain.
        because: shown to the user: "adapter_config.json has peft_type".
    """

    certain: bool
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What the caller knows and the files do not say (`--assume`, `--alpha`, `--base`).

    It fills gaps and never contradicts: where the file says otherwise the reader raises ConfigError (LF103).

    Attributes:
        alpha, rank, scale: as in alpha / rank; `scale` is the factor itself.
        fan_in_fan_out: whether the base stores weights as (in, out).
        weights: names of the base's tensors with their shapes, from `--base`.
    """

    alpha: float | None = None
    rank: int | None = None
    scale: float | None = None
    fan_in_fan_out: bool | None = None
    weights: Mapping[str, tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """What the caller wants of a writer.

    Attributes:
        container: "safetensors" or "torch", where the format leaves the choice; None for the format's default.
    """

    container: str | None = None


NO_HINTS = Hints()
DEFAULT_OPTIONS = WriteOptions()


class Format(Protocol):
    """A module satisfies it; no classes, no inheritance.

    Attributes:
        NAME, TITLE: as in `--to peft`, and in words.
        SPEC: where the format is described.
        WRITES: whether there is a writer; without one `losses` gives an error and `write` raises UnsupportedUpdate.
    """

    NAME: str
    TITLE: str
    SPEC: str
    WRITES: bool

    def sniff(self, bundle: Bundle) -> Match | None:
        """Whether the files look like this format, by names, headers and small JSON only."""

    def read(self, bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
        """The adapter. Raises FormatError or ContainerError only where it cannot go on; the rest are notes."""

    def losses(self, adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:
        """What `write` would not express (LF7). An error-level one means: writing would change the model, so refuse."""

    def write(self, adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:
        """The files, lazily: JsonFile, TensorFile and RawFile whose values arrive when they are saved."""
