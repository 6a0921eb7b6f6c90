"""Writes an adapter of an image or video model: what the four formats have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loraformat.diagnostics import Finding
from loraformat.errors import LoraFormatError
from loraformat.formats.kit.folder import bundle_of, lost_beside
from loraformat.formats.kit.image.canonical import Canonical, canonical, pipeline_of
from loraformat.formats.kit.image.entries import Entries, Fault, Spelling, UnknownScale, entries_of
from loraformat.formats.kit.image.metadata import BOUND
from loraformat.formats.kit.image.modules import Chains
from loraformat.formats.kit.image.translate import to_original
from loraformat.formats.kit.losses import (
    folded_scale,
    unknown_scale,
    unstated_in_file,
    unsupported_update,
)
from loraformat.formats.kit.update_slots import unsaid, unstated_fields
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle, TensorFile, Tensors
from loraformat.naming.families import DIFFUSERS, ORIGINAL, Family
from loraformat.naming.families import spelled as taken_apart

LOW_NOISE = "_low_noise"
_DENSE = ("diff", "set_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a format spells an adapter.

    Attributes:
        title: for messages.
        stem: of the file's name.
        spelling: which tensors an update becomes.
        naming: of a family → DIFFUSERS or ORIGINAL.
        prefix: (component, family or None) → what stands before the module; None where there is no name for it.
        is_flat: whether dots of modules are written as `_`.
        has_experts: whether one file holds both transformers of Wan 2.2.
        header: the adapter, what is written → metadata of the file beside the source's own.
    """

    title: str
    stem: str
    spelling: Spelling
    naming: Callable[[Family], str]
    prefix: Callable[[str, Family | None], str | None]
    is_flat: bool
    has_experts: bool
    header: Callable[[Adapter, Plan], Mapping[str, str]]


@dataclass(slots=True)
class Plan:
    """What a file will hold, and what it cannot.

    Attributes:
        family: by whose names it is written; None where no table has the model.
        components: component → module, in the names of the dialect → updates.
        entries: name → tensor.
        faults: (weight, why it cannot be written).
        unknown: weights whose scale nobody stated.
        folded: (weight, bound of the relative error) of scales that were worked into tensors.
        notes: losses that are not faults.
    """

    family: Family | None = None
    components: dict[str, dict[str, Chains]] = field(default_factory=dict)
    entries: Entries = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    folded: list[tuple[str, float]] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)


def plan_of(adapter: Adapter, dialect: Dialect) -> Plan:
    """The tensors of the file by name, and the faults; no value is read."""
    plan = Plan()
    pipeline = pipeline_of(adapter)
    if pipeline is None:
        plan.faults.append(("", "an adapter that fits no known image or video model"))
        return plan
    try:
        found = canonical(adapter, pipeline)
    except LoraFormatError as error:
        plan.faults.append(("", error.message))
        return plan
    denoisers = [name for name in found.components if not name.startswith("text_encoder")]
    if len(denoisers) > 1 and not dialect.has_experts:
        plan.faults.append(("", f"{' and '.join(sorted(denoisers))} in one file"))
        return plan
    if denoisers == ["transformer_2"] and not dialect.has_experts:
        text = f"only the file name, {dialect.stem}{LOW_NOISE}.safetensors, shows that it is for transformer_2"
        plan.notes.append(unstated_in_file("", text))
    plan.family = _family(found, dialect, plan)
    if not plan.faults:
        for component, modules in found.components.items():
            _add(component, modules, dialect, plan)
    return plan


def _family(found: Canonical, dialect: Dialect, plan: Plan) -> Family | None:
    """The family by whose names the file is written; a fault where several are possible and write other names."""
    modules = [
        name
        for component, each in found.components.items()
        if not component.startswith("text_encoder")
        for name in each
    ]
    spelled: dict[tuple[str, tuple[str, ...]], Family] = {}
    for family in found.families:
        naming = dialect.naming(family)
        names = tuple(_original_name(family, name) for name in modules) if naming == ORIGINAL else tuple(modules)
        spelled.setdefault((naming, names), family)
    if len(spelled) > 1 and modules:
        titles = " or ".join(each.title for each in found.families)
        plan.faults.append(("", f"an adapter whose names fit {titles}, without --base to tell which,"))
        return None
    return next(iter(spelled.values()), None)


def _original_name(family: Family, module: str) -> str:
    place = family.find(taken_apart(module), DIFFUSERS)
    return "" if place is None else place.original


def _parameter(family: Family, original: str) -> str:
    """What follows the name of a module of the original whose parameter is not `weight`: ".scale".

    Source: ComfyUI 0.26.1, comfy/lora.py `model_lora_keys_unet`: such a parameter is called by its whole name.
    """
    place = family.find(taken_apart(original), ORIGINAL)
    name = "weight" if place is None else place.parameter("weight")
    return "" if name == "weight" else f".{name}"


