"""Which weights the modules of a file are: decided by all names of the file together, against a family or the base.

A base decides where it has every module under its own name, dotted or flattened. Else the families do: one that has
all modules of the denoiser in one naming. Where several do, shapes, the header and the base choose; where what they
say of the names still differs, the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from loraformat.diagnostics import listed, show
from loraformat.errors import AssumptionContradicted, FormatError
from loraformat.formats.kit.image.names import RawModule
from loraformat.model.bundle import Json
from loraformat.model.format_files import expert_of
from loraformat.naming.families import (
    DIFFUSERS,
    ORIGINAL,
    SLOTS,
    Family,
    Home,
    Place,
    component_of_slot,
    denoisers,
    homes_of,
    likeliest,
    spelled,
    text_encoders,
)

Shapes = Mapping[str, tuple[int, ...]]

_DENOISERS = ("", "unet", "transformer", "transformer_2", "prior")
_IN_DOUBT = ("te3", "t5xxl")  # which component depends on the family
# Where a checkpoint in one file has the denoiser.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# What headers call the models, for names that several families have.
# Source: sd-scripts 48d368fa, library/sai_model_spec.py.
_HEADERS = (
    ("flux2", r"flux[-_. ]?2"),
    ("chroma", r"chroma"),
    ("flux", r"flux[-_. ]?1|flux"),
    ("sd3", r"stable-diffusion-(v3|3)|sd3"),
    ("sdxl", r"sdxl|stable-diffusion-xl"),
    ("sd", r"stable-diffusion-v[12]|sd_v[12]|sd_1|sd_2"),
    ("qwen-image", r"qwen"),
    ("wan", r"wan"),
    ("hunyuan-video", r"hunyuan"),
    ("z-image", r"z[-_]?image"),
    ("lumina2", r"lumina"),
)


@dataclass(frozen=True, slots=True)
class Target:
    """What one module of a file is.

    Attributes:
        module: of the file.
        component: folder in a pipeline.
        place: in the family; None where the base alone tells.
        naming: of the file's name.
        names: the weights' modules, without component and prefix: one, or one for each part of a fused module.
        is_exact: whether the one name is the base's own, so that nothing is split or exchanged.
    """

    module: RawModule
    component: str
    place: Place | None
    naming: str
    names: tuple[str, ...]
    is_exact: bool = False


@dataclass(slots=True)
class Resolved:
    """All modules of a file.

    Attributes:
        families: those that explain the denoiser, the likeliest first.
        faults: (module, why it is none of the model).
    """

    targets: list[Target] = field(default_factory=list)
    families: tuple[Family, ...] = ()
    faults: list[tuple[RawModule, str]] = field(default_factory=list)


class BaseNames:
    """What the base calls its modules, by component and flattened.

    Attributes:
        components: of a pipeline; () for one component.
        prefix: in front of the names of the one component, or of the denoiser in a checkpoint of several.
        homes: text encoders in a checkpoint in one file → where it has them.
    """

    def __init__(self, weights: Shapes, components: Sequence[str], config: Mapping[str, Json] | None = None) -> None:
        self.weights, self.components = weights, tuple(components)
        self._classes = _classes_of(config or {})
        self.prefix = "" if components else _prefix_of(weights)
        self.homes: Mapping[str, Home] = {}
        self._modules = self._split_all()
        self._flat: dict[str, dict[str, list[str]]] = {}
        if not components:
            known = self.family()
            self.homes = homes_of(weights, "" if known is None else known[0].name)
            self._modules = self._split_all()

    def _split_all(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in self.weights:
            component, path = self._split(name)
            module = path.rpartition(".")[0]
            if module:
                found.setdefault(component, set()).add(module)
        return found

    def _split(self, name: str) -> tuple[str, str]:
        if not self.components:
            for component, home in self.homes.items():
                if name.startswith(home.prefix):
                    return component, name.removeprefix(home.prefix)
            return "", name.removeprefix(self.prefix)
        component, _, path = name.partition(".")
        return component, path

    def _key(self, component: str) -> str:
        """The component as this base has it: "" for the one that has no folder and no home of its own."""
        return component if self.components or component in self.homes else ""

    def modules(self, component: str) -> set[str]:
        """Paths of the modules of a component."""
        return self._modules.get(self._key(component), set())

    def find(self, component: str, path: str, *, is_flat: bool) -> str | None:
        """The one module of a path; None where there is none, or several."""
        modules = self.modules(component)
        if not is_flat:
            return path if path in modules else None
        component = self._key(component)
        if component not in self._flat:
            flat: dict[str, list[str]] = {}
            for module in modules:
                flat.setdefault(module.replace(".", "_"), []).append(module)
            self._flat[component] = flat
        found = self._flat[component].get(path, [])
        return found[0] if len(found) == 1 else None

    def name(self, component: str, module: str, parameter: str) -> str:
        """The full name of a weight."""
        head = f"{component}." if self.components else self.prefix
        head = self.homes[component].prefix if component in self.homes else head
        return f"{head}{module}.{parameter}"

    def shape(self, component: str, module: str, parameter: str = "weight") -> tuple[int, ...] | None:
        """The shape of a weight, where the base has it."""
        return self.weights.get(self.name(component, module, parameter))

    def family(self) -> tuple[Family, str] | None:
        """The family that most of the denoiser's modules are of, and their naming; None for none.

        Where the config names the class of the denoiser, no other class's family is.
        """
        return self._family

    @cached_property
    def _family(self) -> tuple[Family, str] | None:
        known = [each for each in denoisers() if self._classes.intersection(each.classes)] or denoisers()
        best: tuple[int, Family, str] | None = None
        for component in _DENOISERS if self.components else ("",):
            found = likeliest((spelled(path) for path in self.modules(component)), known)
            if found is not None and (best is None or found[0] > best[0]):
                best = found
        return None if best is None else best[1:]


def _classes_of(config: Mapping[str, Json]) -> frozenset[str]:
    """Names of classes in a model_index.json, or in the config.json of a component."""
    names = [
        config.get("_class_name"),
        *(each[1] for each in config.values() if isinstance(each, list) and len(each) == 2),
    ]
    return frozenset(name for name in names if isinstance(name, str))


def _prefix_of(weights: Shapes) -> str:
    return next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in weights)), "")


@dataclass(frozen=True, slots=True)
class Question:
    """What is known beside the names.

    Attributes:
        base: its names; None without a base.
        header: text that may name the model.
        component: what the caller says, or "".
        file: name of the file.
    """

    base: BaseNames | None = None
    header: str = ""
    component: str = ""
    file: str = ""


def naming_of_images(names: Iterable[RawModule]) -> str:
    """The naming in which some family of denoisers has all these modules; "" for none."""
    modules = list(names)
    if not modules or any(module.slot not in _DENOISERS for module in modules):
        return ""
    found = (naming for _, naming, places in _explanations(modules) if all(place is not None for place in places))
    return next(found, "")


def resolve(modules: Sequence[RawModule], question: Question) -> Resolved:
    """The weights of all modules, with what could not be decided as faults.

    Raises: FormatError (LF012): several models fit and call the weights differently; two experts and no word of which.
    """
    resolved = Resolved()
    by_slot: dict[str, list[RawModule]] = {}
    for module in modules:
        by_slot.setdefault(module.slot, []).append(module)
    denoising = [module for slot in _DENOISERS for module in by_slot.pop(slot, [])]
    if denoising:
        _resolve_denoiser(denoising, question, resolved)
    elif question.base is not None and (found := question.base.family()) is not None:
        resolved.families = (found[0],)
    elif (named := _named_by(question.header, denoisers())) is not None:
        resolved.families = (named,)
    for slot, several in by_slot.items():
        _resolve_encoder(slot, several, question, resolved)
    resolved.families = with_encoders(resolved.families, {target.component for target in resolved.targets})
    return resolved


def with_encoders(families: Sequence[Family], components: Collection[str]) -> tuple[Family, ...]:
    """The families whose pipelines have the text encoders: Stable Diffusion 1 and 2 have no second one."""
    fitting = tuple(each for each in families if each.name != "sd" or "text_encoder_2" not in components)
    return fitting or tuple(families)


Explanation = tuple[Family, str, list["Place | None"]]


def _explanations(modules: Sequence[RawModule]) -> list[Explanation]:
    paths = [(spelled(module.path, sep := "_" if module.is_flat else "."), sep) for module in modules]
    return [
        (family, naming, [family.find(path, naming, separator) for path, separator in paths])
        for family in denoisers()
        for naming in (DIFFUSERS, ORIGINAL)
    ]


def _resolve_denoiser(modules: list[RawModule], question: Question, resolved: Resolved) -> None:
    explanations = _explanations(modules)
    whole = [each for each in explanations if all(place is not None for place in each[2])]
    base = question.base
    known = base.family() if base is not None else None
    if known is not None and any(each[0] is known[0] for each in whole):
        whole = [each for each in whole if each[0] is known[0]]
    whole = _likely(whole, modules, question)
    best = whole or _best(modules, explanations, known, question.header)
    component = _denoiser_of(modules, known[0] if known is not None else best[0][0] if best else None, question)
    if base is not None:
        exact = [base.find(_component(module, component), module.path, is_flat=module.is_flat) for module in modules]
        if all(name is not None for name in exact):
            places = whole[0][2] if whole else [None] * len(modules)
            naming = whole[0][1] if whole else DIFFUSERS
            resolved.families = _distinct(whole)
            resolved.targets += [
                Target(module, _component(module, component), place, naming, (name,), is_exact=True)
                for module, name, place in zip(modules, exact, places, strict=True)
                if name is not None
            ]
            return
    if not whole:
        _half(modules, best, component, resolved)
        return
    resolved.families = _distinct(whole)
    _, naming, places = whole[0]
    for module, place in zip(modules, places, strict=True):
        assert place is not None
        resolved.targets.append(Target(module, _component(module, component), place, naming, place.diffusers))


def _component(module: RawModule, component: str) -> str:
    """The component of a module of the denoiser: what its prefix says, or else what was found out."""
    return (
        component
        if module.slot == "" or (module.slot == "transformer" and component == "transformer_2")
        else module.slot
    )


def _distinct(explanations: Iterable[Explanation]) -> tuple[Family, ...]:
    return tuple({family.name: family for family, _, _ in explanations}.values())


def _best(
    modules: list[RawModule],
    explanations: list[Explanation],
    known: tuple[Family, str] | None,
    header: str,
) -> list[Explanation]:
    """The explanations in one naming that have most of the modules, the likeliest first; [] where none has any."""
    eligible = [each for each in explanations if known is None or each[0] is known[0]] or explanations
    named = _named_by(header, [each[0] for each in eligible])

    def worth(each: Explanation) -> tuple[int, bool, bool]:
        return sum(place is not None for place in each[2]), each[0] is named, _fits(each, modules)

    best = max(map(worth, eligible))
    equal = [each for each in eligible if worth(each) == best]
    return [each for each in equal if each[1] == equal[0][1]] if best[0] else []


def _half(modules: list[RawModule], equal: list[Explanation], component: str, resolved: Resolved) -> None:
    """The modules that the best explanations have, and the others as faults; where there are none, all are faults.

    Where several explain as many, a module that they call differently is a fault too.
    """
    if not equal:
        resolved.faults += [(module, "no known model has this module") for module in modules]
        return
    family, naming, places = equal[0]
    resolved.families = _distinct(equal)
    titles = ", ".join(each.title for each in resolved.families)
    other = ORIGINAL if naming == DIFFUSERS else DIFFUSERS
    for number, (module, place) in enumerate(zip(modules, places, strict=True)):
        if place is not None and _differ([(each, said, [found[number]]) for each, said, found in equal]):
            resolved.faults.append(
                (module, f"{titles} name it differently, and there is no base to tell which model this is")
            )
            continue
        if place is not None:
            resolved.targets.append(Target(module, _component(module, component), place, naming, place.diffusers))
            continue
        separator = "_" if module.is_flat else "."
        is_mixed = family.find(spelled(module.path, separator), other, separator) is not None
        why = f"no module of {titles} has this name"
        if is_mixed:
            why = f"it has the {other} name, but the other modules of the file have {naming} names"
        resolved.faults.append((module, why))


def _likely(whole: list[Explanation], modules: Sequence[RawModule], question: Question) -> list[Explanation]:
    """The explanations that fit the shapes and, where several do, what the header chooses among them.

    Raises: FormatError (LF012): they differ, and nothing chooses.
    """
    fitting = [each for each in whole if _fits(each, modules)] or whole
    named = _named_by(question.header, [family for family, _, _ in fitting])
    if named is not None:
        fitting = [each for each in fitting if each[0] is named]
    if _differ(fitting):
        titles = " and ".join(dict.fromkeys(family.title for family, _, _ in fitting))
        raise FormatError(
            f"the names fit {titles}, where they mean different weights",
            where=question.file,
            hint="pass the base with --base",
        )
    return fitting


def _differ(explanations: Sequence[Explanation]) -> bool:
    """Whether two explanations call a weight differently, or one of them exchanges halves and another does not."""
    meanings = {
        tuple((place.diffusers, place.module.is_swapped and naming == ORIGINAL) if place else None for place in places)
        for _, naming, places in explanations
    }
    return len(meanings) > 1


def _named_by(header: str, among: Sequence[Family]) -> Family | None:
    """The family that a header speaks of."""
    by_name = {family.name: family for family in among}
    lower = header.lower()
    return next((by_name[name] for name, pattern in _HEADERS if name in by_name and re.search(pattern, lower)), None)


def _fits(explanation: Explanation, modules: Sequence[RawModule]) -> bool:
    """Whether the shapes of linear layers are those that the family has in every model."""
    for module, place in zip(modules, explanation[2], strict=True):
        if place is None or not place.module.rows or (place.part is not None and len(place.module.diffusers) > 1):
            continue
        down, up = module.parts.get("down"), module.parts.get("up")
        if down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2 or not down.shape[1]:
            continue
        if Fraction(up.shape[0], down.shape[1]) != sum(place.module.rows):
            return False
    return True


def _denoiser_of(modules: Sequence[RawModule], family: Family | None, question: Question) -> str:
    """The component of modules whose prefix does not say it.

    Raises: FormatError (LF012): the base has two experts, and nothing says which is meant.
    """
    slots = {module.slot for module in modules}
    components = question.base.components if question.base is not None else ()
    if "" not in slots and not question.component:
        return min(slots)  # of two experts each module says itself which it is of
    usual = next((name for name in components if name in _DENOISERS), family.component if family else "transformer")
    named = expert_of(question.file) if usual == "transformer" and (family is None or family.name == "wan") else ""
    if question.component:
        if named and named != question.component and "transformer_2" in (*components, question.component):
            text = f"component={question.component} was given with --assume, but the file is named like {named}"
            raise AssumptionContradicted(text, where=question.file, hint="rename the file, or leave --assume out")
        return question.component
    if usual != "transformer" or (family is not None and family.name != "wan"):
        return usual
    if named and family is not None and (not components or named in components):
        return named
    if "transformer_2" in components:
        raise FormatError(
            "the base has two transformers, and neither the tensor names nor the file name tells which one this is for",
            where=question.file,
            hint="use --component transformer (high noise) or --component transformer_2 (low noise)",
        )
    return usual


def _resolve_encoder(slot: str, modules: list[RawModule], question: Question, resolved: Resolved) -> None:
    families = [family for family in text_encoders() if any(_encoder_place(family, module) for module in modules)]
    component = _encoder_of(slot, question, resolved)
    base = question.base
    for module in modules:
        place = next((found for family in families if (found := _encoder_place(family, module)) is not None), None)
        names = () if place is None else place.diffusers
        exact = None
        if base is not None:
            exact = next((name for name in names if name in base.modules(component)), None) or base.find(
                component, module.path, is_flat=module.is_flat
            )
            if exact is None and names and (bare := names[0].removeprefix("text_model.")) in base.modules(component):
                exact = bare
            names = (exact,) if exact is not None else names
        elif not names and not module.is_flat:
            names = (module.path,)
        if names:
            resolved.targets.append(Target(module, component, place, DIFFUSERS, names, exact is not None))
        else:
            resolved.faults.append((module, "neither CLIP nor T5 has this module, and no base is given"))


def _encoder_place(family: Family, module: RawModule) -> Place | None:
    separator = "_" if module.is_flat else "."
    return family.find(spelled(module.path, separator), DIFFUSERS, separator)


def _encoder_of(slot: str, question: Question, resolved: Resolved) -> str:
    """The component of a text encoder. Raises: FormatError (LF012): it depends on a family that is not known."""
    if slot not in SLOTS:
        return slot
    likely = resolved.families[0].name if resolved.families else ""
    if not likely and slot in _IN_DOUBT:
        raise FormatError(
            f"{slot} is the second text encoder of FLUX.1 and the third of Stable Diffusion 3; the file does "
            "not tell which",
            where=question.file,
            hint="pass the base with --base",
        )
    component = component_of_slot(slot, likely)
    base = question.base
    if base is not None and base.components and component not in base.components and "text_encoder" in base.components:
        others = [name for name in base.components if name.startswith("text_encoder")]
        component = others[0] if len(others) == 1 and slot in ("te", "te1", "clip_l") else component
    return component


def unexplained(faults: Sequence[tuple[RawModule, str]], say: Callable[[str], str] = show) -> str:
    """Faults as a text: the first modules of the first reason, and how many more there are."""
    reason = faults[0][1]
    names = [say(module.name) for module, why in faults if why == reason]
    more = f"; and {len(faults) - len(names)} more for other reasons" if len(faults) > len(names) else ""
    return f"{listed(names)}: {reason}{more}"
