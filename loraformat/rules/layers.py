"""Family 2, third part: the modules of an adapter against each other, layer by layer."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from loraformat.diagnostics import Severity, counted, in_file
from loraformat.model.adapter import Adapter, module_of
from loraformat.model.updates import LowRank, scale_of
from loraformat.rules.base import Hit, Subject, first_of, rule
from loraformat.rules.config import PEFT_FILE, config_at
from loraformat.rules.shapes import is_exchanged

if TYPE_CHECKING:
    from loraformat.naming.families import Module, Place

_MOST_LAYERS = 10_000
_LONG_NUMBER = re.compile("[0-9]{5}")  # no shorter one is beyond _MOST_LAYERS
# The layer of a weight in a stack of numbered ones.
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.([0-9]{1,5})(?=\.|\Z)").search
_LEAST_SCALE, _GREATEST_SCALE = 1e-6, 1e6
_FEWEST_LAYERS = 4  # with fewer, nothing says which layer is the odd one


@rule("LF217", Severity.INFO, since="0.1.0")
def mixed_dtypes(subject: Subject) -> Iterator[Hit]:
    """The two factors of one update have different element types.

    ## Why it matters
    It is legal. But the product is only as precise as the narrower factor, so the wider one wastes space, and some
    engines cast both to one type.

    ## Example
    `lora_A` in F32 and `lora_B` in BF16.

    ## What to do
    Use one type for both: `model.to(torch.bfloat16)` before saving, or F32 for both.

    ## Source
    peft 0.21.2, `autocast_adapter_dtype`, which makes adapters of half precision F32.
    """
    assert subject.adapter is not None
    mixed = {}
    for group in subject.adapter.update_groups:
        if isinstance(group.update, LowRank):
            up, down = group.update.up.dtype, group.update.down.dtype
            if up is not down and up.is_floating and down.is_floating:
                told = f"lora_B is {up.safetensors}, but lora_A is {down.safetensors}"
                mixed.update(dict.fromkeys(group.weights, told))
    if names := sorted(mixed):
        yield Hit(first_of(names), mixed[names[0]])


@rule("LF218", Severity.WARNING, since="0.1.0")
def missing_layer(subject: Subject) -> Iterator[Hit]:
    """A kind of module is adapted in all layers except a few in between.

    ## Why it matters
    The tensors of those layers may be lost: a shard that was not saved, or a name that was spelled differently. Engines
    that need a kind of module in every layer then ignore it in all layers.

    ## Example
    `q_proj` in layers 0 to 31, but not in layer 17, where `v_proj` is.

    ## What to do
    Save the adapter again. If the layer was left out on purpose, say so in `layers_to_transform` or `exclude_modules`.

    ## Source
    text-generation-inference db931fc, adapters/lora.py: a type that a layer lacks is dropped for all layers.
    """
    assert subject.adapter is not None
    if any(subject.adapter.config.raw.get(field) for field in ("layers_to_transform", "exclude_modules")):
        return
    kinds = _layers_by_kind(subject.adapter)
    everywhere = {layer for layers in kinds.values() for layer in layers}
    for kind, layers in sorted(kinds.items()):
        first, last = min(layers), max(layers)
        between = {layer for layer in everywhere if first < layer < last}
        absent = sorted(between - layers)
        if len(layers) >= _FEWEST_LAYERS and 0 < 8 * len(absent) <= max(8, len(layers)):
            listed = ", ".join(str(layer) for layer in absent[:5])
            yield Hit(kind, f"adapted in {counted(len(layers), 'layer')}, but not in {listed}")


@rule("LF219", Severity.WARNING, since="0.1.0")
def odd_shape(subject: Subject) -> Iterator[Hit]:
    """An update has a different shape than those of the same module in all other layers.

    ## Why it matters
    Nearly every model repeats one block. A single layer of another size suggests that the adapter was combined from two
    or cut.

    ## Example
    `q_proj` updates of shape (4096, 4096) in 31 layers and (4096, 2048) in one.

    ## What to do
    Use the adapter as its training run saved it. `--base` tells which of the shapes is right.

    ## Source
    Vaswani et al. 2017, arXiv 1706.03762: identical layers.
    """
    assert subject.adapter is not None
    shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for group in subject.adapter.update_groups:
        shape = group.update.shape
        for name in group.weights if isinstance(group.update, LowRank) else ():
            found = _LAYER(name)
            if found is not None:
                shapes[name[: found.start(1)] + name[found.end(1) :]][name] = shape
    for members in shapes.values():
        counts = Counter(members.values())
        if len(counts) == 2 and len(members) >= _FEWEST_LAYERS and min(counts.values()) == 1:
            (usual, _), (odd, _) = counts.most_common(2)
            name = min(name for name, shape in members.items() if shape == odd)
            yield Hit(name, f"shape {odd}, but {usual} in the other {len(members) - 1} layers")


@rule("LF220", Severity.ERROR, since="0.1.0")
def exchanged_factors(subject: Subject) -> Iterator[Hit]:
    """The factors are transposed or swapped: the rank is the last axis of `lora_A` and the first of `lora_B`.

    ## Why it matters
    They cannot be multiplied, or their product has the wrong shape. Code with another convention, such as MLX or a
    custom training script, saved the tensors under PEFT's names.

    ## Example
    `lora_A.weight` of shape (4096, 8) and `lora_B.weight` of shape (8, 4096) at rank 8.

    ## What to do
    Transpose both: `lora_A` is (rank, in), `lora_B` is (out, rank).

    ## Source
    peft 0.21.2, tuners/lora/layer.py `update_layer`; mlx-lm 0.32.2, tuner/lora.py.
    """
    assert subject.adapter is not None
    found = sorted(name for group in subject.adapter.update_groups if is_exchanged(group) for name in group.weights)
    if found:
        message = "the factors are transposed or swapped"
        yield Hit(first_of(found), message, "expected lora_A (rank, in) and lora_B (out, rank)")


@rule("LF228", Severity.WARNING, since="0.1.0")
def rank_above_dimensions(subject: Subject) -> Iterator[Hit]:
    """The rank of an update is greater than a dimension of its weight.

    ## Why it matters
    A product cannot have a higher rank than its smaller side: the rest of the factors only costs memory and time. Often
    it means that the factors are swapped.

    ## Example
    Rank 512 for a weight of shape (256, 4096).

    ## What to do
    Use a rank of at most the smaller dimension; saving the whole weight (`modules_to_save`) is cheaper here.

    ## Source
    Hu et al. 2021, arXiv 2106.09685, section 4.1: r ≪ min(d, k).
    """
    assert subject.adapter is not None
    found: dict[str, str] = {}
    for group in subject.adapter.update_groups:
        update = group.update
        if is_exchanged(group):
            continue  # LF220 says so
        if isinstance(update, LowRank) and len(update.shape) == 2 and len(update.up.shape) == 2:
            least = min(update.shape)
            if update.up.shape[1] == update.rank > least > 0:
                found[group.weights[0]] = f"rank {update.rank}, but the weight has only {counted(least, _side(update))}"
    if found:
        name = min(found)
        yield Hit(name, found[name])


@rule("LF229", Severity.WARNING, since="0.1.0")
def implausible_layer(subject: Subject) -> Iterator[Hit]:
    """A layer number is higher than in any model.

    ## Why it matters
    The name is damaged or made up. Programs that allocate by the highest layer number run out of memory.

    ## Example
    `model.layers.4294967295.self_attn.q_proj`.

    ## What to do
    Use the names of the model that the adapter was trained on.

    ## Source
    The deepest model in transformers 5.23.0 has a few hundred layers.
    """
    assert subject.adapter is not None
    named = subject.adapter.config.raw.get("layers_to_transform")
    numbers = [number for number in (named if isinstance(named, list) else [named]) if isinstance(number, int)]
    if max(numbers, default=0) >= _MOST_LAYERS:
        message = f"expected layers below {_MOST_LAYERS}, found {max(numbers)}"
        yield Hit(config_at(subject, "layers_to_transform"), message)
    for name in subject.adapter.updates:
        if _LONG_NUMBER.search(name) is None:
            continue
        parts = [part for part in name.split(".") if part.isascii() and part.isdigit()]
        if any(len(part.lstrip("0")) > len(str(_MOST_LAYERS)) - 1 for part in parts):
            yield Hit(name, f"expected a layer below {_MOST_LAYERS}")
            return


@rule("LF232", Severity.WARNING, since="0.1.0")
def vanishing_scale(subject: Subject) -> Iterator[Hit]:
    """The scale of an update is so small that the update vanishes, or so large that it drowns everything else.

    ## Why it matters
    The adapter loads, and the model answers like the base or like noise. Usually a unit was mistaken or a config was
    edited.

    ## Example
    `"lora_alpha": 1e-300`.

    ## What to do
    Use the alpha of the training run; usual scales are between 0.01 and 100.

    ## Source
    bfloat16 has 8 bits and float32 24: an update below 2^-24 of its factors' size is lost in either.
    """
    assert subject.adapter is not None
    odd: dict[float, list[str]] = defaultdict(list)
    for group in subject.adapter.update_groups:
        scale = scale_of(group.update)
        if scale is not None and scale != 0 and not _LEAST_SCALE <= abs(scale) <= _GREATEST_SCALE:
            odd[scale].extend(group.weights)
    for scale, names in odd.items():
        if math.isfinite(scale):
            message = f"expected a scale between {_LEAST_SCALE:g} and {_GREATEST_SCALE:g}, found {scale:g}"
            yield Hit(config_at(subject), f"{message}: {first_of(sorted(names))}")


@rule("LF230", Severity.ERROR, since="0.1.0", forgivable=True)
def undeclared_magnitude(subject: Subject) -> Iterator[Hit]:
    """The file has DoRA magnitudes, but the config does not set `use_dora`.

    ## Why it matters
    PEFT builds plain LoRA layers and ignores the magnitudes as unexpected keys, which gives a different model than the
    trained one.

    ## Example
    `"use_dora": false` together with `q_proj.lora_magnitude_vector`.

    ## What to do
    Write `"use_dora": true`.

    ## Source
    peft 0.21.2, tuners/lora/layer.py `update_layer`; utils/save_and_load.py `set_peft_model_state_dict`.
    """
    assert subject.adapter is not None
    if subject.format != "peft" or subject.adapter.config.raw.get("use_dora") is True:
        return
    updates = ((group.update, len(group.weights)) for group in subject.adapter.update_groups)
    found = sum(count for update, count in updates if isinstance(update, LowRank) and update.magnitude is not None)
    if found:
        yield Hit(
            in_file(PEFT_FILE, "use_dora"), f"expected true, because {counted(found, 'module', 'has')} magnitudes"
        )


def _side(update: LowRank) -> str:
    return "output" if update.shape[0] == min(update.shape) else "input"


def _layers_by_kind(adapter: Adapter) -> dict[str, set[int]]:
    """`model.layers.*.self_attn.q_proj` → the layers in which it is adapted."""
    kinds: dict[str, set[int]] = defaultdict(set)
    for name in adapter.updates:
        module = module_of(name)
        found = _LAYER(module)
        if found is not None:
            kinds[f"{module[: found.start(1)]}*{module[found.end(1) :]}"].add(int(found[1]))
    return kinds


@rule("LF252", Severity.INFO, since="0.1.0")
def half_fused_group(subject: Subject) -> Iterator[Hit]:
    """Only some parts of a module that the original model stores fused have updates.

    ## Why it matters
    Often it is intended: training only query and value is common. If the model is stored with its original names,
    query, key and value are one weight; the rows of the missing part get zeros, and the rank of the fused update is the
    sum of the others. A trainer that lost a part leaves the same pattern.

    ## Example
    `to_q` and `to_k` of a block of FLUX.1 without `to_v`.

    ## What to do
    Nothing, if it was intended. Otherwise save the adapter again.

    ## Source
    diffusers 0.42.1, loaders/single_file_utils.py; docs/formats/README.md, the models whose modules are joined.
    """
    assert subject.adapter is not None
    pipeline = subject.adapter.config.pipeline
    if pipeline is None:
        return
    from loraformat.naming.families import DIFFUSERS, families, spelled

    family = families().get(pipeline.family)
    groups: dict[str, tuple[str, Place, set[int]]] = {}
    for name in subject.adapter.updates if family is not None else ():
        component = pipeline.component_of(name)
        path = spelled(module_of(name.removeprefix(f"{component}.")))
        place = None if family is None else family.find(path, DIFFUSERS)
        if place is not None and place.part is not None and len(place.module.diffusers) > 1:
            group = f"{component}.{place.original}"
            groups.setdefault(group, (name, place, set()))[2].add(place.part)
    half = [group for group, (_, place, parts) in groups.items() if len(parts) < len(place.module.diffusers)]
    if half:
        name, place, parts = groups[half[0]]
        there, absent = _leaves(place.module, parts)
        verbs = ["has" if len(leaves) == 1 else "have" for leaves in (there, absent)]
        text = f"{half[0]} is fused in the original model; {_and(there)} {verbs[0]} updates, "
        text += f"{_and(absent)} {verbs[1]} none"
        more = len(half) - 1
        yield Hit(name, text + (f"; {counted(more, 'more such module')}" if more else ""))


def _leaves(module: Module, parts: Collection[int]) -> tuple[list[str], list[str]]:
    """The last part of the names in diffusers of some parts of a module, and of the others."""
    leaves = [name.rpartition(".")[2] for name in module.diffusers]
    names = leaves if len(set(leaves)) == len(leaves) else module.diffusers
    return [names[at] for at in sorted(parts)], [name for at, name in enumerate(names) if at not in parts]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
