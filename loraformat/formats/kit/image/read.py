"""A file of an image or video adapter, whatever its dialect, as an Adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loraformat.diagnostics import Finding, FindingLocation, counted, counted_of, in_file, listed, show
from loraformat.errors import FormatError, MissingFile, UnsupportedUpdate
from loraformat.formats.kit.base import NO_HINTS, Hints, Match
from loraformat.formats.kit.findings import announced_but_absent, left_out, not_only_tensors, uneven_modules
from loraformat.formats.kit.folder import left_behind, other_files, tokenizer_files
from loraformat.formats.kit.image.metadata import KEY as SCALES
from loraformat.formats.kit.image.metadata import StatedScales, hints_of_model, kept
from loraformat.formats.kit.image.modules import BIAS, Chains, Incomplete, chains_of
from loraformat.formats.kit.image.names import RawModule, RawModules, dialect_of, modules_of
from loraformat.formats.kit.image.resolve import (
    BaseNames,
    Question,
    Resolved,
    Target,
    naming_of_images,
    resolve,
    unexplained,
)
from loraformat.formats.kit.image.translate import to_diffusers, to_original
from loraformat.model.adapter import Adapter, AdapterConfig, Pipeline
from loraformat.model.bundle import Bundle, TensorFile, Tensors
from loraformat.model.format_files import FORMAT_FILES, experts_of, the_file
from loraformat.model.updates import Dense, LowRank, Update
from loraformat.naming.families import ORIGINAL, Family, family_named, spelled

WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_PARTIAL = "use convert --partial to read the rest; it lists what it leaves out"


@dataclass(slots=True)
class _Built:
    """What was read: component → module → updates, each module in the names of its target."""

    modules: dict[str, dict[str, Chains]] = field(default_factory=dict)
    sources: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, component: str, module: str, chains: Chains, source: RawModule) -> None:
        """Raises: FormatError (LF012): another module of the file is the same weight."""
        there = self.modules.setdefault(component, {}).setdefault(module, {})
        for parameter, chain in chains.items():
            if parameter in there:
                other = self.sources[component, module]
                raise FormatError(
                    f"{show(other, 100)} and {show(source.name, 100)} both map to {component}.{module}, so one "
                    "is a leftover",
                    hint="remove the tensors of one of them",
                )
            there[parameter] = chain
        self.sources[component, module] = source.name


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a file in any dialect of image and video models; headers and the scalars `.alpha` are read.

    Raises:
        MissingFile (LF101): no file of tensors, or several.
        FormatError (LF012): a tensor or module that is none of the model; two tensors of one weight; names that fit
            several models. With `hints.is_partial` only the last two.
        ConfigError (LF103): a scale that cannot be used, or is stated twice and differs.
        UnsupportedUpdate (LF013): an algorithm that is not a sum of matrices, or a fused module that cannot be split.
    """
    pair = experts_of(bundle)
    if not pair:
        return _read_file(bundle, weights_of(bundle), hints, ())
    high, low = (_read_file(bundle, file, hints, [each.name for each in pair]) for file in pair)
    return _joined(high, low, pair[0].name)


def _joined(first: Adapter, second: Adapter, where: str) -> Adapter:
    """The files for two experts as one adapter. Raises: FormatError (LF012): the base is one of the experts."""
    both = first.updates.keys() & second.updates.keys()
    if both:
        text = f"the folder has one file for each of two transformers: both have {show(min(both), 100)}"
        raise FormatError(text, where=in_file(where), hint="pass the one that is for this base")
    one, other = first.config.pipeline, second.config.pipeline
    assert one is not None
    assert other is not None
    pipeline = replace(
        one,
        components=tuple(sorted({*one.components, *other.components})),
        spellings={**one.spellings, **other.spellings},
    )
    raw = {name: value for name, value in first.config.raw.items() if second.config.raw.get(name) == value}
    return replace(
        first,
        config=replace(first.config, pipeline=pipeline, raw=raw),
        updates=dict(sorted({**first.updates, **second.updates}.items())),
        unclaimed={**first.unclaimed, **second.unclaimed},
        notes=(*first.notes, *(note for note in second.notes if note not in first.notes)),
    )


