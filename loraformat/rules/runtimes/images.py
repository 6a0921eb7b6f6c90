"""Family 6, third part: how programs for image and video models handle the names in a file (`--target`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraformat.diagnostics import Severity, counted, listed
from loraformat.model.adapter import Pipeline, module_of
from loraformat.model.updates import Dense, Replace, scale_of
from loraformat.rules.base import Hit, Subject, rule
from loraformat.rules.runtimes.loading import hit_of
from loraformat.rules.targets import Line, SpellingLine, Spellings, Target

if TYPE_CHECKING:
    from loraformat.naming.families import Place

_ENCODER_LEAF = "self_attn.out_proj"


@dataclass(frozen=True, slots=True)
class _Spelled:
    """The denoiser of an adapter in one spelling, and what a target says of that.

    Attributes:
        spellings: as in the table, one unless the file has several.
        line: None where nobody tried it, or the file has several spellings.
        modules: name of a weight → its module in the family.
    """

    target: Target
    family: str
    spellings: Sequence[str]
    line: SpellingLine | None
    modules: Mapping[str, Place]

    def named(self, originals: tuple[str, ...]) -> list[str]:
        """The weights whose modules are among these of the original."""
        return [name for name, place in self.modules.items() if place.module.original in originals]

    @property
    def naming(self) -> str:
        """Its spellings in words: `lora_unet_…` with the original's module names and tensors `lora_down`, `alpha`."""
        return " and ".join(map(_in_words, self.spellings))

    def kinds(self, names: Iterable[str]) -> list[str]:
        """What the original calls the modules of these weights, blocks without their numbers."""
        return sorted({self.modules[name].module.original.replace("{}", "N") for name in names})


def _in_words(spelling: str) -> str:
    """`lora_unet_ original lora_down alpha` as lora_unet_… (original module names; lora_down, alpha)."""
    prefix, names, *tensors = spelling.split()
    before = "no prefix" if prefix == "bare" else f"{prefix}…"
    return f"{before} ({names} module names; {', '.join(tensors)})"


def _spelled(subject: Subject) -> Iterator[_Spelled]:
    """For each target that differs by spelling, how the denoiser is spelled and what is known of it."""
    assert subject.adapter is not None
    pipeline = subject.adapter.config.pipeline
    if pipeline is None or not pipeline.spellings:
        return
    several = {each for component, each in pipeline.spellings.items() if not component.startswith("text_encoder")}
    spellings = sorted({spelling for each in several for spelling in each})
    places = {name: _places(subject, pipeline, name) for name in pipeline.families or ("",)}
    for target in subject.targets:
        if target.spellings is None or not spellings:
            continue
        lines = [_line(target.spellings, name, spellings, modules) for name, modules in places.items()]
        # Without a base the names may be those of several families, of which the program reads one.
        line = lines[0] if all(each == lines[0] for each in lines) else None
        family, modules = next(iter(places.items()))
        yield _Spelled(target, family if line is not None else " or ".join(places), spellings, line, modules)


def _line(table: Spellings, family: str, spellings: Sequence[str], modules: Mapping[str, Place]) -> SpellingLine | None:
    """What a table says of the modules that are there; None where it says nothing, or the file has two spellings."""
    line = table.of(family, spellings[0]) if len(spellings) == 1 else None
    if line is None:
        return None
    there = {place.module.original for place in modules.values()}
    return replace(
        line,
        refuses_modules={name: text for name, text in line.refuses_modules.items() if name in there},
        ignores=tuple(name for name in line.ignores if name in there),
        misreads=tuple(name for name in line.misreads if name in there),
    )


def _places(subject: Subject, pipeline: Pipeline, name: str) -> dict[str, Place]:
    """Weights of the denoiser → their modules in a family."""
    from loraformat.naming.families import DIFFUSERS, ORIGINAL, families, spelled

    assert subject.adapter is not None
    family, found = families().get(name), {}
    for weight in subject.adapter.updates if family is not None else ():
        component = pipeline.component_of(weight)
        path = spelled(module_of(weight.removeprefix(pipeline.head_of(component))))
        naming = ORIGINAL if pipeline.is_original and component == pipeline.bare else DIFFUSERS
        place = None if family is None or component.startswith("text_encoder") else family.find(path, naming)
        if place is not None:
            found[weight] = place
    return found


def _hit(target: Target, verdict: str, message: str, where: str, what: str, *, pronoun: str = "them") -> Hit:
    return hit_of(target, Line("", verdict, message, target.convert, ""), where, what, pronoun=pronoun)


