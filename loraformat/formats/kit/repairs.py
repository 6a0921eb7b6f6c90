"""The repairs of a conversion (LF9): a function each, whose docstring is its page, and the notes they come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loraformat.diagnostics import Finding, Severity, counted
from loraformat.formats.kit.findings import (
    Kind,
    Said,
    Where,
    foreign_name_part,
    kind,
    redundant_copy,
    transposed_factors,
)


@kind("LF901", Severity.INFO)
def cleaned_names(where: Where, message: str) -> Said:
    """Names are written as the target format defines them, without the traces of a wrapper or saver.

    ## Why it matters
    Loaders that do not find a name skip the tensor, and the adapter does nothing.

    ## Example
    `_orig_mod.`, `module.`, `_fsdp_wrapped_module.`, a doubled or missing `base_model.model.`, `.default.` in names.

    ## What to do
    Use the output; keep the source until you have tried it.

    ## Source
    docs/formats/peft.md, "Repair".
    """
    return where, message


@kind("LF902", Severity.WARNING)
def transposed_back(where: Where, message: str) -> Said:
    """Transposed factors were transposed back.

    ## Why it matters
    PEFT rejects the source. The output has `lora_A` (rank, in) and `lora_B` (out, rank).

    ## Example
    `lora_A` (4096, 8) and `lora_B` (8, 4096) at rank 8.

    ## What to do
    Use the output; compare one weight with the training run, because a square layer fits either way.

    ## Source
    peft 0.21.2, tuners/lora/layer.py `update_layer`.
    """
    return where, message


@kind("LF903", Severity.INFO)
def dropped_copies(where: Where, message: str) -> Said:
    """Tensors that repeat others, or equal the base's bit for bit, are not written.

    ## Why it matters
    They make the file larger, and engines reject some of them (`base_layer`). They contain nothing that was trained.

    ## Example
    `embed_tokens.base_layer.weight`, equal to the base's table; `lm_head.original_module.weight`.

    ## What to do
    Use the output.

    ## Source
    peft 0.21.2, utils/save_and_load.py `get_peft_model_state_dict`.
    """
    return where, message


@kind("LF904", Severity.INFO)
def whole_number(where: Where, value: float) -> Said:
    """A number that some loaders need as an integer was written with a decimal point, and is written without it.

    ## Why it matters
    Ollama and other readers expect `lora_alpha` and `r` to be integers and reject `16.0`.

    ## Example
    `"lora_alpha": 16.0`.

    ## What to do
    Use the output.

    ## Source
    ollama fb30760, convert/convert.go `AdapterParameters`.
    """
    return where, f"{value} is written as {int(value)}"


@kind("LF905", Severity.WARNING)
def renamed_modules(where: Where, count: int, before: str, after: str) -> Said:
    """Modules have other names in the base than in the adapter, and changing one prefix makes all of them match.

    ## Why it matters
    Loaders do not find such modules, and most of them do not warn.

    ## Example
    `model.layers.0…` in the adapter, `model.language_model.layers.0…` in a vision-language base.

    ## What to do
    Use the output with this base.

    ## Source
    transformers 4.52, release notes: vision-language models renamed; vllm issues 34591, 39369.
    """
    return where, f'{counted(count, "module")} renamed to match the base: "{before}" → "{after}"'


REPAIRS = (cleaned_names, transposed_back, dropped_copies, whole_number, renamed_modules)

_MENDED: dict[str, Kind[[str, str]]] = {
    foreign_name_part.code: cleaned_names,
    transposed_factors.code: transposed_back,
    redundant_copy.code: dropped_copies,
}


def mended(notes: Iterable[Finding]) -> tuple[Finding, ...]:
    """The notes of a reader, with those that a writer mends by writing as what was mended."""
    return tuple(
        replace(note, code=found.code, name=found.name, severity=found.severity, hint="")
        if (found := _MENDED.get(note.code)) is not None
        else note
        for note in notes
    )
