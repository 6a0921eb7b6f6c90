"""The losses of writers (LF7): one function each, whose docstring is its page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loraformat.diagnostics import Finding, Severity, counted, listed, show
from loraformat.formats.kit.findings import Said, Where, kind


@kind("LF701", Severity.WARNING)
def folded_scale(where: Where, names: list[str], error: float) -> Said:
    """The target format has one scale for all modules, so differences were folded into the factors.

    ## Why it matters
    Each changed value is rounded once to its dtype, unless the factor is a power of two. The message states the largest
    rounding error.

    ## Example
    `alpha_pattern` in MLX-LM, which has one `scale`; `--plain`.

    ## What to do
    Use a format with a scale for each module (native, PEFT), or `--dtype float32`.

    ## Source
    IEEE 754: a rounded product is off by at most half a unit in the last place.
    """
    bound = "exact" if not error else f"each value off by at most {error:.1e} of itself"
    return (
        where,
        f"the factor of {counted(len(names), 'weight')} was folded into their tensors, {bound}: {listed(names)}",
    )


_ELSEWHERE = "merge the adapter into its base, or convert it to another format"


@kind("LF702", Severity.ERROR)
def unsupported_update(where: Where, what: str, format_name: str, more: int = 0, hint: str = _ELSEWHERE) -> Said:
    """The target format cannot express this kind of update.

    ## Why it matters
    Leaving it out would give a different model.

    ## Example
    A LoHa update in the native format; plain and DoRA modules mixed in one PEFT folder.

    ## What to do
    Merge the adapter into its base, or convert it to a format that can express the update.

    ## Source
    The page of the format in docs/formats/.
    """
    others = f"; the same holds for {counted(more, 'more weight')}" if more else ""
    return where, f"{what} cannot be written as {format_name}{others}", hint


@kind("LF703", Severity.INFO)
def dropped_metadata(where: Where, names: list[str]) -> Said:
    """Fields of the source config, or files, that mean nothing in the target format were left out.

    ## Why it matters
    They do not change the model, but record how it was trained.

    ## Example
    PEFT's `lora_dropout` in the native format.

    ## What to do
    Keep the source together with the result.

    ## Source
    The page of the format in docs/formats/.
    """
    return where, f"the target format has no place for {listed(names, 8)}: left out"


@kind("LF705", Severity.ERROR)
def unknown_scale(where: Where, names: list[str]) -> Said:
    """No alpha is stated, so the scale of the update is unknown, but the target format must state it.

    ## Why it matters
    Any guess makes the adapter too strong or too weak.

    ## Example
    A hand-written `lora_config.json` with `rank` and without `alpha`.

    ## What to do
    Pass `--alpha A` with the value from the training code.

    ## Source
    docs/formats/native.md, N9.
    """
    return (
        where,
        f"the scale of {listed(names)} is unknown because the files state no alpha",
        "pass the alpha used in training with --alpha",
    )


@kind("LF706", Severity.WARNING)
def unclaimed_tensor_lost(where: Where, names: list[str]) -> Said:
    """Tensors that loraformat did not recognize cannot be written.

    ## Why it matters
    Whatever they mean, it would be missing from the result.

    ## Example
    `model.layers.0.self_attn.q_proj.lora_diag` of an adapter variant that is not supported.

    ## What to do
    Remove them from the source if they mean nothing.

    ## Source
    The page of the source format in docs/formats/.
    """
    return where, f"{counted(len(names), 'tensor', 'was')} not recognized and would be lost: {listed(names)}"


@kind("LF704", Severity.WARNING)
def reduced_precision(where: Where, source: str, target: str, error: float) -> Said:
    """Values are rounded to a narrower dtype.

    ## Why it matters
    The factors are what was trained, and products of two rounded factors are off by up to twice as much. Small values
    lose more in float16, and values beyond 65504 are rejected.

    ## Example
    `--dtype bfloat16` for an adapter in float32.

    ## What to do
    Leave `--dtype` out: adapters are small.

    ## Source
    IEEE 754; the unit roundoffs are 2⁻²⁴ (float32), 2⁻¹¹ (float16), 2⁻⁸ (bfloat16) and 2⁻⁵³ (float64) of a value.
    """
    return where, f"values in {source} are rounded to {target}, each off by at most {error:.1e} of itself"


@kind("LF707", Severity.WARNING)
def padded_ranks(where: Where, names: list[str], rank: int) -> Said:
    """The target format has one rank for all modules, so smaller ones were padded with zeros.

    ## Why it matters
    The result is exact, but the file grows.

    ## Example
    `rank_pattern` in MLX-LM, which has one `rank`; `--plain`.

    ## What to do
    Use a format with a rank for each module (native, PEFT).

    ## Source
    B @ A does not change by columns of B and rows of A that are zero.
    """
    return where, f"the ranks of {counted(len(names), 'weight')} were padded to {rank} with zeros: {listed(names)}"


@kind("LF708", Severity.INFO)
def dropped_setting(where: Where, version: str, names: list[str]) -> Said:
    """Settings that the requested version of PEFT does not know were left out; none of them changes the result.

    ## Why it matters
    PEFT before 0.14 rejects a config with any field that it does not know.

    ## Example
    `eva_config` for PEFT 0.10.

    ## What to do
    Leave `--peft-version` out if everybody has a newer one.

    ## Source
    peft 0.14.0, config.py `check_kwargs`; docs/formats/peft.md lists the fields and their versions.
    """
    return where, f"not known to PEFT {version}: {listed(names, 8)}"


@kind("LF709", Severity.WARNING)
def unstated_in_file(where: Where, what: str) -> Said:
    """The weight file cannot hold some of the information, so it is in a separate file.

    ## Why it matters
    Whoever loads only the weight file must know it.

    ## Example
    Alpha and rank of a loralib file, which are in lora_settings.json.

    ## What to do
    Pass the value in the message to the loader.

    ## Source
    The page of the format in docs/formats/.
    """
    return where, what


@kind("LF711", Severity.WARNING)
def bound_not_met(where: Where, names: list[str], rank: int, error: float) -> Said:
    """The highest allowed rank does not meet the bound on the error of an update.

    ## Why it matters
    `--error`, `--energy` and similar options limit how much may be lost, but `--max-rank` was reached first. The report
    has the error of each update. With `--strict` nothing is written.

    ## Example
    `resize --error 0.05 --max-rank 8` for an update whose best approximation of rank 8 is 20 % off.

    ## What to do
    Raise `--max-rank` or leave it out, or use a bound that can be met.

    ## Source
    Eckart and Young 1936: no factors of that rank come closer.
    """
    return (
        where,
        f"rank {rank} does not meet the bound: up to {error:.3g} of the norm is lost: {listed(names)}",
        "raise --max-rank",
    )


@kind("LF712", Severity.WARNING)
def other_base_name(where: Where, first: str, second: str) -> Said:
    """The adapters to combine name different bases, and no fingerprints tell whether these are the same.

    ## Why it matters
    Adapters of two models with equal shapes can be added, but the sum means nothing for either model. Two names of one
    model, such as a local path and its name on the Hub, are harmless.

    ## Example
    One adapter says `meta-llama/Llama-3.1-8B`, the other `mistralai/Mistral-7B-v0.1`.

    ## What to do
    Run `loraformat stamp` on both adapters with their bases: then different bases are detected by their values.

    ## Source
    `base_model_name_or_path` of PEFT and similar fields in other formats.
    """
    return (
        where,
        f"the adapters name different bases, {show(first, 120)} and {show(second, 120)}",
        "if they are the same, stamp both adapters with loraformat stamp",
    )


@kind("LF713", Severity.WARNING)
def approximated_update(where: Where, names: list[str], error: float, worst: float) -> Said:
    """An update that is not LoRA was approximated by LoRA of a lower rank.

    ## Why it matters
    The adapter changes the model differently than it was trained to. The message has ‖ΔW − written‖ / ‖ΔW‖ over all
    these weights, and the largest value for a single one.

    ## Example
    `convert --to-lora --rank 16` of LoHa with rank 8, whose updates have rank 64.

    ## What to do
    Use a higher `--rank`, a smaller `--error`, or merge the adapter into its base.

    ## Source
    Eckart and Young 1936: no factors of that rank come closer.
    """
    what = counted(len(names), "update", "is")
    text = f"{what} only approximated: {error:.3g} of the norm is lost, at worst {worst:.3g}: {listed(names)}"
    return where, text


def unsupported_updates(faults: Iterable[tuple[str, str]], format_name: str) -> Iterator[Finding]:
    """One LF702 for each kind of fault, at the first weight that has it.

    Args:
        faults: (base weight, what cannot be written).
    """
    by_kind: dict[str, list[str]] = {}
    for weight, what in faults:
        by_kind.setdefault(what, []).append(weight)
    for what, weights in by_kind.items():
        yield unsupported_update(weights[0], what, format_name, len(weights) - 1)


LOSSES = (
    folded_scale,
    unsupported_update,
    dropped_metadata,
    reduced_precision,
    unknown_scale,
    unclaimed_tensor_lost,
    padded_ranks,
    dropped_setting,
    unstated_in_file,
    bound_not_met,
    other_base_name,
    approximated_update,
)
