"""Where a weight of the trained model stands in the files of a base, told from names, shapes and config.json.

Source: transformers 5.23.0, core_model_loading.py, modeling_utils.py, pytorch_utils.py `Conv1D`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from loraformat.merger.verify.reference.ties import Table
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.updates import LowRank, Replace, Rotated, Rows, Scaled, Update
from loraformat.naming import Spelled, spelling_of, task_classes, tied_names

# Layers of the class Conv1D, which stores (in, out), in the models that have them.
_CONV1D = {"c_attn", "c_proj", "c_fc"}
_CONV1D_OF = {
    **dict.fromkeys(("gpt2", "imagegpt", "decision_transformer"), _CONV1D | {"q_attn"}),
    **dict.fromkeys(("openai-gpt", "clvp", "clvp_decoder"), _CONV1D),
}
# Lookups of names, in all, in the search for a prefix.
_MOST_LOOKUPS = 5_000_000
# Models whose stacked experts are (experts, in, out).
_TRANSPOSED_EXPERTS = {"gpt_oss"}


class NotFollowed(Exception):
    """The reference cannot tell where an update lands."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a weight that stand in one tensor, counted as they are stored.

    Attributes:
        tensor: name in the base.
        first: the first of them in the weight, in the matrix of its expert where it is a stack.
        count: how many.
        at: where the first of them stands in the tensor, whose leading axes count as one.
        expert: whose matrix it is.
    """

    tensor: str
    count: int
    first: int = 0
    at: int = 0
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """A weight in the files of a base.

    Attributes:
        shape: of the weight, as it is stored.
        runs: where its rows stand; () for one whole tensor.
        tensor: that tensor.
        is_transposed: whether the loaded model has the transpose.
    """

    shape: tuple[int, ...]
    runs: tuple[Run, ...] = ()
    tensor: str = ""
    is_transposed: bool = False


class Sites:
    """The names of a base, as it stores them and as the loaded model has them."""

    def __init__(
        self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Json], tables: Sequence[Table]
    ) -> None:
        self._tensors, self._config, self._tables = tensors, config, tables
        self._spelling = spelling_of(config)

    @property
    def is_known(self) -> bool:
        """Whether config.json names a class whose names are known."""
        return tied_names(self._config) is not None

    @cached_property
    def names(self) -> Sequence[str]:
        """All names that a weight may have here."""
        return list(dict.fromkeys((*self._tensors, *self._in_memory)))

    def find(self, weight: str) -> Site | None:
        """Where a weight stands, or None where no tensor is it."""
        if weight in self._tensors:
            return Site(self._tensors[weight].shape, tensor=weight)
        for table in self._tables:
            if weight in table.names:
                return Site(self._tensors[table.stored].shape, tensor=weight)
        *path, last = weight.split(".")
        inner = ".".join([*path, "base_layer", last])
        if inner in self._tensors:
            return Site(self._tensors[inner].shape, tensor=inner)
        if not self._spelling.rules:
            return None
        known = self._in_memory.get(weight) or self._by_older_name(weight) or self._head(weight)
        if known is None and self._spelling.prefix:  # renamed into the bare model, of which the class has it outside
            return self._in_memory.get(f"{self._spelling.prefix}.{weight}")
        return known

    @cached_property
    def _in_memory(self) -> Mapping[str, Site]:
        """Name in the loaded model → where its rows stand."""
        if not self._spelling.rules:
            return {}
        sources: dict[str, list[tuple[str, Spelled]]] = {}
        for name in self._tensors:
            spelled = self._spelling.in_memory(name)
            for target in spelled.names:
                sources.setdefault(target, []).append((name, spelled))
        found = {name: self._gathered(name, several) for name, several in sources.items()}
        return {name: site for name, site in found.items() if site is not None}

    def _gathered(self, name: str, several: list[tuple[str, Spelled]]) -> Site | None:
        kinds = {spelled.operation for _, spelled in several}
        if kinds in ({"join"}, {"experts"}):
            return self._laid_out(several, is_stack=kinds == {"experts"})
        if len(several) > 1:
            return None
        ((stored, spelled),) = several
        shape = self._tensors[stored].shape
        if kinds == {"split"}:
            parts = len(spelled.names)
            if not shape or not shape[0] or shape[0] % parts:
                return None
            rows = shape[0] // parts
            return Site((rows, *shape[1:]), (Run(stored, rows, at=rows * spelled.names.index(name)),))
        if kinds <= {"rename", "transpose"}:
            return Site(shape, tensor=stored, is_transposed=kinds == {"transpose"})
        return None

    def _laid_out(self, several: list[tuple[str, Spelled]], *, is_stack: bool) -> Site | None:
        """Tensors that the loaded model lays one below the other, for each expert where they are a stack."""
        sources: dict[tuple[int, int], str] = {}
        for name, spelled in several:
            sources[spelled.expert or 0 if is_stack else 0, spelled.source] = name
        count, height = several[0][1].sources, max((expert for expert, _ in sources), default=0) + 1
        if not len(sources) == len(several) == height * count:
            return None
        runs: list[Run] = []
        sizes = set()
        for expert in range(height):
            below = 0
            for source in range(count):
                name = sources[expert, source]
                rows, *cols = self._tensors[name].shape or (0,)
                runs.append(Run(name, rows, first=below, expert=expert if is_stack else None))
                below += rows
                sizes.add(tuple(cols))
            sizes.add((below, *cols))
        shape = max(sizes, key=len)
        if len(sizes) != 2 or not below:  # one shape of a row, and one of a matrix
            return None
        return Site((height, *shape) if is_stack else shape, tuple(runs))

    def _by_older_name(self, weight: str) -> Site | None:
        """A weight under a name of older checkpoints: renamed, one expert of a stack, or what is stored apart now."""
        spelled = self._spelling.in_memory(weight)
        homes = [self._in_memory.get(name) for name in spelled.names]
        whole = [home for home in homes if home is not None and not home.is_transposed]
        if len(whole) != len(homes):
            return None
        if spelled.operation == "rename" and spelled.names != (weight,):
            return whole[0] if len(whole[0].runs) <= 1 else None
        if spelled.operation == "experts" and whole[0].tensor and len(whole[0].shape) == 3:
            experts, rows, cols = whole[0].shape
            height = rows // spelled.sources
            if spelled.expert is None or spelled.expert >= experts or rows % spelled.sources:
                return None
            at = rows * spelled.expert + height * spelled.source
            return Site((height, cols), (Run(whole[0].tensor, height, at=at),))
        if spelled.operation == "split" and all(home.tensor and home.shape == whole[0].shape for home in whole):
            rows = whole[0].shape[0]
            runs = [Run(home.tensor, rows, first=rows * number) for number, home in enumerate(whole)]
            return Site((rows * len(runs), *whole[0].shape[1:]), tuple(runs))
        return None

    def _head(self, weight: str) -> Site | None:
        for table in self._tables:
            longer = [name for name in table.names if name.endswith(f".{weight}")]
            if len(longer) == 1 and longer[0] not in self._tensors:
                return Site(self._tensors[table.stored].shape, tensor=longer[0])
        return None


@dataclass(frozen=True, slots=True)
class Renaming:
    """What stands before all names of an adapter, and what the base has in its place."""

    here: str = ""
    there: str = ""

    def __call__(self, weight: str) -> str | None:
        """The name in the base; None for a weight that does not begin so."""
        return self.there + weight[len(self.here) :] if weight.startswith(self.here) else None


def renaming_of(adapter: Adapter, sites: Sites) -> Renaming:
    """The one prefix by which an adapter's names differ from the base's: more of it, less of it, or another one.

    Raises: NotFollowed: none fits, or several that lead to different tensors.
    """
    chains = {weight: chain for weight, chain in adapter.updates.items() if not may_be_absent(chain)}
    if not chains or any(sites.find(weight) for weight in chains):
        return Renaming()
    first = next(iter(chains))
    every: list[Renaming] = []
    left = _MOST_LOOKUPS
    for one in dict.fromkeys(_renamings(first, sites.names)):
        serves, looked_up = _serves(one, chains, sites)
        left -= looked_up
        if left < 0:
            raise NotFollowed(f"too many prefixes may lead from {first} to the base's names")
        every += [one] if serves else []
    plain = [one for one in every if not one.here or not one.there]
    others = [] if plain else [one for one in every if _is_around(one, chains, sites)]
    if not (plain or others or sites.is_known):
        others = [one for one in every if _is_likely(one, chains, sites)]
    found: dict[object, Renaming] = {}
    for one in plain or others:
        found.setdefault(tuple(sites.find(one(weight) or "") for weight in chains), one)
    if len(found) != 1:
        raise NotFollowed(f"{len(found)} prefixes lead from {first} to the base's names")
    return next(iter(found.values()))


def _renamings(weight: str, names: Iterable[str]) -> Iterator[Renaming]:
    parts = weight.split(".")
    cuts = [("".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])) for cut in range(len(parts) - 1)]
    for name in names:
        for head, tail in cuts:
            if name == tail or name.endswith(f".{tail}"):
                yield Renaming(head, name[: len(name) - len(tail)])
    for head, _ in cuts:  # where the loaded model's own name is a tied or an older one
        yield Renaming(head)


def _serves(renaming: Renaming, chains: Mapping[str, Sequence[Update]], sites: Sites) -> tuple[bool, int]:
    """Whether all weights are found so, and how many were looked for."""
    for number, weight in enumerate(chains, start=1):
        name = renaming(weight)
        if name is None or sites.find(name) is None:
            return False, number
    return True, len(chains)


def _is_around(renaming: Renaming, chains: Mapping[str, Sequence[Update]], sites: Sites) -> bool:
    """Whether two prefixes are one, but for the name of a language model inside of another model."""
    one, other = (re.sub(r"(^|\.)(?:(?:language|text)_model\.)+", r"\1", s) for s in (renaming.here, renaming.there))
    shapes = ((chain, sites.find(renaming(weight) or "")) for weight, chain in chains.items())
    return one == other and all(site is not None and fits(chain[0], site.shape) for chain, site in shapes)


def _is_likely(renaming: Renaming, chains: Mapping[str, Sequence[Update]], sites: Sites) -> bool:
    """Whether a prefix in the place of another keeps numbers of layers, sides of the model, and all shapes."""
    pair = (renaming.here, renaming.there)
    numbers = [re.findall(r"\d+", one) for one in pair]
    sides = [re.findall(r"encoder|decoder|text|vision", one) for one in pair]
    if numbers[0] != numbers[1] or set(sides[0]) != set(sides[1]):
        return False
    if any(name.startswith(renaming.here) for name in sites.names):
        return False
    shapes = ((chain, sites.find(renaming(weight) or "")) for weight, chain in chains.items())
    return all(site is not None and fits(chain[0], site.shape) for chain, site in shapes)


def may_be_absent(chain: Sequence[Update]) -> bool:
    """Whether a layer may lack the weight that is updated: a bias that is scaled or turned as the outputs are."""
    return all(isinstance(update, (Scaled, Rotated)) and update.is_bias for update in chain)


def fits(update: Update, shape: tuple[int, ...]) -> bool:
    """Whether an update in Linear orientation can be one of a weight of this shape; 0 is a size that is not known."""
    wanted = update.shape
    if isinstance(update, LowRank) and update.is_stack and len(shape) == 2:
        return False
    if len(wanted) != len(shape):
        flat = (shape[0], math.prod(shape[1:])) if shape else shape
        return len(wanted) == 2 and (_agree(wanted, flat) or (shape[:1] == (1,) and _agree(wanted, shape[1:])))
    return _agree(wanted, shape)


def _agree(wanted: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(wanted) == len(shape) and all(one in (0, other) for one, other in zip(wanted, shape, strict=True))


def is_transposed(
    weight: str, chain: Sequence[Update], site: Site, config: Mapping[str, Json], adapter: Adapter
) -> bool:
    """Whether rows of the stored weight are columns of its updates: shapes tell, and else the model."""
    kinds = [update for update in chain if not isinstance(update, (Replace, Rows))]
    if not kinds or any(isinstance(update, LowRank) and update.is_embedding for update in kinds):
        return site.is_transposed
    is_stack = len(site.shape) == 3 and any(isinstance(update, LowRank) and not update.kernel for update in kinds)
    if not is_stack and (len(site.shape) != 2 or len(kinds[0].shape) != 2):
        return site.is_transposed
    straight = site.shape
    crossed = (*straight[:-2], straight[-1], straight[-2])
    first = next(update for update in kinds if not is_stack or isinstance(update, LowRank))
    ways = [fits(first, shape) for shape in (straight, crossed)]
    if ways[0] != ways[1]:
        return ways[1]
    if site.is_transposed:
        return True
    return _is_expert_transposed(config, adapter) if is_stack else _is_conv1d(weight, config, adapter)


def _is_expert_transposed(config: Mapping[str, Json], adapter: Adapter) -> bool:
    """PEFT up to 0.18 took every stack for (experts, in, out); else the model says how it stores its own."""
    raw = adapter.config.raw
    if raw.get("target_parameters"):
        version = str(raw.get("peft_version") or "").split(".")[:2]
        return version in (["0", "17"], ["0", "18"]) or config.get("model_type") in _TRANSPOSED_EXPERTS
    claimed = adapter.config.transposes_square_experts
    return config.get("model_type") in _TRANSPOSED_EXPERTS if claimed is None else claimed


def _is_conv1d(weight: str, config: Mapping[str, Json], adapter: Adapter) -> bool:
    """The class of the layer decides; in a model that nobody names, what the adapter says of its base."""
    kind = config.get("model_type")
    if kind is None or not (kind in _CONV1D_OF or tied_names(config) is not None or task_classes(config)):
        return bool(adapter.config.claims_transposed(weight.removesuffix(".weight")))
    return weight.split(".")[-2:][0] in _CONV1D_OF.get(str(kind), set())
