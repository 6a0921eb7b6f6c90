"""Family 3: how the base is quantized, and whether its settings are right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat.diagnostics import Finding, Severity, counted, in_file
from loraformat.rules.base import Hit, Subject, first_of, rule

if TYPE_CHECKING:
    from loraformat.model.checkpoint import Checkpoint

_CHOICES = "merge with --dequantize (all weights dense) or --keep-quantized (only those that change)"


@rule("LF309", Severity.WARNING, since="0.1.0", needs="base")
def quantized_base(subject: Subject) -> Iterator[Hit]:
    """The base is quantized with an unsupported scheme.

    ## Why it matters
    Its tensors are codes and scales that loraformat cannot decode. Adapters cannot be merged into them, and names and
    shapes cannot be compared.

    ## Example
    `"quantization_config": {"quant_method": "hqq"}`, or `qweight` together with `scales` in a base that names no
    method.

    ## What to do
    Use a base in one of the schemes that docs/quantized.md lists, or the 16-bit model that it was made from.

    ## Source
    transformers 5.23.0, quantizers/; Dettmers et al. 2023, arXiv 2305.14314.
    """
    from loraformat.matching import quantization_of, quantized_weights

    assert subject.base is not None
    assert subject.adapter is not None
    found = quantization_of(subject.base)
    if found is None:
        return
    count = len(quantized_weights(subject.base, subject.adapter.updates))
    compared = (
        f"; {counted(count, 'quantized weight')} of the adapter {'was' if count == 1 else 'were'} not compared"
        if count
        else ""
    )
    yield Hit(found.where, f"the base is quantized: {found.scheme}{compared}")


@rule("LF311", Severity.INFO, since="0.1.0", needs="base")
def dequantized_base(subject: Subject) -> Iterator[Hit]:
    """The base is quantized; its weights were dequantized for reading.

    ## Why it matters
    Shapes, norms and values are those of the dense weights. A merge needs an option that says what to do with the
    codes, because the sum of weight and update is not a value that the codes can represent.

    ## Example
    A base in bitsandbytes, GPTQ, AWQ, FP8, MXFP4, compressed-tensors or ModelOpt.

    ## What to do
    Use `merge --dequantize` to write all weights dense. `merge --keep-quantized` writes only changed weights dense,
    together with those that are loaded fused with them, and keeps the codes of all others.

    ## Source
    docs/quantized.md, with a source for each scheme.
    """
    assert subject.base is not None
    quantized = subject.base.quantized
    if quantized is None:
        return
    reached = sum(landings[0].tensor in quantized.weights for landings in subject.matching.landings.values())
    text = f"the base is quantized: {quantized.scheme}, {counted(len(quantized.weights), 'weight')} stored as codes"
    yield Hit(in_file("config.json"), f"{text}, {reached} of them adapted", _CHOICES if reached else "")


@rule("LF312", Severity.WARNING, since="0.1.0", needs="base")
def leftover_quantization(subject: Subject) -> Iterator[Hit]:
    """The base is dense, but its files say that it is quantized.

    ## Why it matters
    A tool that wrote the weights dense left the quantization settings behind. Programs that load the model look for
    codes, or quantize it again. A merge copies these settings.

    ## Example
    `"quantization_config": {"quant_method": "bitsandbytes"}` above weights in bfloat16.

    ## What to do
    Remove `quantization_config` from config.json, and any `hf_quant_config.json`, `quantize_config.json` or
    `quant_config.json` next to it.

    ## Source
    unsloth issue 1601, open-instruct issue 149; vllm 0.33.0, quantization `get_config_filenames`.
    """
    from loraformat.matching import left_over

    assert subject.base is not None
    found = left_over(subject.base)
    if found is not None:
        yield Hit(found.where, f"states {found.scheme}, but all weights of the base are dense", "remove it")


@rule("LF313", Severity.WARNING, since="0.1.0", needs="base")
def codes_without_settings(subject: Subject) -> Iterator[Hit]:
    """Weights of the base are stored as codes, but no file names the quantization method.

    ## Why it matters
    The meaning of codes depends on settings: the group size, and how zero points are stored. Nobody can load the model,
    and what looks like one scheme may be another.

    ## Example
    `q_proj.weight.absmax` in a base whose config.json has no `quantization_config` because a tool deleted it.

    ## What to do
    Restore the `quantization_config` of the model that the base was copied from.

    ## Source
    transformers 5.23.0, quantizers/auto.py, which reads it from config.json.
    """
    from loraformat.matching import code_owner, quantization_of

    assert subject.base is not None
    found = quantization_of(subject.base)
    if found is None or found.where.file:
        return
    names = [name for name in subject.base.tensors if code_owner(subject.base, name) is not None]
    if names:
        yield Hit(first_of(names), "stored quantized, but no config names the method")


@rule("LF314", Severity.INFO, since="0.1.0", needs="base")
def doubtful_settings(subject: Subject) -> Iterator[Hit]:
    """The base's quantization settings contradict its tensors, or cannot be checked against them.

    ## Why it matters
    Some published GPTQ models are labeled with the wrong version of the format. Read by the label, every weight is off
    by a whole scale. Symmetric codes reveal the version by their zero points, which are trusted; asymmetric ones do
    not.

    ## Example
    `"checkpoint_format": "gptq"` and zero points of 8 at 4 bits, which is what gptq_v2 stores.

    ## What to do
    Use the label that agrees with the zero points.

    ## Source
    vllm pull request 38966; gptqmodel 7.7.0, utils/model.py `convert_gptq_v1_to_v2_format`.
    """
    assert subject.base is not None
    yield from _remarks(subject.base)


def doubts(base: Checkpoint) -> Iterator[Finding]:
    """LF314 of a base, for verbs that read it without an adapter."""
    return (doubtful_settings.finding(hit) for hit in _remarks(base))


def _remarks(base: Checkpoint) -> Iterator[Hit]:
    remarks: dict[str, list[str]] = {}
    for name, weight in base.quantized.weights.items() if base.quantized is not None else ():
        if weight.remark:
            remarks.setdefault(weight.remark, []).append(name)
    for remark, names in remarks.items():
        yield Hit(first_of(names), remark)


@rule("LF315", Severity.WARNING, since="0.1.0", needs="base")
def mixed_precision_group(subject: Subject) -> Iterator[Hit]:
    """Of modules that are loaded as one matrix, the base stores some quantized and some dense.

    ## Why it matters
    vLLM and SGLang load q, k and v, gate and up, and the experts of a layer as one matrix each. They refuse a base in
    which only some of these are quantized.

    ## Example
    `q_proj` and `k_proj` in GPTQ, `v_proj` of the same layer in float16.

    ## What to do
    Run `loraformat dequantize`, or `merge --keep-quantized` with an adapter on one of them: both write such a group
    dense.

    ## Source
    vllm 0.33.0, quantization/utils/quant_utils.py `is_layer_skipped`.
    """
    from loraformat.matching import fused_with

    assert subject.base is not None
    base, quantized = subject.base, subject.base.quantized
    if quantized is None:
        return
    dense = {name for name, stored in base.tensors.items() if name.endswith(".weight") and len(stored.shape) > 1}
    alone = sorted(fused_with(quantized.weights.keys(), dense - quantized.weights.keys()))
    if alone:
        yield Hit(first_of(alone), "stored dense, but modules that are loaded fused with it are quantized")


@rule("LF316", Severity.WARNING, since="0.1.0", needs="base")
def trained_on_codes(subject: Subject) -> Iterator[Hit]:
    """The adapter was trained on a quantized base, but this base is dense.

    ## Why it matters
    The update also corrects what quantization did to the weights. Added to weights that were not quantized, it gives a
    different model than the one that was trained. `merge --as-trained` measures how far off that is, as the
    quantization error relative to the update.

    ## Example
    `"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"`, and a base in bfloat16.

    ## What to do
    For bitsandbytes use `merge --as-trained nf4` (with `,double` if `bnb_4bit_use_double_quant` was set; `fp4`,
    `int8`), which quantizes and dequantizes the base as on loading. For all others use the named base with
    `--dequantize`.

    ## Source
    Dettmers et al. 2023, arXiv 2305.14314; docs/quantized.md has figures.
    """
    from loraformat.rules.settings import named_quantization

    assert subject.base is not None
    named = named_quantization(subject)
    if named is None or not _is_dense(subject.base):
        return
    where, name, method = named
    is_own = method.lower() in _OF_BITSANDBYTES
    hint = "merge with --as-trained, or into the base that is named" if is_own else "merge into the base that is named"
    yield Hit(where, f'trained on "{name}" ({method}), but this base is dense', hint)


# Names under which models are published that bitsandbytes quantized, and those that may be.
_OF_BITSANDBYTES = ("bnb-4bit", "bnb-8bit", "4bit", "8bit", "int8", "nf4")


def _is_dense(base: Checkpoint) -> bool:
    from loraformat.matching import quantization_of

    return base.quantized is None and quantization_of(base) is None
