"""The interface of a PEFT tuner: its tensor names, and a function from the tensors of a module to updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from loraformat.budget import Budget
from loraformat.diagnostics import in_file, in_weights
from loraformat.errors import FormatError, UnsupportedUpdate
from loraformat.formats.kit.fields import (
    Config,
    as_text,
    as_texts,
    optional_boolean,
    optional_integer,
    optional_number,
)
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.patterns import Ends
from loraformat.model.tensors import DType, LazyTensor, rounded
from loraformat.model.updates import Update

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.patterns.matching import Matcher
    from loraformat.model.tensors import Values

Parts = Mapping[str, LazyTensor]
Chains = dict[str, tuple[Update, ...]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """An adapter, as far as the reader of one of its modules needs it.

    Attributes:
        raw: adapter_config.json.
        shared: tensors that belong to all modules, by name.
        layers: module → part → tensor, all modules.
        weights: names and stored shapes of the base's tensors, or None where there is no base.
        budget: the steps of the run.
    """

    raw: Config
    shared: Parts
    layers: Mapping[str, Parts]
    weights: Mapping[str, tuple[int, ...]] | None = None
    budget: Budget = field(default_factory=Budget)

    @cached_property
    def feedforward(self) -> Matcher | None:
        """`feedforward_modules` of IA3, where it is a regular expression."""
        from loraformat.model.patterns.matching import Matcher

        named = self.raw.get("feedforward_modules")
        return Matcher(named, self.budget) if isinstance(named, str) else None

    @cached_property
    def feedforward_names(self) -> Ends:
        """`feedforward_modules` of IA3, where it is a list of names."""
        named, where = self.raw.get("feedforward_modules"), in_file(CONFIG, "feedforward_modules")
        return Ends(() if named is None else as_texts(named, where))

    def number(self, name: str, default: float) -> float:
        """A number of the config."""
        found = optional_number(self.raw, name, CONFIG)
        return default if found is None else found

    def integer(self, name: str, default: int, low: int = 1, high: int = 2**53) -> int:
        """An integer of the config, from `low` to `high`."""
        found = optional_integer(self.raw, name, CONFIG, low, high)
        return default if found is None else found

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A boolean of the config."""
        found = optional_boolean(self.raw, name, CONFIG)
        return default if found is None else found

    def text(self, name: str, default: str) -> str:
        """A string of the config."""
        found = self.raw.get(name)
        return default if found is None else as_text(found, in_file(CONFIG, name))

    def shape(self, module: str, *, out: int | None = None, into: int | None = None) -> tuple[int, int]:
        """(out, in) of the module's weight in the base; what is known of it decides how it is stored.

        Without anything known it is taken as stored, or transposed where the config says `fan_in_fan_out`.

        Raises: UnsupportedUpdate (LF013): no base was given, or it has no such matrix.
        """
        stored = self._stored(module)
        if out is None and into is None:
            return (stored[1], stored[0]) if self.flag("fan_in_fan_out") else stored
        for rows, cols in (stored, stored[::-1]):
            if out in (None, rows) and into in (None, cols):
                return rows, cols
        known = f"{out or 'any'} x {into or 'any'}"
        raise UnsupportedUpdate(
            f"the update is {known}, the base weight {stored[0]} x {stored[1]}", where=in_weights(module)
        )

    def _stored(self, module: str) -> tuple[int, int]:
        if self.weights is None:
            raise UnsupportedUpdate(
                "only the base has the shape of the update",
                where=in_weights(module),
                hint="pass the base with --base",
            )
        name = f"{module}.weight"
        shape = self.weights.get(name)
        if shape is None:
            ends = {found for other, found in self.weights.items() if other.endswith(f".{name}")}
            shape = ends.pop() if len(ends) == 1 else None
        if shape is None or len(shape) != 2:
            raise UnsupportedUpdate(
                f"the base has no matrix {name}, whose shape the update needs", where=in_weights(module)
            )
        return shape[0], shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """One kind of adapter.

    Attributes:
        parts: end of a tensor's name → how many axes it may have; () for any number.
        read: (source, module, its parts) → updates by weight; none where a part is missing.
        settings: fields of the config that it knows, beside those of all adapters.
        shared: name of a tensor that belongs to all modules → how many axes it has. A name that ends with a dot is how
            the names of a family of them begin.
        empty: those names of `parts` and `shared` whose tensors may be without values.
        check: raises UnsupportedUpdate (LF013) where the adapter as a whole cannot be read.
    """

    parts: Mapping[str, tuple[int, ...]]
    read: Callable[[Source, str, Parts], Chains]
    settings: tuple[str, ...] = ()
    shared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    empty: tuple[str, ...] = ()
    check: Callable[[Source], None] | None = None


def computed(shape: tuple[int, ...], value: Callable[[], Values]) -> LazyTensor:
    """A tensor of float32 whose values are computed, as a whole, each time they are loaded.

    Args:
        value: gives a tensor of `shape`, in float64 so that one rounding remains.
    """
    return _computed(shape, DType.F32, value)


def exact(shape: tuple[int, ...], value: Callable[[], Values]) -> LazyTensor:
    """A tensor as `computed`, but of float64: a sum with 1, say, of which float32 would lose the smaller part."""
    return _computed(shape, DType.F64, value)


def _computed(shape: tuple[int, ...], dtype: DType, value: Callable[[], Values]) -> LazyTensor:
    def read(start: int, stop: int) -> Values:
        import numpy as np

        with np.errstate(all="ignore"):  # infinities and NaN are judged by whoever reads
            return rounded(value()[start:stop], dtype)

    return LazyTensor(shape, dtype, read)


def integers(tensor: LazyTensor) -> NDArray[np.int64]:
    """All values of a tensor of integers."""
    import numpy as np

    return tensor.load().astype(np.int64)


def require(claim: bool, module: str, message: str) -> None:
    """Raise FormatError (LF012) where tensors of a module do not fit each other."""
    if not claim:
        raise FormatError(message, where=in_weights(module))
