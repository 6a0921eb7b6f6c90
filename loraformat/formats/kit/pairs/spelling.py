"""How code spells its factors, and which names make a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loraformat.model.tensors import LazyTensor


@dataclass(frozen=True, slots=True)
class Spelling:
    """The ends of the names of A and B, and whether they say that the module is an embedding."""

    a: str
    b: str
    is_embedding: bool = False


MINLORA = (Spelling(".parametrizations.weight.0.lora_A", ".parametrizations.weight.0.lora_B"),)
RASCHKA = (Spelling(".lora.A", ".lora.B"),)
MINIMIND = (Spelling(".lora.A.weight", ".lora.B.weight"),)
LORALIB = (Spelling(".lora_A", ".lora_B"),)

_STEMS = (
    *MINLORA,
    Spelling(".lora.lora_A", ".lora.lora_B"),
    Spelling(".lora.lora_a", ".lora.lora_b"),
    Spelling(".lora_embedding_A", ".lora_embedding_B", is_embedding=True),
    *RASCHKA,
    Spelling(".lora.a", ".lora.b"),
    *LORALIB,
    Spelling(".lora_a", ".lora_b"),
    Spelling(".lora_down", ".lora_up"),
    Spelling(".lora.down", ".lora.up"),
)
_TAILS = (".default.weight", ".weight", "")

# Longest first: ".lora.lora_A" also ends in ".lora_A".
EVERY = tuple(Spelling(f"{stem.a}{tail}", f"{stem.b}{tail}", stem.is_embedding) for tail in _TAILS for stem in _STEMS)

# Where wrappers keep the weight that they adapt.
_COPIES = (
    ".linear.weight",
    ".original_layer.weight",
    ".base_layer.weight",
    ".parametrizations.weight.original",
    ".weight",
)
_INNER = (".linear.", ".original_layer.", ".base_layer.", ".conv.")

# Prefixes of wrappers that say nothing about the module.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PEFT = "base_model.model."


@dataclass(slots=True)
class Pair:
    """The factors of one module as the file has them.

    Attributes:
        a, b: the tensors; None where one is missing.
        names: their names in the file.
        is_embedding: the spelling says so.
        base_shape: shape of the adapted weight, where the file holds a copy.
    """

    a: LazyTensor | None = None
    b: LazyTensor | None = None
    names: list[str] = field(default_factory=list)
    is_embedding: bool = False
    base_shape: tuple[int, ...] | None = None

    @property
    def factors(self) -> tuple[LazyTensor, LazyTensor]:
        """(a, b) of a complete pair."""
        assert self.a is not None
        assert self.b is not None
        return self.a, self.b


def clean(name: str) -> str:
    """A tensor name without what wrappers of training code put there: `_orig_mod.`, `module.`, PEFT's prefix."""
    path = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    path = path.rpartition(_PEFT)[2]
    return path.removeprefix("module.")


def pairs_of(
    entries: Mapping[str, LazyTensor], spellings: Sequence[Spelling] = EVERY
) -> tuple[dict[str, Pair], dict[str, str]]:
    """(module path → its factors, name → module for copies of the adapted weights)."""
    pairs: dict[str, Pair] = {}
    for name, tensor in entries.items():
        found = _factor(clean(name), spellings)
        if found is None:
            continue
        module, side, is_embedding = found
        pair = pairs.setdefault(module, Pair(is_embedding=is_embedding))
        pair.names.append(name)
        if side == 0:
            pair.a = tensor
        else:
            pair.b = tensor
    copies: dict[str, str] = {}
    named = {clean(name): name for name in entries}
    for module, pair in pairs.items():
        for ending in _COPIES:
            copy = named.get(f"{module}{ending}")
            if copy is not None:
                pair.base_shape = entries[copy].shape
                copies[copy] = module
    return pairs, copies


def are_loralib(entries: Mapping[str, LazyTensor]) -> bool:
    """Whether all pairs are spelled `.lora_A` and `.lora_B`, and each can be loralib's by its shapes."""
    pairs, _ = pairs_of(entries, LORALIB)
    is_only = bool(pairs) and pairs.keys() == pairs_of(entries, EVERY)[0].keys()
    return is_only and all(is_loralib(pair) for pair in pairs.values())


def is_loralib(pair: Pair) -> bool:
    """Whether the shapes are loralib's: A (rank · parts, in), B (out, rank) with a rank that is the shorter axis."""
    if pair.a is None or pair.b is None:
        return True
    a, b = (factor.shape for factor in pair.factors)
    if len(a) != 2 or len(b) != 2 or not b[1] or a[0] % b[1]:
        return False
    is_transposed_too = a[1] == b[0] and a[1] < a[0]
    return b[1] <= b[0] and not is_transposed_too


def _factor(name: str, spellings: Sequence[Spelling]) -> tuple[str, int, bool] | None:
    """(module path, 0 for A or 1 for B, whether it is an embedding's), or None for another tensor."""
    for spelling in spellings:
        for side, ending in enumerate((spelling.a, spelling.b)):
            if name.endswith(ending) and len(name) > len(ending):
                return name.removesuffix(ending), side, spelling.is_embedding
    return None


def weight_name(name: str, modules: Sequence[str]) -> str:
    """What the base calls a tensor beside the factors: without the wrapper's own layer in the path."""
    path = clean(name)
    for inner in _INNER:
        owner, found, parameter = path.rpartition(inner)
        if found and owner in modules and "." not in parameter:
            return f"{owner}.{parameter}"
    return path
