"""Family 6, second part: requirements of a runtime on the adapter as a whole."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.diagnostics import Severity, in_file
from loraformat.model.adapter import module_of
from loraformat.model.summary import layer_of
from loraformat.model.updates import LowRank, rank_of
from loraformat.rules.base import Hit, Subject, rule
from loraformat.rules.config import PEFT_FILE, peft_config
from loraformat.rules.runtimes.loading import highest_rank, hit_of, hits_for_targets
from loraformat.rules.shapes import updates_of


@rule("LF612", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_target_expression(subject: Subject) -> Iterator[Hit]:
    r"""`target_modules` is a regular expression, but the runtime needs a list.

    ## Why it matters
    The adapter is rejected, although its tensors are fine.

    ## Example
    `"target_modules": ".*\\.(q|v)_proj"` in SGLang.

    ## What to do
    Write `"target_modules": ["q_proj", "v_proj"]`.

    ## Source
    sglang 0.5.23, srt/lora/lora_config.py.
    """
    targets = peft_config(subject).get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield from hits_for_targets(subject, "LF612", in_file(PEFT_FILE, "target_modules"), "a regular expression")


@rule("LF613", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_kind(subject: Subject) -> Iterator[Hit]:
    """The runtime does not support this kind of adapter.

    ## Why it matters
    It is rejected, or loaded as if it were empty.

    ## Example
    `"peft_type": "LOHA"` in vLLM; `"MISS"` in PEFT 0.13.

    ## What to do
    Merge the adapter and serve the merged model; for PEFT, use a version that supports the kind.

    ## Source
    loraformat/rules/runtimes.json, the lines LF613 and `kinds`.
    """
    kind = peft_config(subject).get("peft_type")
    if not isinstance(kind, str):
        return
    for target in subject.targets:
        is_missing = target.lacks(target.kinds.get(kind)) if target.kinds is not None else kind != "LORA"
        for line in target.lines_for("LF613", subject.format):
            if is_missing:
                yield hit_of(target, line, in_file(PEFT_FILE, "peft_type"), f'"{kind}"')


@rule("LF614", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def fractional_setting(subject: Subject) -> Iterator[Hit]:
    """`r` or `lora_alpha` has a fraction or a decimal point, but the runtime needs an integer.

    ## Why it matters
    Its JSON reader rejects the file.

    ## Example
    `"lora_alpha": 16.0` in Ollama.

    ## What to do
    Write `"lora_alpha": 16`. A true fraction has to be folded into `lora_B`.

    ## Source
    ollama fb30760, convert/convert_llama_adapter.go.
    """
    for field in ("r", "lora_alpha"):
        value = peft_config(subject).get(field)
        if isinstance(value, float):
            yield from hits_for_targets(subject, "LF614", in_file(PEFT_FILE, field), f"{value!r} is not an integer")


@rule("LF615", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unknown_to_version(subject: Subject) -> Iterator[Hit]:
    """The config has settings that this version of PEFT does not know.

    ## Why it matters
    Before 0.14, PEFT rejects every unknown setting, even null. Since then it drops them with a warning and, if they
    have a value, builds a different model.

    ## Example
    `"target_parameters": ["mlp.experts.down_proj"]` in PEFT 0.15; `"eva_config": null` in PEFT 0.13.

    ## What to do
    Use the PEFT that wrote it, or a newer one; settings that are null can be removed (`loraformat convert
    --peft-version`).

    ## Source
    peft 0.13.2 and 0.14.0, config.py `from_peft_type`; peft issues 2275 and 1979.
    """
    raw = peft_config(subject)
    for target in subject.targets:
        known = target.settings
        if known is None or raw.get("peft_type") != "LORA":
            continue
        unknown = sorted(name for name in raw if target.lacks(known.get(name)))
        for line in target.lines_for("LF615", subject.format):
            names = [name for name in unknown if line.verdict == "refuses" or (raw[name] and name != "peft_version")]
            if names:
                them = "it" if len(names) == 1 else "them"
                what = f"unknown setting{'s' if len(names) > 1 else ''}: {', '.join(names[:8])}"
                yield hit_of(target, line, f"{PEFT_FILE}: {names[0]}", what, pronoun=them)


@rule("LF616", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_embedding(subject: Subject) -> Iterator[Hit]:
    """The adapter has LoRA factors for an embedding or the output head, which the runtime does not read.

    ## Why it matters
    Part of what was trained is ignored.

    ## Example
    `lora_embedding_A` of `embed_tokens` in TGI.

    ## What to do
    Merge the adapter and serve the merged model.

    ## Source
    loraformat/rules/runtimes.json, the lines LF616.
    """
    assert subject.adapter is not None
    for name, update in updates_of(subject.adapter):
        if isinstance(update, LowRank) and (update.is_embedding or module_of(name).endswith("lm_head")):
            yield from hits_for_targets(subject, "LF616", name, "factors of an embedding or head", pronoun="them")
            return


@rule("LF617", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unsupported_experts(subject: Subject) -> Iterator[Hit]:
    """The factors are stacks of experts, but the runtime needs one matrix per expert, or does not support experts.

    ## Why it matters
    Three-dimensional tensors are rejected, or their experts are read in another order.

    ## Example
    `"target_parameters": ["mlp.experts.gate_up_proj"]`.

    ## What to do
    Merge the adapter and serve the merged model.

    ## Source
    loraformat/rules/runtimes.json, the lines LF617.
    """
    assert subject.adapter is not None
    for name, update in updates_of(subject.adapter):
        if isinstance(update, LowRank) and update.is_stack:
            yield from hits_for_targets(subject, "LF617", name, f"a stack of {update.up.shape[0]} experts")
            return


@rule("LF618", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def unpaired_projection(subject: Subject) -> Iterator[Hit]:
    """`q_proj` is adapted without `v_proj` in some layer, but the runtime fuses the two.

    ## Why it matters
    It fails with a KeyError when the adapter is loaded.

    ## Example
    `"target_modules": ["q_proj", "o_proj"]` in SGLang.

    ## What to do
    Train `q_proj`, `k_proj` and `v_proj` together, or serve the merged model.

    ## Source
    sglang 0.5.23, srt/lora/lora.py.
    """
    assert subject.adapter is not None
    names = {module_of(name) for name in subject.adapter.updates}
    for name in sorted(names):
        if name.endswith(".q_proj") and f"{name.removesuffix('q_proj')}v_proj" not in names:
            yield from hits_for_targets(subject, "LF618", name, "no v_proj next to q_proj")
            return


@rule("LF619", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def foreign_format(subject: Subject) -> Iterator[Hit]:
    """The runtime does not read adapters of this format.

    ## Why it matters
    It does not find an adapter in the folder.

    ## Example
    A PEFT adapter for MLX-LM, where factors are transposed and have other names.

    ## What to do
    Run `loraformat convert ADAPTER --to FORMAT -o OUT`; the hint names the format.

    ## Source
    loraformat/rules/runtimes.json, `reads` and the lines LF619.
    """
    for target in subject.targets:
        for line in target.lines_for("LF619", subject.format):
            if subject.format not in target.reads:
                yield hit_of(target, line, "", f"this is a {subject.format} adapter")


@rule("LF620", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def rank_above_limit(subject: Subject) -> Iterator[Hit]:
    """The rank is higher than the runtime can be configured to allow, or than `--max-lora-rank`.

    ## Why it matters
    The adapter is rejected when it is loaded.

    ## Example
    Rank 128 and `--max-lora-rank 64`; rank 1024 in vLLM, which ends at 512.

    ## What to do
    Use a lower rank (`loraformat resize`), a server with a higher limit, or the merged model.

    ## Source
    vllm 0.33.0, config/lora.py:34; docs.fireworks.ai, fine-tuning/fine-tuned-import.
    """
    rank = highest_rank(subject)
    for target in subject.targets:
        limits = [limit for limit in (subject.max_rank, target.most_rank) if limit is not None]
        if limits and rank > min(limits):
            yield Hit("", f"rank {rank} is above {min(limits)}, the limit of {target.label}", "use a lower rank")


@rule("LF621", Severity.ERROR, since="0.1.0", needs="target", forgivable=True)
def uneven_layers(subject: Subject) -> Iterator[Hit]:
    """A kind of module is adapted only in some layers, so the runtime ignores it in all of them.

    ## Why it matters
    These modules have no effect at all, and there is no warning.

    ## Example
    `down_proj` in the upper half of the layers, in TGI.

    ## What to do
    Add all-zero factors for the other layers, or serve the merged model.

    ## Source
    text-generation-inference db931fc, adapters/lora.py:45.
    """
    assert subject.adapter is not None
    layers: dict[str, set[int]] = {}
    for name, update in updates_of(subject.adapter):
        layer = layer_of(name)
        if rank_of(update) and layer is not None:
            layers.setdefault(module_of(name).rpartition(".")[2], set()).add(layer)
    everywhere = set().union(*layers.values()) if layers else set()
    for kind, found in sorted(layers.items()):
        if found != everywhere:
            yield from hits_for_targets(subject, "LF621", kind, f"in {len(found)} of {len(everywhere)} adapted layers")
