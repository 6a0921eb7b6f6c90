"""The interface of a format: a module with a NAME, and sniff, read, losses and write. All pure: no disk, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from loraformat.budget import Budget
from loraformat.diagnostics import Finding
from loraformat.model.adapter import Adapter
from loraformat.model.assumptions import Assumptions
from loraformat.model.bundle import Bundle, Json
from loraformat.model.patterns.keys import is_end_of


@dataclass(frozen=True, slots=True)
class Match:
    """Why a bundle looks like a format.

    Attributes:
        certain: the tell-tale is conclusive; uncertain matches count only where no format is certain.
        reason: shown to the user: "adapter_config.json has peft_type".
    """

    certain: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints(Assumptions):
    """What the caller knows and the files do not say (`--assume`, `--alpha`, `--base`).

    Attributes:
        weights: names of the base's tensors with their shapes, from `--base`.
        components: of the base, where it is a pipeline: the first parts of the names in `weights`.
        is_partial: whether a reader leaves out what it does not understand, and names it, rather than refuse the file
            (`--partial`).
        budget: the steps of the run; None for a reader that is used alone, and then makes one.
        config: config.json of the base, from `--base`.
        settings: of a base in a GGUF file, what its header says; else {}. Its tensors have llama.cpp's names.
    """

    weights: Mapping[str, tuple[int, ...]] | None = None
    components: tuple[str, ...] = ()
    is_partial: bool = False
    budget: Budget | None = None
    config: Mapping[str, Json] = field(default_factory=dict)
    settings: Mapping[str, Json] = field(default_factory=dict)

    @property
    def all_transposed(self) -> bool | None:
        """Whether the base stores all weights as (in, out); None where nobody says, or it is so of some modules."""
        return None if isinstance(self.fan_in_fan_out, tuple) else self.fan_in_fan_out

    @property
    def transposed(self) -> tuple[str, ...] | None:
        """The modules that are stored as (in, out), by their ends; None where nobody names them."""
        return self.fan_in_fan_out if isinstance(self.fan_in_fan_out, tuple) else None

    def is_transposed(self, module: str) -> bool | None:
        """Whether the base stores the weight of a module as (in, out); None where nobody says."""
        if self.transposed is None:
            return self.all_transposed
        return any(is_end_of(name, module) for name in self.transposed)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """What the caller wants of a writer.

    Attributes:
        container: "safetensors" or "torch", where the format leaves the choice; None for the format's default.
        peft_version: (major, minor) of the oldest PEFT that must read the output and compute the same, or None.
        base: what is known of the base, for formats that have its names in their own words.
        modelfile: what Ollama calls the base, where a Modelfile is wanted beside the adapter; else "".
    """

    container: str | None = None
    peft_version: tuple[int, int] | None = None
    base: Hints = Hints()
    modelfile: str = ""


NO_HINTS = Hints()
DEFAULT_OPTIONS = WriteOptions()


# What an adapter may hold, as the conversion matrix has it; what no low-rank update is, by the `family` of its kind.
CONTENTS = {
    "linear": "low-rank updates of linear layers",
    "embedding": "low-rank updates of embeddings",
    "convolution": "low-rank updates of convolutions",
    "dora": "DoRA magnitudes",
    "bias": "trained biases",
    "full weights": "weights that replace the base's, including resized tables",
    "trained rows": "some rows of a table",
    "dense delta": "a matrix as large as the weight, added to it",
    "experts": "stacks of low-rank updates, one for each expert",
    "init subtracted from the base (PiSSA, OLoRA)": "what an initialization subtracted from the base; also "
    "KaSA and OSF",
    "LoHa/LoKr": "Hadamard and Kronecker products of factors",
    "multiplicative (IA3, OFT …)": "updates that multiply the weight or are computed from it",
}


class Format(Protocol):
    """A module satisfies it; no classes, no inheritance.

    Attributes:
        NAME, TITLE: as in `--to peft`, and in words.
        SPEC: where the format is described.
        WRITES: whether there is a writer; without one `losses` gives an error and `write` raises UnsupportedUpdate.
        CONTAINERS: of the weights that it writes, the default first.
        READS, HOLDS: what its reader makes and its writer can hold, in words of CONTENTS.
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
