"""Module names as rules with open numbers: `double_blocks.{}.img_attn.qkv` is three modules of diffusers.

The table is made by tests/derive_families.py; tests/upstream/test_families.py holds it against diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

from loraformat.naming.tables import table

DIFFUSERS, ORIGINAL = "diffusers", "original"

# The parts of a pipeline that adapters change, by their folders in diffusers.
COMPONENTS = (
    *("unet", "transformer", "transformer_2", "prior", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("text_encoder_4", "image_encoder"),
)
_TEXT_ENCODERS = ("clip", "t5")
_OPEN = "#"
# No model has a million blocks; "01" would be a second spelling of block 1.
_MOST_DIGITS = 6


class Spelled(NamedTuple):
    """A module path without its numbers, and the numbers: what a rule is looked up by."""

    shape: str
    numbers: tuple[str, ...]


def spelled(path: str, separator: str = ".") -> Spelled:
    """A path of a file, dotted or flattened (`_`), taken apart.

    >>> spelled("double_blocks.7.img_mlp.0")
    Spelled(shape='double_blocks.#.img_mlp.#', numbers=('7', '0'))
    >>> spelled("double_blocks_7_img_mlp_0", "_")
    Spelled(shape='double_blocks_#_img_mlp_#', numbers=('7', '0'))
    """
    parts = path.split(separator)
    numbers = tuple(part for part in parts if _is_number(part))
    if not numbers:
        return Spelled(path, ())
    return Spelled(separator.join(_OPEN if _is_number(part) else part for part in parts), numbers)


def _is_number(part: str) -> bool:
    is_plain = part.isdecimal() and part.isascii() and len(part) <= _MOST_DIGITS
    return is_plain and (part == "0" or part[0] != "0")


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the original, and the modules of diffusers that its rows are split into.

    Attributes:
        original: with `{}` for open numbers: "double_blocks.{}.img_attn.qkv".
        diffusers: one name, or one for each part in the order of the rows; numbers as in `original`.
        rows: rows of each part in units of the module's inputs, where that is so in every model; else ().
        is_swapped: whether the two halves of the rows stand in the other order in diffusers: (shift, scale) in the
            original, (scale, shift) there. Only where the rows are twice the inputs.
        parameters: what the original calls its `weight` and `bias`, where it has other names: "in_proj_weight".
    """

    original: str
    diffusers: tuple[str, ...]
    rows: tuple[Fraction, ...] = ()
    is_swapped: bool = False
    is_whole: bool = True
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module of a file stands in its family.

    Attributes:
        part: which part of the module, for a name of diffusers; None for all of it, by its original name.
        numbers: of the blocks, in the order of the rule.
    """

    module: Module
    part: int | None
    numbers: tuple[str, ...]

    @property
    def original(self) -> str:
        """The module's own name in the original."""
        return self.module.original.format(*self.numbers)

    @property
    def diffusers(self) -> tuple[str, ...]:
        """The names in diffusers: of the part, or of all parts."""
        names = self.module.diffusers if self.part is None else self.module.diffusers[self.part : self.part + 1]
        return tuple(name.format(*self.numbers) for name in names)

    def parameter(self, name: str) -> str:
        """What the original calls a parameter of diffusers, `weight` or `bias`."""
        return self.module.parameters.get(name, name)

    @property
    def is_same(self) -> bool:
        """Whether both namings call it the same and store the same."""
        return self.module.diffusers == (self.module.original,)


class _Rule(NamedTuple):
    literals: tuple[str | None, ...]  # a number that must stand there, None for an open one
    module: Module
    part: int | None


_Index = Mapping[str, "list[_Rule]"]


