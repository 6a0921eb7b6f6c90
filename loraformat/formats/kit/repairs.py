"""What a conversion mends (LF9): one function each, whose docstring is its page, and the notes that turn into them."""

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
    """Names are written as the target format has them, without what a wrapper or a saver left in the source's.

    ## Why is this bad?
    It was: loaders that do not find a name skip the tensor, and the adapter does nothing. The output is clean.

    ## Example
    `_orig_mod.`, `module.`, `_fsdp_wrapped_module.`, a doubled or missing `base_model.model.`, `.default.` in names.

    ## Use instead
    The output; keep the source until it has been tried.

    ## Source
    docs/formats/peft.md, "Repair".
    """
    return where, message


@kind("LF902", Severity.WARNING)
def transposed_back(where: Where, message: str) -> Said:
    """Factors that stood transposed were transposed back.

    ## Why is this bad?
    It was: PEFT refuses such a file. The output has A (rank, in) and B (out, rank).

    ## Example
    `lora_A` (4096, 8) and `lora_B` (8, 4096) at rank 8.

    ## Use instead
    The output; compare one weight with the training run, since a square layer looks right either way.

    ## Source
    peft 0.21.2, tuners/lora/layer.py `update_layer`.
    """
    return where, message


@kind("LF903", Severity.INFO)
def dropped_copies(where: Where, message: str) -> Said:
    """Tensors that repeat others, or that are equal to the base's bit for bit, are not written.

    ## Why is this bad?
    They made the file larger, and engines refuse some of them (`base_layer`). Nothing of the training was in them.

    ## Example
    `embed_tokens.base_layer.weight`, equal to the base's table; `lm_head.original_module.weight`.

    ## Use instead
    The output.

    ## Source
    peft 0.21.2, utils/save_and_load.py `get_peft_model_state_dict`.
    """
    return where, message


@kind("LF904", Severity.INFO)
def whole_number(where: Where, value: float) -> Said:
    """A number that must be an integer for some loaders, and was written with a point, is written without.

    ## Why is this bad?
    Ollama and other readers take `lora_alpha` and `r` as integers and refuse `16.0`.

    ## Example
    `"lora_alpha": 16.0`.

    ## Use instead
    The output.

    ## Source
    ollama fb30760, convert/convert.go `AdapterParameters`.
    """
    return where, f"{value} is written as {int(value)}"


@kind("LF905", Severity.WARNING)
def renamed_modules(where: Where, count: int, before: str, after: str) -> Said:
    """Modules have other names in the base than in the adapter, and one change of prefix makes all of them fit.

    ## Why is this bad?
    It was: loaders do not find such modules, and most of them say nothing.

    ## Example
    `model.layers.0…` in the adapter, `model.language_model.layers.0…` in a vision-language base.

    ## Use instead
    The output, with this base.

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
