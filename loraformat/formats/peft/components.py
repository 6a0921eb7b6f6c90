"""An adapter of a pipeline as PEFT folders: one for each component, in a folder of its name.

Source: peft 0.21.2 knows one model at a time; diffusers 0.42.1, loaders/peft.py `save_lora_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from loraformat.diagnostics import Finding
from loraformat.errors import LoraFormatError
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.losses import unsupported_update
from loraformat.model.adapter import Adapter, AdapterConfig, Pipeline
from loraformat.model.bundle import Bundle
from loraformat.model.updates import Update


def components_of(bundle: Bundle) -> tuple[str, ...]:
    """The folders of a bundle whose files are those of components."""
    return tuple(sorted({name.partition("/")[0] for name in bundle.files if "/" in name}))


def read_components(bundle: Bundle, hints: Hints, read: Callable[[Bundle, Hints], Adapter]) -> Adapter:
    """The adapters of all folders as one, whose names begin with the component's."""
    # Names of image models, which adapters of language models need not wait for.
    from loraformat.formats.kit.image.canonical import pipeline_of
    from loraformat.formats.kit.image.resolve import BaseNames

    parts = {name: read(_inside(bundle, name), _hints_for(hints, name)) for name in components_of(bundle)}
    updates = {f"{name}.{weight}": chain for name, one in parts.items() for weight, chain in one.updates.items()}
    first = next(iter(parts.values())).config
    whole = Adapter(
        config=AdapterConfig(
            base_model=first.base_model,
            base_revision=first.base_revision,
            declared_ranks={
                f"{name}.{weight}": rank
                for name, one in parts.items()
                for weight, rank in one.config.declared_ranks.items()
            },
            raw={name: dict(one.config.raw) for name, one in parts.items()},
        ),
        updates=dict(sorted(updates.items())),
        unclaimed={f"{name}.{key}": each for name, one in parts.items() for key, each in one.unclaimed.items()},
        notes=tuple(_in_component(name, note) for name, one in parts.items() for note in one.notes),
    )
    pipeline = pipeline_of(whole) or Pipeline(components=tuple(parts))
    if hints.weights is not None and hints.components:
        family = BaseNames(hints.weights, hints.components, hints.config).family()
        if family is not None and family[0].name in pipeline.families:
            pipeline = replace(pipeline, families=(family[0].name,))
    return replace(whole, config=replace(whole.config, pipeline=pipeline))


def _inside(bundle: Bundle, component: str) -> Bundle:
    head = f"{component}/"
    files = {
        name.removeprefix(head): replace(file, name=name.removeprefix(head))
        for name, file in bundle.files.items()
        if name.startswith(head)
    }
    return Bundle(f"{bundle.uri}/{component}", files)


def _hints_for(hints: Hints, component: str) -> Hints:
    head = f"{component}."
    if hints.weights is None or not hints.components:
        return hints
    weights = {name.removeprefix(head): shape for name, shape in hints.weights.items() if name.startswith(head)}
    return replace(hints, weights=weights, components=())


def _in_component(component: str, note: Finding) -> Finding:
    """A finding of one folder with the path of its file."""
    file = note.location.file
    return replace(note, location=replace(note.location, file=f"{component}/{file}")) if file else note


def parts_of(adapter: Adapter) -> Mapping[str, Adapter] | None:
    """Component → its adapter, in the names of diffusers; None for an adapter of one model, not a component.

    Raises: LoraFormatError: the updates have no names in diffusers.
    """
    if adapter.config.pipeline is None:
        return None
    from loraformat.formats.kit.image.canonical import canonical

    found = canonical(adapter, adapter.config.pipeline)
    parts: dict[str, Adapter] = {}
    for component, modules in found.components.items():
        updates: dict[str, tuple[Update, ...]] = {
            f"{module}.{parameter}": chain for module, chains in modules.items() for parameter, chain in chains.items()
        }
        config = AdapterConfig(base_model=adapter.config.base_model, base_revision=adapter.config.base_revision)
        parts[component] = Adapter(config=config, updates=dict(sorted(updates.items())))
    return parts


def losses_of(adapter: Adapter, losses: Callable[[Adapter], Iterator[Finding]]) -> Iterator[Finding]:
    """What the folders of all components cannot hold."""
    try:
        parts = parts_of(adapter) or {}
    except LoraFormatError as error:
        yield unsupported_update("", error.message, "PEFT")
        return
    for component, part in parts.items():
        for loss in losses(part):
            tensor = loss.location.tensor
            place = replace(loss.location, tensor=f"{component}.{tensor}") if tensor else loss.location
            yield replace(loss, location=place)


def write_components(adapter: Adapter, write: Callable[[Adapter], Bundle]) -> Bundle:
    """A folder for each component."""
    parts = parts_of(adapter)
    assert parts is not None
    files = {
        f"{component}/{name}": replace(file, name=f"{component}/{name}")
        for component, part in parts.items()
        for name, file in write(part).files.items()
    }
    return Bundle("", dict(sorted(files.items())))
