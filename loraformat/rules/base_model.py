"""Family 3: the adapter against the base model it is for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loraformat.diagnostics import Severity, counted
from loraformat.model.adapter import module_of
from loraformat.rules.base import Hit, Subject, first_of, rule
from loraformat.rules.metadata.vocabulary import tokens_of
from loraformat.rules.shapes import base_rows, table_rows, updates_of

if TYPE_CHECKING:
    from loraformat.matching.base_fingerprint import Verdict
    from loraformat.model.checkpoint import Checkpoint

# The number of a block: "transformer_blocks.12.".
_BLOCK = re.compile(r"(?<=\.)(\d{1,6})(?=\.)")


def _is_vocabulary(name: str) -> bool:
    from loraformat.matching.ties import is_vocabulary

    return is_vocabulary(name)


def _in_codes(subject: Subject) -> frozenset[str]:
    """Weights that the base stores in codes: their names and shapes say nothing about the adapter, LF309 names them."""
    from loraformat.matching import quantized_weights

    assert subject.base is not None
    assert subject.adapter is not None
    return quantized_weights(subject.base, subject.adapter.updates)


@rule("LF301", Severity.ERROR, since="0.1.0", needs="base")
def absent_module(subject: Subject) -> Iterator[Hit]:
    """The adapter updates a weight that the base does not have.

    ## Why it matters
    Most tools skip such an update without a warning, and write a model that is partly or entirely the unchanged base.

    ## Example
    `model.layers.0.self_attn.q_proj` in the adapter, `language_model.model.layers.0.self_attn.q_proj` in the base.

    ## What to do
    Use the base that the adapter was trained on, with the tensor names of the same library.

    ## Source
    peft 0.21.2, tuners/tuners_utils.py `inject_adapter`; verl issue 7285, sd-scripts issue 1612.
    """
    from loraformat.matching import why_headless

    assert subject.base is not None
    assert subject.adapter is not None
    in_codes = _in_codes(subject)
    absent = _absent_components(subject)
    for component, count in absent.items():
        base = "pipeline" if subject.base.components else "base"
        text = f"the {base} has no weights of this component, but the adapter has {counted(count, 'update')} for it"
        known = f"components with weights: {', '.join(subject.base.components)}"
        yield Hit(component, text, known if subject.base.components else _pick_others(subject, absent))
    other = _other_family(subject)
    unmatched = {
        name: nearest
        for name, nearest in subject.matching.unmatched.items()
        if name not in in_codes and name.partition(".")[0] not in absent
    }
    if other is not None:
        yield other
        return
    if len(unmatched) > 1 and not subject.matching.landings and not absent and not in_codes:
        yield _other_model(subject, unmatched)
        return
    ends = _last_blocks(subject.base)
    for base_weight, nearest in unmatched.items():
        beyond = _beyond(base_weight, ends)
        if beyond:
            yield Hit(base_weight, "the base has no such weight", beyond)
            continue
        headless = why_headless(base_weight, subject.base, subject.adapter)
        yield Hit(base_weight, "the base has no such weight", headless or _instead(base_weight, nearest))


def _other_model(subject: Subject, unmatched: Mapping[str, Sequence[str]]) -> Hit:
    """One hit where no update has a place: a hint for each of them would name weights that have nothing in common."""
    from loraformat.matching import is_namesake

    first = next(iter(unmatched))
    same = next((near[0] for name, near in unmatched.items() if near and is_namesake(name, near[0])), "")
    named = _named(subject)
    hint = f"{named}; this base is probably another model" if named else "the base is probably another model"
    hint += f": its names look like {same}" if same else ""
    text = f"none of the {counted(len(unmatched), 'update')} matches a weight of the base; the first is {first}"
    return Hit("", text, hint)


def _pick_others(subject: Subject, absent: Mapping[str, int]) -> str:
    """The command that keeps the updates of a component of the adapter that the base may have."""
    assert subject.adapter is not None
    components = {subject.adapter.component_of(name) for name in subject.adapter.updates} - {""}
    left = sorted(components - absent.keys()) or sorted(components)
    text = "writes the updates of one component only"
    return f"loraformat pick ADAPTER --select '{left[0]}.*' -o OUT {text}" if left else ""


def _other_family(subject: Subject) -> Hit | None:
    """A hit where the adapter is for another image model than the base: no update of the denoiser has a place."""
    assert subject.adapter is not None
    assert subject.base is not None
    pipeline = subject.adapter.config.pipeline
    if pipeline is None or not pipeline.family or not subject.matching.unmatched:
        return None
    from loraformat.naming.families import denoisers, family_named, likeliest, spelled

    updates = [name for name in subject.adapter.updates if not pipeline.component_of(name).startswith("text_encoder")]
    if not updates or not subject.matching.unmatched.keys() >= set(updates):
        return None
    parts = subject.base.components or {"": subject.base}
    names = [name.removeprefix("model.diffusion_model.") for part in parts.values() for name in part.tensors]
    classes = {part.config.get("_class_name") for part in parts.values()}
    named = [each for each in denoisers() if classes.intersection(each.classes)]
    found = likeliest((spelled(module_of(name)) for name in names), named or denoisers())
    if found is None or found[1].name in pipeline.families:
        return None
    text = f"none of the {counted(len(updates), 'update')} matches a weight of the base: the adapter is for"
    return Hit(updates[0], f"{text} {family_named(pipeline.family).title}, the base is {found[1].title}")


def _last_blocks(base: Checkpoint) -> dict[str, int]:
    """What stands before the number of a block → the greatest number."""
    found: dict[str, int] = {}
    for name in base.tensors:
        for block in _BLOCK.finditer(name):
            before = name[: block.start(1)]
            found[before] = max(found.get(before, 0), int(block[1]))
    return found


def _beyond(weight: str, ends: Mapping[str, int]) -> str:
    """What to say of a weight in a block that the base does not have; "" for another."""
    for block in _BLOCK.finditer(weight):
        before = weight[: block.start(1)]
        if before in ends and int(block[1]) > ends[before]:
            return f"the base's {before.rstrip('.')} end with {ends[before]}, so it is a smaller or a different model"
    return ""


def _absent_components(subject: Subject) -> dict[str, int]:
    """Component of a pipeline that the base does not have → how many unmatched updates are of it."""
    assert subject.base is not None
    assert subject.adapter is not None
    pipeline = subject.adapter.config.pipeline
    there = {*subject.base.components, *([] if pipeline is None else [pipeline.bare, *pipeline.homes])}
    absent: dict[str, int] = {}
    for weight in subject.matching.unmatched if pipeline is not None else ():
        component = subject.adapter.component_of(weight)
        if component not in there and weight.startswith(f"{component}."):
            absent[component] = absent.get(component, 0) + 1
    return absent


def _instead(weight: str, nearest: Sequence[str]) -> str:
    """What the base has: the same module of the same layer under another name, or else only something like it."""
    if not nearest:
        return ""
    from loraformat.matching import is_namesake

    if is_namesake(weight, nearest[0]):
        return f"the base has {nearest[0]}"
    return f"the most similar name in the base is {nearest[0]}; if it is the same weight, rename the tensors"


@rule("LF302", Severity.ERROR, since="0.1.0", needs="base")
def shape_mismatch(subject: Subject) -> Iterator[Hit]:
    """The shape of an update differs from that of its base weight.

    ## Why it matters
    The update cannot be added. The adapter was trained on a model of another size, or on another version of it.

    ## Example
    An update of shape (4096, 4096) for a weight of shape (2048, 2048).

    ## What to do
    Use the base that `base_model_name_or_path` names, at the revision that the adapter was trained on.

    ## Source
    peft 0.21.2, tuners/lora/layer.py `get_delta_weight`.
    """
    in_codes = _in_codes(subject)
    for misfit in subject.matching.misfits:
        if misfit.weight not in in_codes:
            message = f"the update has shape {misfit.update_shape}, but the base weight has {misfit.stored_shape}"
            yield Hit(misfit.weight, message, _OF_GROUPS if misfit.is_grouped else "")


_OF_GROUPS = "the base weight is a grouped (depthwise) convolution, but the update was trained as if it were not"


@rule("LF303", Severity.WARNING, since="0.1.0", needs="base")
def guessed_orientation(subject: Subject) -> Iterator[Hit]:
    """Only the adapter's `fan_in_fan_out` tells whether a square base weight is stored as (in, out).

    ## Why it matters
    PEFT sets that flag to what the last wrapped layer needed, so it can be wrong for the others, and no shape
    contradicts it for a square weight: the update would be added transposed.

    ## Example
    `"fan_in_fan_out": true` and a base weight of shape (768, 768) next to a config.json without `model_type`.

    ## What to do
    Use a config.json that has the base's `model_type`.

    ## Source
    peft 0.21.2, tuners/lora/model.py `_create_new_module`; transformers 5.23.0, pytorch_utils.py `Conv1D`.
    """
    landings = subject.matching.landings
    guessed = [name for name, several in landings.items() if several[0].is_guess]
    if guessed:
        message = "read as (in, out), because the adapter sets fan_in_fan_out and the base does not state the layout"
        yield Hit(first_of(guessed), message)


@rule("LF304", Severity.WARNING, since="0.1.0", needs="base")
def renamed_weights(subject: Subject) -> Iterator[Hit]:
    """No tensor name matches the base as written; all match after adding, removing or replacing one prefix.

    ## Why it matters
    Usually it is right: the adapter was trained on the bare model without its head, or on a class that names its parts
    differently. But engines that need exact names ignore such an adapter silently. And if the class of the base is
    unknown, the prefix was chosen only because the shapes fit: check that it is the part you mean.

    ## Example
    `layers.0.self_attn.q_proj` in the adapter, `model.layers.0.self_attn.q_proj` in the base.

    ## What to do
    Train on the class that the base is loaded as, or run `loraformat convert --base BASE`, which writes the base's
    names.

    ## Source
    peft issue 1579; vllm issue 34186.
    """
    landings = subject.matching.landings
    renamed = {name: several[0].tensor for name, several in landings.items() if several[0].is_prefixed}
    for name, tensor in list(renamed.items())[:1]:
        yield Hit(
            name, f"{counted(len(renamed), 'name', 'is')} matched to the base under other names, this one to {tensor}"
        )


@rule("LF305", Severity.ERROR, since="0.1.0")
def vocabulary_mismatch(subject: Subject) -> Iterator[Hit]:
    """Embedding tables, tokenizer, declared vocabulary and base have different numbers of rows.

    ## Why it matters
    A token whose number exceeds the table reads past its end: at best an error, on some devices arbitrary values. A
    table with fewer rows than the base's removes tokens. More rows than tokens are padding, and harmless.

    ## Example
    An embedding table of 30 rows with a tokenizer whose numbers go up to 31.

    ## What to do
    Use one number everywhere: call `model.resize_token_embeddings(len(tokenizer))` before training, and save both
    together.

    ## Source
    transformers 5.23.0, modeling_utils.py `resize_token_embeddings`.
    """
    assert subject.adapter is not None
    tables = {
        name: rows
        for name, update in updates_of(subject.adapter)
        if (rows := table_rows(name, update)) is not None and _is_vocabulary(name)
    }
    declared = subject.adapter.config.vocab_size
    tokens = tokens_of(subject.adapter.tokenizer)
    for name, rows in tables.items():
        if declared is not None and rows != declared:
            yield Hit(name, f"the config states {declared} rows, but the table has {rows}")
        if tokens is not None and tokens > rows:
            yield Hit(name, f"the tokenizer needs {tokens} rows, but the table has {rows}")
        before = base_rows(subject.base, name)
        if before is not None and rows < before:
            yield Hit(name, f"the base's table has {before} rows, but the adapter's only {rows}")
    if len(set(tables.values())) > 1:
        found = ", ".join(f"{name} {rows}" for name, rows in tables.items())
        yield Hit("", f"expected embedding tables of equal size, found {found}")


@rule("LF320", Severity.ERROR, since="0.1.0", needs="base", forgivable=True)
def other_base(subject: Subject) -> Iterator[Hit]:
    """The base is not the one recorded by `loraformat stamp`.

    ## Why it matters
    A fine-tuned model has the names and shapes of its base, so the adapter loads and merges; but it was trained on
    other values, and does not do what it was trained to do.

    ## Example
    An adapter that `loraformat stamp` bound to a model, and a later fine-tune of that model given as base.

    ## What to do
    Use the recorded base. If you mean this one, use `--force`, or stamp the adapter again.

    ## Source
    docs/decisions/0015-base-fingerprint.md.
    """
    verdict = _verdict(subject)
    if verdict is not None and verdict.is_other:
        yield Hit("", verdict.message, _named(subject))


@rule("LF321", Severity.WARNING, since="0.1.0", needs="base")
def base_in_another_form(subject: Subject) -> Iterator[Hit]:
    """The base is the one recorded by `loraformat stamp` in another form, or the record cannot be read.

    ## Why it matters
    If the values were rounded or quantized, the merged model is close to the one that was trained but not equal. If
    only names differ, nothing changes.

    ## Example
    An adapter for `model`, stamped with its dense weights, and its GPTQ repository given as base.

    ## What to do
    Use the form of the base that the adapter was trained on, if you have it.

    ## Source
    docs/decisions/0015-base-fingerprint.md.
    """
    from loraformat.matching.base_fingerprint import parse

    assert subject.adapter is not None
    stamped = subject.adapter.config.base_fingerprint
    if stamped is not None and parse(stamped) is None:
        yield Hit("", "this version cannot read the adapter's fingerprint of its base, so it was not compared")
    verdict = _verdict(subject)
    if verdict is not None and not verdict.is_other:
        yield Hit("", verdict.message)


def _verdict(subject: Subject) -> Verdict | None:
    assert subject.adapter is not None
    assert subject.base is not None
    if subject.adapter.config.base_fingerprint is None or subject.base.opened is None:
        return None
    return subject.binding


def _named(subject: Subject) -> str:
    assert subject.adapter is not None
    config = subject.adapter.config
    revision = f"@{config.base_revision}" if config.base_revision else ""
    return f"the adapter names {config.base_model}{revision} as its base" if config.base_model else ""