def _add(component: str, modules: Mapping[str, Chains], dialect: Dialect, plan: Plan) -> None:
    is_encoder = component.startswith("text_encoder")
    prefix = dialect.prefix(component, plan.family)
    if prefix is None:
        plan.faults.append((f"{component}.{next(iter(modules))}", f"an update of {component}"))
        return
    written: Mapping[str, Chains] = modules
    if not is_encoder and plan.family is not None and dialect.naming(plan.family) == ORIGINAL:
        try:
            written = to_original(plan.family, modules)
        except LoraFormatError as error:
            plan.faults.append((f"{component}.{next(iter(modules))}", error.message))
            return
    elif not is_encoder and plan.family is None and dialect.is_flat:
        plan.faults.append((f"{component}.{next(iter(modules))}", "an update of a model whose names are unknown"))
        return
    plan.components[component] = dict(written)
    names = {}
    if written is not modules and plan.family is not None:
        names = {_original_name(plan.family, each): each for each in sorted(modules, reverse=True)}
    for module, chains in written.items():
        name = f"{prefix}{module.replace('.', '_') if dialect.is_flat else module}"
        weight = f"{component}.{names.get(module, module)}.weight"
        try:
            entries, rounding = entries_of(chains, dialect.spelling)
        except UnknownScale:
            plan.unknown.append(weight)
            continue
        except Fault as fault:
            plan.faults.append((weight, str(fault)))
            continue
        if rounding is not None:
            plan.folded.append((weight, rounding))
        parameter = "" if written is modules or plan.family is None else _parameter(plan.family, module)
        plan.entries.update(
            {f"{name}{parameter if role in _DENSE else ''}.{role}": tensor for role, tensor in entries.items()}
        )


def losses_of(adapter: Adapter, dialect: Dialect) -> Iterator[Finding]:
    """What the dialect cannot hold."""
    plan = plan_of(adapter, dialect)
    by_kind: dict[str, list[str]] = {}
    for weight, fault in plan.faults:
        by_kind.setdefault(fault, []).append(weight)
    for fault, weights in by_kind.items():
        yield unsupported_update(weights[0], fault, dialect.title, len(weights) - 1)
    if plan.unknown:
        yield unknown_scale("", plan.unknown)
    if plan.folded:
        yield folded_scale("", [weight for weight, _ in plan.folded], max(error for _, error in plan.folded))
    yield from plan.notes
    yield from lost_beside(adapter, _dropped(adapter), (f"{dialect.stem}.safetensors",))


def _dropped(adapter: Adapter) -> list[str]:
    config = adapter.config
    names = unsaid(config, container="safetensors")
    if config.pipeline is None:
        return names + unstated_fields(config.raw)
    bound = [name for name in config.raw if name in BOUND and name not in ("format", BOUND[-2])]
    return names + sorted(bound) + sorted(name for name, value in config.raw.items() if not isinstance(value, str))


def write_file(adapter: Adapter, dialect: Dialect) -> Bundle:
    """A folder with the one file. Raises: AssertionError: `losses_of` has an error-level finding."""
    plan = plan_of(adapter, dialect)
    assert not plan.faults
    assert not plan.unknown
    entries = dict(sorted(plan.entries.items()))
    metadata = {"format": "pt", **_carried(adapter), **dialect.header(adapter, plan)}
    tensors = Tensors("safetensors", entries, dict(sorted(metadata.items())))
    is_low_noise = "transformer_2" in plan.components and not dialect.has_experts
    name = f"{dialect.stem}{LOW_NOISE if is_low_noise else ''}.safetensors"
    nbytes = sum(entry.nbytes for entry in entries.values())
    return bundle_of([TensorFile(name, nbytes, lambda: tensors)], adapter)


def _carried(adapter: Adapter) -> dict[str, str]:
    """What the source's header says, but for what binds to its bytes."""
    if adapter.config.pipeline is None:
        return {}
    return {name: value for name, value in adapter.config.raw.items() if isinstance(value, str) and name not in BOUND}


def ranks_and_scales(plan: Plan) -> Iterator[tuple[str, str, int, float]]:
    """(component, module, rank, scale) of every update of the file that has them."""
    from loraformat.model.updates import rank_of, scale_of

    for component, modules in plan.components.items():
        for module, chains in modules.items():
            for chain in chains.values():
                for update in chain:
                    rank, scale = rank_of(update), scale_of(update)
                    if rank is not None and scale is not None:
                        yield component, module, rank, scale


def common(values: Sequence[float]) -> float | None:
    """The one value of all; None where they differ, or there is none."""
    return values[0] if values and len(set(values)) == 1 else None