@dataclass(frozen=True, slots=True)
class Family:
    """The models whose modules have the same names, whatever their sizes and counts of blocks.

    Attributes:
        name, title: "flux2"; in words.
        component: folder in a pipeline of diffusers.
        classes: of diffusers or transformers that have these modules.
        kohya, comfy: which naming files for `lora_unet_` and `diffusion_model.` have: DIFFUSERS or ORIGINAL.
        modules: all modules with a weight.
    """

    name: str
    title: str
    component: str
    classes: tuple[str, ...]
    kohya: str
    comfy: str
    modules: tuple[Module, ...]
    _indexes: Mapping[tuple[str, str], _Index] = field(repr=False)

    def find(self, path: Spelled, naming: str, separator: str = ".") -> Place | None:
        """The module that a path names in one naming, dotted or flattened; None where the family has none.

        >>> family_named("flux").find(spelled("double_blocks_7_img_mlp_0", "_"), ORIGINAL, "_").diffusers
        ('transformer_blocks.7.ff.net.0.proj',)
        """
        for rule in self._indexes[naming, separator].get(path.shape, ()):
            if len(rule.literals) == len(path.numbers):
                pairs = list(zip(rule.literals, path.numbers, strict=True))
                if all(literal in (None, number) for literal, number in pairs):
                    return Place(rule.module, rule.part, tuple(number for literal, number in pairs if literal is None))
        return None


@cache
def families() -> Mapping[str, Family]:
    """All families by name, those of the denoisers first."""
    return {name: _family(name, each) for name, each in table("families/families.json").items()}


def denoisers() -> tuple[Family, ...]:
    """The families of U-Nets and transformers."""
    return tuple(each for each in families().values() if each.name not in _TEXT_ENCODERS)


def text_encoders() -> tuple[Family, ...]:
    """The families of text encoders."""
    return tuple(families()[name] for name in _TEXT_ENCODERS)


def family_named(name: str) -> Family:
    """The family of a name of the table."""
    return families()[name]


def likeliest(paths: Iterable[Spelled], among: Sequence[Family]) -> tuple[int, Family, str] | None:
    """(how many paths it has, the family that has most of them, in which naming); None where none has any.

    >>> likeliest([spelled("double_blocks.7.img_mod.lin")], denoisers())[1].name
    'flux'
    """
    every, best = list(paths), None
    for family in among if every else ():
        for naming in (DIFFUSERS, ORIGINAL):
            count = sum(family.find(path, naming) is not None for path in every)
            if count and (best is None or count > best[0]):
                best = (count, family, naming)
    return best


def _family(name: str, value: Mapping[str, Any]) -> Family:
    modules = tuple(
        Module(
            line["original"],
            tuple(line["diffusers"]),
            tuple(map(Fraction, line.get("rows", ()))),
            line.get("swapped", False),
            parameters=line.get("parameters", {}),
        )
        for line in value["modules"]
    )
    rules: dict[str, list[tuple[str, Module, int | None]]] = {
        ORIGINAL: [(module.original, module, None) for module in modules],
        DIFFUSERS: [(part, module, number) for module in modules for number, part in enumerate(module.diffusers)],
    }
    for naming, found in rules.items():
        known = {template: (module, part) for template, module, part in found}
        found.extend((alias, *known[name]) for alias, name in value["aliases"].items() if name in known)
        rules[naming] = found
    rules[ORIGINAL].extend(
        (name, Module(name, tuple(parts), is_whole=False), None) for name, parts in value["partial"].items()
    )
    return Family(
        name,
        value["title"],
        value["component"],
        tuple(value["classes"]),
        value["kohya"],
        value["comfy"],
        modules,
        {(naming, separator): _index(found, separator) for naming, found in rules.items() for separator in (".", "_")},
    )


def _index(rules: list[tuple[str, Module, int | None]], separator: str) -> dict[str, list[_Rule]]:
    index: dict[str, list[_Rule]] = {}
    for template, module, part in rules:
        names = list(_components(template, separator))
        literals = tuple(None if name == "{}" else name for name in names if name == "{}" or _is_number(name))
        shape = separator.join(_OPEN if name == "{}" or _is_number(name) else name for name in names)
        index.setdefault(shape, []).append(_Rule(literals, module, part))
    return index


def _components(template: str, separator: str) -> Iterator[str]:
    yield from (template if separator == "." else template.replace(".", "_")).split(separator)