def _read_file(bundle: Bundle, file: TensorFile, hints: Hints, pair: Sequence[str]) -> Adapter:
    """The adapter of one file; `pair` names both where the folder has two."""
    tensors, used = file.open(), pair or (file.name,)
    raw = modules_of(tensors.entries)
    where = in_file(file.name)
    if raw.twice:
        one, other = raw.twice[0]
        raise FormatError(f"{show(one, 100)} and {show(other, 100)} are the same tensor of one module", where=where)
    base = None if hints.weights is None else BaseNames(hints.weights, hints.components, hints.config)
    stated = StatedScales(tensors.metadata, file.name, hints.budget)
    question = Question(base, hints_of_model(tensors.metadata), hints.component or "", file.name)
    resolved = resolve(raw.modules, question)
    faults = _unnamed(raw)
    faults += [(list(module.names.values()), unexplained([(module, why)])) for module, why in resolved.faults]
    built = _Built()
    for target in resolved.targets:
        fault = _build(target, stated, hints, base, built)
        if fault:
            faults.append((list(target.module.names.values()), fault))
    if faults and (not hints.is_partial or not built.modules):
        raise _refusal(faults, resolved, where, can_be_partial=bool(built.modules))
    if not built.modules:
        raise FormatError("the file contains no updates", where=where)
    pipeline, updates = _named(built, resolved, base)
    pipeline = replace(pipeline, spellings=_spellings_of(resolved.targets))
    return Adapter(
        config=AdapterConfig(pipeline=pipeline, raw=kept(tensors.metadata)),
        updates=updates,
        tokenizer=tokenizer_files(bundle),
        other_files=other_files(bundle, used),
        unclaimed={
            name: tensors.entries[name] for name in raw.unknown if name.startswith(_EMBEDDING) and not hints.is_partial
        },
        notes=(
            *_notes(raw, faults, where),
            *_uneven(raw.modules, where),
            *_dora_notes(stated, built, where),
            *_wrapper_notes(tensors, where),
            *left_behind(bundle, used),
        ),
    )


def match_of(bundle: Bundle, format_name: str) -> Match | None:
    """Why a bundle is of one of the image formats; None where it is of another, or of none."""
    if any("/" in name or name in _OTHERS for name in bundle.files):
        return None
    named = next((file for name in WEIGHTS if isinstance(file := bundle.files.get(name), TensorFile)), None)
    only = named or the_file(bundle)
    files = experts_of(bundle) if only is None else (only,)
    dialects = {_dialect_of(file) for file in files}
    if dialects == {""} and named is not None:
        dialects = {"diffusers"}
    if dialects != {format_name}:
        return None
    file = files[0]
    names = [name for each in files for name in each.open().entries]
    alphas = sum(name.endswith(".alpha") for name in names)
    factors = f", {alphas} of them alphas" if alphas else ""
    return Match(
        certain=True, reason=f"{file.name} has {counted(len(names), 'tensor')} in the names of {format_name}{factors}"
    )


def _dialect_of(file: TensorFile) -> str:
    """The format of one file, by its names and by a header that states scales; "" where neither tells."""
    tensors = file.open()
    stated = "diffusers" if SCALES in tensors.metadata else ""
    return dialect_of(tensors.entries) or stated or _without_prefix(file)


# What only folders of other formats have beside their weights.
_OTHERS = tuple(name for row in FORMAT_FILES for name in row.settings)


def _without_prefix(file: TensorFile) -> str:
    """The format of a file whose names begin with those of the denoiser's modules, or with "transformer.".

    Language models have a "transformer" and "blocks" too, so that one family must have all modules.
    """
    raw = modules_of(file.open().entries)
    naming = "" if raw.unknown else naming_of_images(raw.modules)
    return "" if not naming else "comfy" if naming == ORIGINAL else "diffusers"


def weights_of(bundle: Bundle) -> TensorFile:
    """The file of tensors. Raises: MissingFile (LF101): there is none, or several and none has diffusers' name."""
    for name in WEIGHTS:
        found = bundle.files.get(name)
        if isinstance(found, TensorFile):
            return found
    file = the_file(bundle)
    if file is None:
        names = [each.name for each in bundle.tensor_files()]
        text = f"several files of tensors: {listed(names)}" if names else "no file of tensors"
        raise MissingFile(text, where=bundle.uri, hint="pass the file that you mean" if names else "")
    return file


# Trained embeddings of tokens beside the adapter. Source: OneTrainer 23df3832, modules/modelSaver.
_EMBEDDING = "bundle_emb."
Faults = list[tuple[list[str], str]]


def _unnamed(raw: RawModules) -> Faults:
    return [
        ([name], f"{show(name, 100)}: not a tensor name of any known update")
        for name in raw.unknown
        if not name.startswith(_EMBEDDING)
    ]


