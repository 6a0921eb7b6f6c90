"""Family 6: how a runtime would load the adapter (`--target`), judging by headers and config.

Each rule finds one feature; runtimes.json lists the runtimes that refuse or silently ignore it.
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


def hits_for_targets(
    subject: Subject, code: str, where: str | FindingLocation, what: str, *, pronoun: str = "it"
) -> Iterator[Hit]:
    """A hit for each target that has a line about the feature."""
    for target in subject.targets:
        for line in target.lines_for(code, subject.format):
            yield hit_of(target, line, where, what, pronoun=pronoun)


def hit_of(target: Target, line: Line, where: str | FindingLocation, what: str, *, pronoun: str = "it") -> Hit:
    """The feature `what`, and what the table says that the runtime does with it.

    Args: pronoun: "them" where `what` is several things.
    """
    message = f'"{line.message}"' if line.verdict == "refuses" else line.message
    verdict = f"{line.verdict} {pronoun}: {message}"
    return Hit(where, f"{what}; {target.label} {verdict}", line.help)


def highest_rank(subject: Subject) -> int:
    """Of all updates; 0 where none has one."""
    assert subject.adapter is not None
    return max((rank_of(update) or 0 for _, update in updates_of(subject.adapter)), default=0)


@rule("LF601", Severity.WARNING, since="0.1.0", needs="target")
def rank_above_default(subject: Subject) -> Iterator[Hit]:
    """The rank is higher than the runtime allows by default.

    ## Why it matters
    The server rejects the adapter when it loads it, which may be long after it started.

    ## Example
    Rank 64; vLLM allows 16 by default.

    ## What to do
    Start the server with `--max-lora-rank 64`. Pass the same option to `loraformat validate` to check against it.

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
    """The adapter replaces whole weights, which the runtime does not support.

    ## Why it matters
    `modules_to_save`, resized embeddings and trained tokens are part of what was trained. Without them it is a
    different model.

    ## Example
    `"modules_to_save": ["lm_head"]` in vLLM.

    ## What to do
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
                them = "it" if len(names) == 1 else "them"
                yield hit_of(target, line, names[0], f"{counted(len(names), 'weight', 'is')} replaced", pronoun=them)


@rule("LF603", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_dora(subject: Subject) -> Iterator[Hit]:
    """The adapter is a DoRA, whose magnitudes the runtime does not support.

    ## Why it matters
    Without the magnitudes the update has another direction and strength.

    ## Example
    `"use_dora": true` in vLLM, which refuses it, or in TGI, which ignores it.

    ## What to do
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
    """The adapter has trained biases, which the runtime does not read.

    ## Why it matters
    Part of what was trained is refused or left out.

    ## Example
    `"bias": "all"`.

    ## What to do
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

    ## Why it matters
    The upload is rejected, or the module is ignored.

    ## Example
    `embed_tokens` on a host that adapts only the projections of attention and MLP.

    ## What to do
    Train only modules that the runtime supports, or serve the merged model.

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
    """The scale is alpha / sqrt(rank), but the runtime computes alpha / rank.

    ## Why it matters
    The update is applied too weakly by a factor of sqrt(rank), eight at rank 64, without a warning.

    ## Example
    `"use_rslora": true` in SGLang.

    ## What to do
    Set `lora_alpha` to alpha · sqrt(rank) and `use_rslora` to false (`loraformat convert --plain`), or serve the merged
    model.

    ## Source
    Kalajdzievski 2023, arXiv 2312.03732; loraformat/rules/runtimes.json, the lines LF606.
    """
    if peft_config(subject).get("use_rslora") is True:
        yield from hits_for_targets(subject, "LF606", in_file(PEFT_FILE, "use_rslora"), "scale alpha / sqrt(rank)")


@rule("LF607", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def ignored_alpha_pattern(subject: Subject) -> Iterator[Hit]:
    """Some modules have their own alpha, but the runtime applies one alpha to all.

    ## Why it matters
    Those modules are applied too strongly or too weakly, without a warning.

    ## Example
    `"alpha_pattern": {"q_proj": 32}` in llama.cpp.

    ## What to do
    Fold the factor into `lora_B` of those modules (`loraformat convert --plain`), or serve the merged model.

    ## Source
    loraformat/rules/runtimes.json, the lines LF607; sglang issue 40835.
    """
    if peft_config(subject).get("alpha_pattern"):
        yield from hits_for_targets(
            subject, "LF607", in_file(PEFT_FILE, "alpha_pattern"), "modules with an alpha of their own", pronoun="them"
        )


@rule("LF608", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def ignored_rank_pattern(subject: Subject) -> Iterator[Hit]:
    """Some modules have their own rank, but the runtime expects a single rank.

    ## Why it matters
    It rejects the tensors when they are first used, or divides alpha by the wrong rank.

    ## Example
    `"rank_pattern": {"q_proj": 32}` in SGLang.

    ## What to do
    Pad all modules with zeros to one rank and adapt alpha (`loraformat convert --plain`), or serve the merged model.

    ## Source
    loraformat/rules/runtimes.json, the lines LF608.
    """
    if peft_config(subject).get("rank_pattern"):
        yield from hits_for_targets(
            subject, "LF608", in_file(PEFT_FILE, "rank_pattern"), "modules with a rank of their own", pronoun="them"
        )


@rule("LF609", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unconverted_initialization(subject: Subject) -> Iterator[Hit]:
    """The initialization changed the base's weights, but the runtime applies the adapter to the original weights.

    ## Why it matters
    PiSSA, OLoRA, CorDA and LoftQ subtract a part from the base before training. On the published base that part is
    counted twice.

    ## Example
    `"init_lora_weights": "pissa"`.

    ## What to do
    Convert the adapter to plain LoRA: `save_pretrained(path_initial_model_for_weight_conversion=…)` in PEFT.

    ## Source
    Meng et al. 2024, arXiv 2404.02948; vllm 0.33.0, lora/peft_helper.py:70.
    """
    init = peft_config(subject).get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq")):
        yield from hits_for_targets(subject, "LF609", in_file(PEFT_FILE, "init_lora_weights"), f'"{init}"')


@rule("LF610", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_container(subject: Subject) -> Iterator[Hit]:
    """The weights are in a pickle, but the runtime reads only safetensors.

    ## Why it matters
    The runtime does not find the adapter.

    ## Example
    `adapter_model.bin` in TGI.

    ## What to do
    Run `loraformat convert ADAPTER --to peft -o OUT`.

    ## Source
    loraformat/rules/runtimes.json, the lines LF610.
    """
    files = subject.bundle.files
    if "adapter_model.bin" in files and "adapter_model.safetensors" not in files:
        yield from hits_for_targets(subject, "LF610", in_file("adapter_model.bin"), "no safetensors file")


@rule("LF611", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_key(subject: Subject) -> Iterator[Hit]:
    """Tensor names contain a wrapper's prefix or an adapter's name, which the runtime does not expect.

    ## Why it matters
    The runtime rejects such names, or does not find the ones that it looks for.

    ## Example
    `….q_proj.lora_A.default.weight`.

    ## What to do
    Run `loraformat convert ADAPTER --to peft -o OUT`, which writes plain names.

    ## Source
    vllm 0.33.0, lora/utils.py:233; loraformat/rules/runtimes.json, the lines LF611.
    """
    assert subject.adapter is not None
    for note in subject.adapter.notes:
        if note.code == "LF221":
            yield from hits_for_targets(subject, "LF611", note.location, note.message)
