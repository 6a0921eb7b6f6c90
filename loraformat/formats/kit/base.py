"""What a format is: a module with a NAME, and sniff, read, losses and write. All of it pure: no disk, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from loraformat.budget import Budget
from loraformat.diagnostics import Finding, show
from loraformat.errors import UsageError
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

    It fills gaps and never contradicts: where the file says otherwise the reader raises AssumptionContradicted (LF024).

    Attributes:
        alpha, rank, scale: as in alpha / rank; `scale` is the factor itself.
        fan_in_fan_out: whether the base stores weights as (in, out).
        transposed: the modules of which that is so, by their ends, where it is not so of all; None where nobody says.
        enable_lora: which of the equal parts of a joined layer are adapted: (True, False, True) for query and value.
        task: the task whose class the adapter was trained on, in PEFT's word: "SEQ_CLS".
        weights: names of the base's tensors with their shapes, from `--base`.
        budget: the steps of the run; None for a reader that is used alone, and then makes one.
    """

    alpha: float | None = None
    rank: int | None = None
    scale: float | None = None
    fan_in_fan_out: bool | None = None
    transposed: tuple[str, ...] | None = None
    enable_lora: tuple[bool, ...] | None = None
    task: str | None = None
    weights: Mapping[str, tuple[int, ...]] | None = None
    budget: Budget | None = None

    def is_transposed(self, module: str) -> bool | None:
        """Whether the base stores the weight of a module as (in, out); None where nobody says."""
        if self.transposed is None:
            return self.fan_in_fan_out
        return any(f".{module}".endswith(f".{name}") for name in self.transposed)

    def __post_init__(self) -> None:
        """Raises: UsageError (LF021): alpha or scale is not a finite number."""
        for name in ("alpha", "scale"):
            value: object = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise UsageError(f"expected a finite number, found {show(value, 40)}", where=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """What the caller wants of a writer.

    Attributes:
        container: "safetensors" or "torch", where the format leaves the choice; None for the format's default.
        peft_version: (major, minor) of the oldest PEFT that must read the output and compute the same, or None.
    """

    container: str | None = None
    peft_version: tuple[int, int] | None = None


NO_HINTS = Hints()
DEFAULT_OPTIONS = WriteOptions()


# What an adapter may hold, as the conversion matrix has it.
KINDS = {
    "linear": "low-rank updates of linear layers",
    "embedding": "low-rank updates of embeddings",
    "convolution": "low-rank updates of convolutions",
    "dora": "DoRA magnitudes",
    "bias": "trained biases",
    "replacement": "whole weights, resized tables among them",
    "rows": "trained rows of tables",
    "difference": "dense differences",
    "experts": "stacks of low-rank updates, one for each expert",
    "from-base": "what PiSSA, OLoRA and KaSA took off the base",
    "product": "LoHa and LoKr",
    "factor": "updates that multiply (IA3, OFT and others)",
}


class Format(Protocol):
    """A module satisfies it; no classes, no inheritance.

    Attributes:
        NAME, TITLE: as in `--to peft`, and in words.
        SPEC: where the format is described.
        WRITES: whether there is a writer; without one `losses` gives an error and `write` raises UnsupportedUpdate.
        CONTAINERS: of the weights that it writes, the default first.
        READS, HOLDS: what its reader makes and its writer can hold, in words of KINDS.
        LOSES: what every conversion into it loses, in words; "" for nothing.
    """

    NAME: str
    TITLE: str
    SPEC: str
    WRITES: bool
    CONTAINERS: tuple[str, ...]
    READS: tuple[str, ...]
    HOLDS: tuple[str, ...]
    LOSES: str

    def sniff(self, bundle: Bundle) -> Match | None:
        """Whether the files look like this format, by names, headers and small JSON only."""

    def read(self, bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
        """The adapter. Raises FormatError or ContainerError only where it cannot go on; the rest are notes."""

    def losses(self, adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:
        """What `write` would not express (LF7). An error-level one means: writing would change the model, so refuse."""

    def write(self, adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:
        """The files, lazily: JsonFile, TensorFile and RawFile whose values arrive when they are saved."""