def _refusal(faults: Faults, resolved: Resolved, where: FindingLocation, *, can_be_partial: bool) -> FormatError:
    count = sum(len(names) for names, _ in faults)
    text = f"{counted(count, 'tensor', 'is')} not understood: {faults[0][1]}"
    text += f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
    family = f" (read as {resolved.families[0].title})" if resolved.families else ""
    return FormatError(text + family, where=where, hint=_PARTIAL if can_be_partial else "")


def _build(target: Target, stated: StatedScales, hints: Hints, base: BaseNames | None, built: _Built) -> str:
    """Add the updates of a module; what is wrong with its tensors, or ""."""
    module, component = target.module, target.component
    try:
        chains = chains_of(module, lambda each, rank: stated.of(component, each, rank), hints)
        if target.place is None or target.is_exact or target.naming != ORIGINAL:
            found = dict.fromkeys(target.names, chains)
        else:
            found = to_diffusers(target.place, chains, _Shapes(base, component), module.name)
    except Incomplete as error:
        return f"{show(module.name, 100)}: {error}"
    except UnsupportedUpdate as error:
        return str(error)
    for name, parts in found.items():
        built.add(component, name, parts, module)
    return ""


_EXTRAS = ("alpha", "diff_b")


def _spellings_of(targets: Iterable[Target]) -> dict[str, tuple[str, ...]]:
    """Component → the spellings of its modules: what stands before them, whose names they have, what their tensors are.

    Dense deltas next to factors are not a spelling of their own.
    """
    found: dict[str, set[str]] = {}
    extras: dict[str, set[str]] = {}
    for target in targets:
        module = target.module
        extras.setdefault(target.component, set()).update(role for role in _EXTRAS if role in module.parts)
        if module.kind:
            naming = target.naming if target.place is not None else "base"
            found.setdefault(target.component, set()).add(f"{module.prefix} {naming} {module.kind}")
    return {
        component: tuple(
            " ".join((each, *(role for role in _EXTRAS if role in extras[component]))) for each in sorted(every)
        )
        for component, every in sorted(found.items())
    }


class _Shapes:
    """Shapes of the modules of a component, as the base has them."""

    def __init__(self, base: BaseNames | None, component: str) -> None:
        self._base, self._component = base, component

    def __call__(self, module: str, parameter: str) -> tuple[int, ...] | None:
        return None if self._base is None else self._base.shape(self._component, module, parameter)


def _named(built: _Built, resolved: Resolved, base: BaseNames | None) -> tuple[Pipeline, dict[str, tuple[Update, ...]]]:
    """The updates under their full names, as the base has them, or as a pipeline of diffusers does."""
    components = tuple(sorted(built.modules))
    names = tuple(family.name for family in resolved.families)
    if base is None or base.components:
        pipeline = Pipeline(families=names, components=components)
    else:
        pipeline = _of_one_component(built, resolved, base, components, names)
    updates: dict[str, tuple[Update, ...]] = {}
    for component, modules in built.modules.items():
        head, family = pipeline.head_of(component), _naming_family(pipeline, component)
        for module, chains in modules.items():
            place = None if family is None else family.find(spelled(module), ORIGINAL)
            for parameter, chain in chains.items():
                name = f"{head}{module}.{parameter if place is None else place.parameter(parameter)}"
                shape = None if base is None else base.weights.get(name)
                updates[name] = tuple(_as_stored(update, shape) for update in chain)
    return pipeline, dict(sorted(updates.items()))


def _naming_family(pipeline: Pipeline, component: str) -> Family | None:
    """The family by whose original names the updates of a component are called; None where diffusers' are."""
    if component in pipeline.open_clip:
        return family_named("clip")
    is_original = component == pipeline.bare and pipeline.is_original and pipeline.family
    return family_named(pipeline.family) if is_original else None


def _of_one_component(
    built: _Built, resolved: Resolved, base: BaseNames, components: tuple[str, ...], names: tuple[str, ...]
) -> Pipeline:
    """The pipeline of which the base is one component, or one file; its updates get the names that it has there."""
    found = base.family()
    exact = {target.component for target in resolved.targets if target.is_exact}
    denoiser = next((name for name in components if not name.startswith("text_encoder")), "")
    likely = (*sorted(exact), *([denoiser] if denoiser else []), *components)
    homeless = [name for name in likely if name not in base.homes]
    bare = denoiser if found is not None and denoiser else next(iter(homeless), "")
    is_original = found is not None and found[1] == ORIGINAL and bare == denoiser
    are_exact = all(target.is_exact for target in resolved.targets if target.component == bare)
    if is_original and found is not None and not are_exact:
        built.modules[bare] = to_original(found[0], built.modules[bare])
    homes = {name: home for name, home in base.homes.items() if name in components and name != bare}
    open_clip = tuple(sorted(name for name, home in homes.items() if home.is_open_clip))
    for name in open_clip:
        built.modules[name] = to_original(family_named("clip"), built.modules[name])
    return Pipeline(
        families=names,
        components=components,
        bare=bare,
        prefix=base.prefix,
        is_original=is_original,
        homes={name: home.prefix for name, home in homes.items()},
        open_clip=open_clip,
    )


