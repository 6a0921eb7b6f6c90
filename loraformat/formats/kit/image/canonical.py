"""An adapter's updates by component and by module of diffusers: what every writer starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loraformat.errors import FormatError
from loraformat.formats.kit.image.modules import BIAS, WEIGHT, Chains
from loraformat.formats.kit.image.resolve import with_encoders
from loraformat.formats.kit.image.translate import no_shapes, to_diffusers
from loraformat.model.adapter import Adapter, Pipeline, module_of
from loraformat.model.updates import Update
from loraformat.naming.families import (
    COMPONENTS,
    DIFFUSERS,
    ORIGINAL,
    Family,
    denoisers,
    families,
    family_named,
    spelled,
    text_encoders,
)

Components = dict[str, dict[str, Chains]]


@dataclass(frozen=True, slots=True)
class Canonical:
    """Updates under the names of a pipeline of diffusers.

    Attributes:
        families: that explain the denoiser, the likeliest first.
        components: component → module → parameter → updates.
    """

    families: tuple[Family, ...]
    components: Components


def pipeline_of(adapter: Adapter) -> Pipeline | None:
    """Of an adapter for an image or video model, by its names where its format has no components; None for another.

    PEFT folders of diffusers' transformers have the names of one component.
    """
    if adapter.config.pipeline is not None:
        return adapter.config.pipeline
    modules = sorted({module_of(weight) for weight in adapter.updates})
    first = {module.partition(".")[0] for module in modules}
    if first and first <= set(COMPONENTS):
        inner = [module.partition(".")[2] for module in modules if not module.startswith("text_encoder")]
        families_ = with_encoders(_explaining(inner, denoisers(), DIFFUSERS), first)
        names = tuple(each.name for each in families_)
        return Pipeline(families=names, components=tuple(sorted(first))) if names else None
    for naming in (DIFFUSERS, ORIGINAL):
        if found := _explaining(modules, denoisers(), naming):
            component = found[0].component
            return Pipeline(
                families=tuple(each.name for each in found),
                components=(component,),
                bare=component,
                is_original=naming == ORIGINAL,
            )
    if _explaining(modules, text_encoders(), DIFFUSERS):
        return Pipeline(components=("text_encoder",), bare="text_encoder")
    return None


def _explaining(modules: list[str], among: tuple[Family, ...], naming: str) -> list[Family]:
    paths = [spelled(module) for module in modules]
    return [each for each in among if paths and all(each.find(path, naming) is not None for path in paths)]


def canonical(adapter: Adapter, pipeline: Pipeline) -> Canonical:
    """The updates under the names of diffusers. Raises: FormatError, UnsupportedUpdate: see `to_diffusers`."""
    known = tuple(families()[name] for name in pipeline.families if name in families())
    found: Components = {}
    for component, module, parameter, chain in _split_names(adapter.updates, pipeline):
        chains = found.setdefault(component, {}).setdefault(module, {})
        chains[parameter] = chain
    if pipeline.is_original and pipeline.bare in found:
        found[pipeline.bare] = _from_original(found[pipeline.bare], known)
    for component in found.keys() & set(pipeline.open_clip):
        found[component] = _from_original(found[component], (family_named("clip"),))
    return Canonical(known, found)


def _split_names(
    updates: Mapping[str, tuple[Update, ...]], pipeline: Pipeline
) -> Iterator[tuple[str, str, str, tuple[Update, ...]]]:
    for weight, chain in updates.items():
        component = pipeline.component_of(weight)
        module, _, parameter = weight.removeprefix(pipeline.head_of(component)).rpartition(".")
        yield component, module, parameter, chain


def _from_original(modules: Mapping[str, Chains], known: tuple[Family, ...]) -> dict[str, Chains]:
    if not known:
        raise FormatError("the model's own names, which no table of diffusers has")
    found: dict[str, Chains] = {}
    for module, chains in modules.items():
        place = known[0].find(spelled(module), ORIGINAL)
        if place is None:
            raise FormatError(f"{known[0].title} has no module {module}")
        usual = {place.parameter(name): name for name in (WEIGHT, BIAS)}
        renamed = {usual.get(parameter, parameter): chain for parameter, chain in chains.items()}
        found.update(to_diffusers(place, renamed, no_shapes, module))
    return found
