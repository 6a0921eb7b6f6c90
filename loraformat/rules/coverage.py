"""Family 3, second part: which weights of the base an adapter covers, and what kind of base it is."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.diagnostics import Severity, counted, in_file, listed
from loraformat.model.adapter import module_of
from loraformat.model.updates import LowRank, Replace
from loraformat.rules.base import Hit, Subject, rule
from loraformat.rules.config import config_at
from loraformat.rules.shapes import updates_of

_MOST_LISTED = 3


@rule("LF306", Severity.INFO, since="0.1.0", needs="base")
def lands_in_part(subject: Subject) -> Iterator[Hit]:
    """An update applies to rows of a larger tensor of the base: a fused projection or a stack of experts.

    ## Why it matters
    loraformat maps the rows correctly. Engines that look for a tensor with the update's own name do not find it and
    skip the update.

    ## Example
    `q_proj` in the adapter, `qkv_proj` in the base.

    ## What to do
    Nothing for a merge. For serving, use an adapter with the names of the engine's own model.

    ## Source
    transformers 5.23.0, conversion_mapping.py; docs/decisions/0004-names-in-memory.md.
    """
    from loraformat.matching import WHOLE

    landings = subject.matching.landings
    parts = [name for name, pieces in landings.items() if any(piece.part != WHOLE for piece in pieces)]
    if parts:
        tensor = landings[parts[0]][0].tensor
        yield Hit(parts[0], f"{counted(len(parts), 'update')} of parts of tensors, this one of {tensor}")


@rule("LF307", Severity.WARNING, since="0.1.0", needs="base")
def uncovered_module(subject: Subject) -> Iterator[Hit]:
    """The adapter has no tensors for modules of the base that `target_modules` selects.

    ## Why it matters
    Training adapts every selected module. If some have no tensors, part of the adapter was lost, or this base has more
    layers than the one that it was trained on.

    ## Example
    `"target_modules": ["q_proj"]` with tensors for layers 0 to 15, and a base of 32 layers.

    ## What to do
    Use the complete adapter on its own base. If only some layers were meant, list them in `layers_to_transform`.

    ## Source
    peft 0.21.2, tuners/tuners_utils.py `inject_adapter`; set_peft_model_state_dict leaves missing layers at zero.
    """
    assert subject.adapter is not None
    assert subject.base is not None
    config = subject.adapter.config
    if not isinstance(config.targets, tuple) or any(
        config.raw.get(f) for f in ("layers_to_transform", "exclude_modules")
    ):
        return
    found = subject.matching
    reached = {piece.tensor for pieces in found.landings.values() for piece in pieces}
    if found.unmatched or any(piece.is_prefixed for pieces in found.landings.values() for piece in pieces):
        return
    targets = {target for target in config.targets if "." not in target}
    missing = sorted(
        name
        for name, tensor in subject.base.tensors.items()
        if name not in reached and len(tensor.shape) == 2 and name.endswith(".weight") and _last(name) in targets
    )
    used = {_last(name) for name in reached}
    missing = [name for name in missing if _last(name) in used]
    if missing:
        names = listed([module_of(name) for name in missing], _MOST_LISTED)
        yield Hit(config_at(subject, "target_modules"), f"no tensors for {names} of the base")


@rule("LF308", Severity.WARNING, since="0.1.0", needs="base")
def tied_table(subject: Subject) -> Iterator[Hit]:
    """The adapter changes only one of two tied weights of the base: embedding or head.

    ## Why it matters
    Tools differ in whether the other one follows: PEFT's merge changes both, the running PEFT model only one, and GGUF
    conversion refuses. The merged model may not be the one that was trained.

    ## Example
    LoRA on `lm_head` of a model with `"tie_word_embeddings": true`.

    ## What to do
    Use `loraformat merge`, which writes what the running model computes and unties the tables if necessary (LF810). For
    serving, leave embedding and head out of the targets.

    ## Source
    peft issue 2777; docs/decisions/0002-tied-tables.md.
    """
    assert subject.adapter is not None
    assert subject.base is not None
    from loraformat.matching import ties_of

    for tie in ties_of(subject.base, subject.adapter.updates):
        changed = [
            name
            for name, update in updates_of(subject.adapter)
            if name in tie.names
            and (isinstance(update, LowRank) or (isinstance(update, Replace) and not update.follows_tie))
        ]
        if changed and len(set(changed)) < len(tie.names):
            other = next(name for name in tie.names if name not in changed)
            yield Hit(changed[0], f"this weight is tied to {other} in the base")


@rule("LF310", Severity.INFO, since="0.1.0", needs="base")
def base_without_config(subject: Subject) -> Iterator[Hit]:
    """There is no config.json next to the base's weights.

    ## Why it matters
    The class of the model decides how some weights are stored and which tables are tied. Without it, loraformat has to
    judge by names and shapes, which leave some cases open.

    ## Example
    A single `model.safetensors` as `--base`.

    ## What to do
    Pass the folder of the model, with its config.json.

    ## Source
    transformers 5.23.0, configuration_utils.py.
    """
    assert subject.base is not None
    if not subject.base.config and not subject.base.settings:
        yield Hit(in_file("config.json"), "the base has no config.json")


def _last(name: str) -> str:
    return module_of(name).rpartition(".")[2]