def _as_stored(update: Update, shape: tuple[int, ...] | None) -> Update:
    """An update with the axes of its weight: a convolution of one point may be stored as a matrix, and back."""
    if shape is None:
        return update
    if isinstance(update, LowRank) and update.shape != shape:
        is_same = math.prod(update.shape) == math.prod(shape) and update.shape[:1] == shape[:1]
        if is_same and len(shape) in (2, 3, 4, 5):
            return replace(update, kernel=shape[2:])
    if isinstance(update, Dense) and update.shape != shape and math.prod(update.shape) == math.prod(shape):
        return replace(update, delta=update.delta.reshape(*shape))
    return update


def _notes(raw: RawModules, faults: Faults, where: FindingLocation) -> Iterable[Finding]:
    for names, reason in faults:  # one for each module, so that every name is shown whole
        yield left_out(where, names, reason)
    embeddings = [name for name in raw.unknown if name.startswith(_EMBEDDING)]
    if embeddings:
        yield left_out(where, embeddings, "trained token embeddings, which do not update a weight")
    if raw.auxiliary:
        yield left_out(where, raw.auxiliary, "metadata of a slider tool, which does not change a weight")


def _uneven(modules: list[RawModule], where: FindingLocation) -> Iterable[Finding]:
    """LF250 for roles that some modules lack: of all pairs in the file, and of one module in all blocks."""
    scaled = [module for module in modules if not _SCALED.isdisjoint(module.parts)]
    for role, word in (("alpha", ".alpha"), ("dora_scale", ".dora_scale"), ("magnitude", "a DoRA magnitude")):
        pairs = scaled if role == "alpha" else [module for module in scaled if "down" in module.parts]
        without = [module.name for module in pairs if role not in module.parts]
        if without and len(without) < len(pairs):
            yield uneven_modules(
                where, f"{counted_of(len(pairs) - len(without), len(pairs), 'module', 'has')} {word}", without
            )
    by_layer: dict[tuple[str, str], list[RawModule]] = {}
    for module in modules:
        by_layer.setdefault((module.slot, _NUMBERS.sub("#", module.path)), []).append(module)
    for several in by_layer.values():
        every = {role for module in several for role in module.parts} - {"alpha", "dora_scale", "magnitude"}
        for role in sorted(every) if len(several) > 1 else ():
            without = [module.name for module in several if role not in module.parts]
            if without:
                having = counted_of(len(several) - len(without), len(several), "block", "has")
                yield uneven_modules(where, f"{having} {role}", without)


# Of each algorithm a tensor that has a scale; LoKr of two whole sides has none.
_SCALED = frozenset(("down", "hada_w1_a", "lokr_w1_a", "lokr_w2_a"))
_NUMBERS = re.compile(r"(?<![0-9A-Za-z])[0-9]+(?![0-9A-Za-z])")


def _wrapper_notes(tensors: Tensors, where: FindingLocation) -> Iterable[Finding]:
    if tensors.wrapper or tensors.extras:
        yield not_only_tensors(where, tensors.wrapper, sorted(tensors.extras))


def _dora_notes(stated: StatedScales, built: _Built, where: FindingLocation) -> Iterable[Finding]:
    absent = [component for component in stated.components if component not in built.modules]
    if absent:
        yield announced_but_absent(where, "lora_adapter_metadata has settings of components", absent)
    for component in stated.components:
        if stated.is_dora(component):
            plain = [module for module, chains in built.modules.get(component, {}).items() if not _has_dora(chains)]
            if plain:
                yield announced_but_absent(where, "the header says use_dora", [f"{component}.{plain[0]}"])


def _has_dora(chains: Mapping[str, tuple[Update, ...]]) -> bool:
    return any(
        not isinstance(update, LowRank) or update.magnitude is not None
        for parameter, chain in chains.items()
        if parameter != BIAS
        for update in chain
    )