@rule("LF622", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unread_spelling(subject: Subject) -> Iterator[Hit]:
    """The program rejects the file because of its tensor names, or silently loads none of it.

    ## Why it matters
    Each trainer names the modules of a model in its own way, and no program knows all of them. Some programs raise an
    error; others load an adapter without any module, and the images are those of the base.

    ## Example
    FLUX.1 with `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight` in diffusers, which loads 0 modules.

    ## What to do
    Run `loraformat convert ADAPTER --to diffusers -o OUT`, or `--to comfy` for ComfyUI.

    ## Source
    loraformat/rules/runtimes/diffusers.json, made by running diffusers (tests/derive_diffusers.py).
    """
    for one in _spelled(subject):
        line = one.line
        if line is None:
            continue
        what = f"modules of {one.family} named as {one.naming}"
        if line.refuses:
            yield _hit(one.target, "refuses", line.refuses, "", what)
        elif line.ignores_all:
            yield _hit(one.target, "ignores", "no module is loaded, without a warning", "", what)
        for original, message in line.refuses_modules.items():
            names = one.named((original,))
            if names:
                yield _hit(one.target, "refuses", message, names[0], f"{original.replace('{}', 'N')} among {what}")
        lacking = _incomplete(one, line.needs) if line.refuses_parts else ""
        if lacking:
            yield _hit(one.target, "refuses", line.refuses_parts, "", f"{lacking}, among {what}", pronoun="it")
        if line.ignores and set(line.ignores).issuperset(place.module.original for place in one.modules.values()):
            yield _hit(one.target, "ignores", "none of its modules are loaded", "", what)
    yield from _unread_encoders(subject)


def _incomplete(one: _Spelled, needed: tuple[str, ...]) -> str:
    """What a program misses that counts blocks from 0 and looks for each of these modules in all; "" for nothing."""
    blocks: dict[str, set[str]] = {}
    for place in one.modules.values():
        if place.numbers:
            blocks.setdefault(place.numbers[0], set()).add(place.module.original)
    for number in range(len(blocks)):
        if str(number) not in blocks:
            return f"block {number} missing"
        lacking = sorted(set(needed) - blocks[str(number)])
        if lacking:
            return f"{lacking[0].format(number)} missing"
    return ""


def _unread_encoders(subject: Subject) -> Iterator[Hit]:
    """A text encoder in kohya's names without the output of its attention: diffusers tells the names by that."""
    assert subject.adapter is not None
    pipeline = subject.adapter.config.pipeline
    if pipeline is None:
        return
    for component, spellings in pipeline.spellings.items():
        kohya = [each for each in spellings if each.startswith("lora_te")]
        names = [name for name in subject.adapter.updates if pipeline.component_of(name) == component]
        if not component.startswith("text_encoder") or not kohya or any(_ENCODER_LEAF in name for name in names):
            continue
        for target in subject.targets:
            message = "" if target.spellings is None else target.spellings.encoder_without_output
            if message and names and _reads_encoder(target, pipeline, component):
                what = f"{component} has kohya's names but no out_proj module, by which {target.label} recognizes them"
                yield Hit(names[0], f'{what}; it refuses the file: "{message}"', target.convert)


@rule("LF623", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def left_out_module(subject: Subject) -> Iterator[Hit]:
    """The program loads the adapter but ignores some of its modules, without an error.

    ## Why it matters
    Part of what was trained has no effect, and only a line in a log mentions it.

    ## Example
    A file of sd-scripts for FLUX.1 that adapts `final_layer.linear`, in diffusers. T5 of FLUX.1, and both transformers
    of Wan 2.2 in one file, which diffusers never loads.

    ## What to do
    If the names are the reason, run `loraformat convert ADAPTER --to diffusers -o OUT`; otherwise use the merged model:
    `loraformat merge BASE ADAPTER -o OUT`.

    ## Source
    loraformat/rules/runtimes/diffusers.json, made by running diffusers (tests/derive_diffusers.py).
    """
    assert subject.adapter is not None
    for one in _spelled(subject):
        names = [] if one.line is None else one.named(one.line.ignores)
        if names:
            kinds = one.kinds(names)
            message = f"{listed(kinds)}, without a warning"
            what = f"{counted(len(names), 'weight')} in {counted(len(kinds), 'module')} named as {one.naming}"
            yield _hit(one.target, "ignores", message, names[0], what, pronoun="it" if len(names) == 1 else "them")
        biases = [name for name in one.modules if name.endswith(".bias")]
        if one.line is not None and one.line.ignores_biases and biases:
            what = f"{counted(len(biases), 'module')} with a trained bias, named as {one.naming}"
            yield _hit(
                one.target,
                "ignores",
                "diff_b is not read",
                biases[0],
                what,
                pronoun="it" if len(biases) == 1 else "them",
            )
    yield from _left_out_components(subject)


def _left_out_components(subject: Subject) -> Iterator[Hit]:
    assert subject.adapter is not None
    pipeline = subject.adapter.config.pipeline
    if pipeline is None or not pipeline.spellings:
        return
    first = {pipeline.component_of(name): name for name in sorted(subject.adapter.updates, reverse=True)}
    for target in subject.targets:
        for component, name in sorted(first.items()):
            if component.startswith("text_encoder") and not _reads_encoder(target, pipeline, component):
                message = "no adapter of it is loaded in this spelling, and there is no warning"
                yield _hit(target, "ignores", message, name, f"updates of {component}")
                continue
            second = "" if target.spellings is None else target.spellings.second_transformer
            if component == "transformer_2" and second:
                yield _hit(target, "ignores", second, name, "updates of transformer_2")


def _reads_encoder(target: Target, pipeline: Pipeline, component: str) -> bool:
    spellings = pipeline.spellings
    beside = [one for name, each in spellings.items() if not name.startswith("text_encoder") for one in each]
    own = spellings.get(component, ())
    return target.spellings is None or target.spellings.reads_encoder(pipeline.family, component, own, beside)


@rule("LF624", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def misread_module(subject: Subject) -> Iterator[Hit]:
    """The program loads a module of the adapter with wrong values.

    ## Why it matters
    The layer gets an update that nobody trained, or none, and the images are worse than without the adapter.

    ## Example
    `final_layer.adaLN_modulation.1` of FLUX.2 in ai-toolkit's names: diffusers' checkpoint converter swaps the halves
    of this layer, but its LoRA converter does not.

    ## What to do
    Run `loraformat convert ADAPTER --to diffusers -o OUT`.

    ## Source
    loraformat/rules/runtimes/diffusers.json, made by running diffusers (tests/derive_diffusers.py).
    """
    for one in _spelled(subject):
        names = one.named(one.line.misreads) if one.line is not None else []
        if names:
            what = f"{listed(one.kinds(names))} named as {one.naming}"
            yield Hit(
                names[0], f"{what}; {one.target.label} loads values that differ from the file", one.target.convert
            )


@rule("LF625", Severity.INFO, since="0.1.0", needs="target")
def untried_spelling(subject: Subject) -> Iterator[Hit]:
    """How the program handles a file with such names, or with two naming schemes, is untested.

    ## Why it matters
    The program may load all, part or none of such a file. `validate --target` makes no claim about it.

    ## Example
    `transformer.` as prefix of diffusers' names for Wan, in ComfyUI.

    ## What to do
    Run `loraformat convert ADAPTER --to diffusers -o OUT` for diffusers, `--to comfy` for ComfyUI.

    ## Source
    loraformat/rules/runtimes/diffusers.json and loraformat/rules/runtimes.json, `spellings`.
    """
    assert subject.adapter is not None
    for one in _spelled(subject):
        if one.line is None:
            what = f"modules of {one.family or 'an unknown model'} named as {one.naming}"
            help_ = "pass the base with --base" if " or " in one.family else one.target.convert
            yield Hit("", f"{what}; how {one.target.label} handles them is unknown", help_)
        dense = [
            name
            for name in one.modules
            if name.endswith(".weight")
            and any(isinstance(each, (Dense, Replace)) for each in subject.adapter.updates[name])
        ]
        if dense and one.target.spellings is not None and one.target.spellings.doubts_dense:
            what = f"dense deltas or whole weights of {counted(len(dense), 'module')}"
            yield Hit(dense[0], f"{what}; how {one.target.label} handles them is unknown", "the merged model")


@rule("LF626", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def ignored_header(subject: Subject) -> Iterator[Hit]:
    """The scale is only in the header of the file, which the program does not read.

    ## Why it matters
    The adapter is applied with a different strength than in training, without a warning.

    ## Example
    A file that diffusers saved with `lora_alpha` 8 and rank 16, in ComfyUI, which applies it twice as strongly.

    ## What to do
    Run `loraformat convert ADAPTER --to comfy -o OUT`, which writes `.alpha` for every module, or folds the scale in.

    ## Source
    ComfyUI issue 12191.
    """
    assert subject.adapter is not None
    pipeline = subject.adapter.config.pipeline
    if pipeline is None or "lora_adapter_metadata" not in subject.adapter.config.raw:
        return
    silent = {
        component
        for component, each in pipeline.spellings.items()
        if not any("alpha" in spelling.split() for spelling in each)
    }
    scaled = [
        name
        for name, chain in subject.adapter.updates.items()
        if pipeline.component_of(name) in silent and any(scale_of(update) not in (None, 1.0) for update in chain)
    ]
    for target in subject.targets:
        if target.spellings is not None and target.spellings.ignores_header and scaled:
            what = f"the scale of {counted(len(scaled), 'weight')} is only in lora_adapter_metadata"
            yield _hit(target, "ignores", "the scale becomes 1", scaled[0], what)
