"""Family 6: what a runtime would do with the adapter (`--target`), as far as its headers and config tell.

Each rule finds one feature; which runtimes refuse it or leave it out in silence stands in runtimes.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat.diagnostics import FindingLocation, Severity, counted, in_file
from loraformat.model.adapter import module_of
from loraformat.model.updates import Dense, kind_of, rank_of
from loraformat.rules.base import Hit, Subject, rule
from loraformat.rules.config import PEFT_FILE, peft_config
from loraformat.rules.shapes import updates_of

if TYPE_CHECKING:
    from loraformat.rules.targets import Line, Target


def hits_for_targets(subject: Subject, code: str, where: str | FindingLocation, what: str) -> Iterator[Hit]:
    """A hit for each target that has a line about the feature."""
    for target in subject.targets:
        for line in target.lines_for(code, subject.format):
            yield hit_of(target, line, where, what)


def hit_of(target: Target, line: Line, where: str | FindingLocation, what: str) -> Hit:
    """The feature `what`, and what the table says that the runtime does with it."""
    verdict = f'refuses it: "{line.message}"' if line.verdict == "refuses" else f"ignores it: {line.message}"
    return Hit(where, f"{what}; {target.label} {verdict}", line.help)


def highest_rank(subject: Subject) -> int:
    """Of all updates; 0 where none has one."""
    assert subject.adapter is not None
    return max((rank_of(update) or 0 for _, update in updates_of(subject.adapter)), default=0)


@rule("LF601", Severity.WARNING, since="0.1.0", needs="target")
def rank_above_default(subject: Subject) -> Iterator[Hit]:
    """The rank is greater than what the runtime allows unless it is told otherwise.

    ## Why is this bad?
    The server refuses the adapter when it is loaded, which may be long after it was started.

    ## Example
    Rank 64; vLLM allows 16 by default.

    ## Use instead
    `--max-lora-rank 64` when the server is started. Give the same to `loraformat validate`, and it checks against it.

    ## Source
    vllm 0.33.0, lora/peft_helper.py:193 and config/lora.py:27; vllm issue 2847.
    """
    rank = highest_rank(subject)
    for target in subject.targets:
        limit = target.default_rank
        if subject.max_rank is None and limit is not None and rank > limit and rank <= (target.most_rank or rank):
            setting = f"{target.rank_option} {target.setting_for(rank)}"
            yield Hit("", f"rank {rank} needs {setting}; {target.label} allows {limit} by default")


@rule("LF602", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_replacement(subject: Subject) -> Iterator[Hit]:
    """The adapter replaces whole weights, and the runtime cannot.

    ## Why is this bad?
    `modules_to_save`, resized embeddings and trained tokens are part of what was trained. Without them the model is
    another one.

    ## Example
    `"modules_to_save": ["lm_head"]` in vLLM.

    ## Use instead
    Merge the adapter and serve the merged model.

    ## Source
    loraformat/rules/runtimes.json, the lines LF602; vllm issue 9280.
    """
    assert subject.adapter is not None
    replaced = [
        name
        for name, update in updates_of(subject.adapter)
        if kind_of(update).overwrites and not name.endswith(".bias")  # LF604 says so
    ]
    for target in subject.targets:
        for line in target.lines_for("LF602", subject.format):
            names = [name for name in replaced if not set(name.split(".")) & set(line.allowed)]
            if names:
                yield hit_of(target, line, names[0], f"{counted(len(names), 'weight', 'is')} replaced")


@rule("LF603", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_dora(subject: Subject) -> Iterator[Hit]:
    """The adapter is a DoRA, and the runtime does not know its magnitudes.

    ## Why is this bad?
    Without the magnitudes the update has another direction and strength.

    ## Example
    `"use_dora": true` in vLLM, which refuses it; in TGI, which does not look.

    ## Use instead
    Merge the adapter and serve the merged model.

    ## Source
    loraformat/rules/runtimes.json, the lines LF603.
    """
    assert subject.adapter is not None
    found = [name for name, update in updates_of(subject.adapter) if kind_of(update).name == "dora"]
    if found:
        yield from hits_for_targets(subject, "LF603", found[0], "a DoRA magnitude")


@rule("LF604", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_bias(subject: Subject) -> Iterator[Hit]:
    """The adapter trains biases, and the runtime does not read them.

    ## Why is this bad?
    Part of what was trained is refused or left out.

    ## Example
    `"bias": "all"`.

    ## Use instead
    Merge the adapter and serve the merged model.

    ## Source
    loraformat/rules/runtimes.json, the lines LF604.
    """
    assert subject.adapter is not None
    bias = peft_config(subject).get("bias")
    every = updates_of(subject.adapter)
    names = [name for name, update in every if isinstance(update, Dense) or name.endswith(".bias")]
    if isinstance(bias, str) and bias != "none":
        yield from hits_for_targets(subject, "LF604", in_file(PEFT_FILE, "bias"), f'"{bias}"')
    elif names:
        yield from hits_for_targets(subject, "LF604", names[0], "a trained bias")


@rule("LF605", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_module(subject: Subject) -> Iterator[Hit]:
    """The adapter changes a kind of module that the runtime does not adapt.

    ## Why is this bad?
    The upload is refused, or the module is left out.

    ## Example
    `embed_tokens` on a host that adapts the projections of attention and MLP only.

    ## Use instead
    Train the modules that the runtime knows; or serve the merged model.

    ## Source
    loraformat/rules/runtimes.json, `targets`.
    """
    assert subject.adapter is not None
    for target in subject.targets:
        kinds = {module_of(name).rpartition(".")[2] for name, update in updates_of(subject.adapter) if rank_of(update)}
        strange = sorted(kinds - set(target.modules)) if target.modules else []
        for line in target.lines_for("LF605", subject.format):
            if strange:
                yield hit_of(target, line, "", f"modules {', '.join(strange[:5])}")


@rule("LF606", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def ignored_rslora(subject: Subject) -> Iterator[Hit]:
    """The scale is alpha / sqrt(rank), and the runtime computes alpha / rank.

    ## Why is this bad?
    The update is applied sqrt(rank) times too weakly, eight times at rank 64, and nothing says so.

    ## Example
    `"use_rslora": true` in SGLang.

    ## Use instead
    alpha · sqrt(rank) as `lora_alpha` with `use_rslora` false; or the merged model.

    ## Source
    Kalajdzievski 2023, arXiv 2312.03732; loraformat/rules/runtimes.json, the lines LF606.
    """
    if peft_config(subject).get("use_rslora") is True:
        yield from hits_for_targets(subject, "LF606", in_file(PEFT_FILE, "use_rslora"), "scale alpha / sqrt(rank)")


@rule("LF607", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def ignored_alpha_pattern(subject: Subject) -> Iterator[Hit]:
    """Some modules have an alpha of their own, and the runtime applies one alpha to all.

    ## Why is this bad?
    Those modules are applied too strongly or too weakly, and nothing says so.

    ## Example
    `"alpha_pattern": {"q_proj": 32}` in llama.cpp.

    ## Use instead
    The factor folded into `lora_B` of those modules; or the merged model.

    ## Source
    loraformat/rules/runtimes.json, the lines LF607; sglang issue 40835.
    """
    if peft_config(subject).get("alpha_pattern"):
        yield from hits_for_targets(
            subject, "LF607", in_file(PEFT_FILE, "alpha_pattern"), "modules with an alpha of their own"
        )


@rule("LF608", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def ignored_rank_pattern(subject: Subject) -> Iterator[Hit]:
    """Some modules have a rank of their own, and the runtime expects one rank.

    ## Why is this bad?
    It refuses the tensors when they are first used, or divides alpha by the wrong rank.

    ## Example
    `"rank_pattern": {"q_proj": 32}` in SGLang.

    ## Use instead
    All modules padded with zeros to one rank, and alpha adapted; or the merged model.

    ## Source
    loraformat/rules/runtimes.json, the lines LF608.
    """
    if peft_config(subject).get("rank_pattern"):
        yield from hits_for_targets(
            subject, "LF608", in_file(PEFT_FILE, "rank_pattern"), "modules with a rank of their own"
        )


@rule("LF609", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unconverted_initialisation(subject: Subject) -> Iterator[Hit]:
    """The initialisation changed the base's weights, and the runtime applies the adapter to the weights as they were.

    ## Why is this bad?
    PiSSA, OLoRA, CorDA and LoftQ take a part out of the base before training. On the base as published that part is
    there twice.

    ## Example
    `"init_lora_weights": "pissa"`.

    ## Use instead
    The adapter converted to plain LoRA: `save_pretrained(path_initial_model_for_weight_conversion=…)` in PEFT.

    ## Source
    Meng et al. 2024, arXiv 2404.02948; vllm 0.33.0, lora/peft_helper.py:70.
    """
    init = peft_config(subject).get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq")):
        yield from hits_for_targets(subject, "LF609", in_file(PEFT_FILE, "init_lora_weights"), f'"{init}"')


@rule("LF610", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_container(subject: Subject) -> Iterator[Hit]:
    """The weights lie in a pickle, and the runtime reads safetensors only.

    ## Why is this bad?
    The adapter is not found.

    ## Example
    `adapter_model.bin` in TGI.

    ## Use instead
    `loraformat convert ADAPTER --to peft -o OUT`.

    ## Source
    loraformat/rules/runtimes.json, the lines LF610.
    """
    files = subject.bundle.files
    if "adapter_model.bin" in files and "adapter_model.safetensors" not in files:
        yield from hits_for_targets(subject, "LF610", in_file("adapter_model.bin"), "no safetensors file")


@rule("LF611", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_key(subject: Subject) -> Iterator[Hit]:
    """Tensor names carry a wrapper's prefix or an adapter's name, and the runtime wants them plain.

    ## Why is this bad?
    The runtime refuses such a name or finds nothing under the one it looks for.

    ## Example
    `….q_proj.lora_A.default.weight`.

    ## Use instead
    `loraformat convert ADAPTER --to peft -o OUT` writes plain names.

    ## Source
    vllm 0.33.0, lora/utils.py:233; loraformat/rules/runtimes.json, the lines LF611.
    """
    assert subject.adapter is not None
    for note in subject.adapter.notes:
        if note.code == "LF221":
            yield from hits_for_targets(subject, "LF611", note.location, note.message.partition(";")[0])
