"""What a reader may note (LF2) and what a writer may lose (LF7): one function each, whose docstring is its page."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeAlias

from loraformat.diagnostics import Finding, Severity

P = ParamSpec("P")

Said: TypeAlias = "tuple[str, str] | tuple[str, str, str]"


@dataclass(frozen=True, slots=True)
class Kind(Generic[P]):
    """A kind of finding; called with the facts of one occurrence it gives the Finding.

    Attributes:
        code, name, severity: of every finding of this kind.
        say: the facts → (where, message) or (where, message, hint).
    """

    code: str
    name: str
    severity: Severity
    say: Callable[P, Said]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Finding:
        """The finding of one occurrence."""
        where, message, *hint = self.say(*args, **kwargs)
        return Finding(
            code=self.code,
            name=self.name,
            severity=self.severity,
            where=where,
            message=message,
            hint=hint[0] if hint else "",
        )

    @property
    def page(self) -> str:
        """The text that `explain` prints."""
        return inspect.getdoc(self.say) or ""


def kind(code: str, severity: Severity) -> Callable[[Callable[P, Said]], Kind[P]]:
    """Make a Kind of a function; its name is the function's, with hyphens. Registers nothing."""

    def decorate(say: Callable[P, Said]) -> Kind[P]:
        return Kind(code, say.__name__.replace("_", "-"), severity, say)

    return decorate


def listed(names: list[str], limit: int = 3) -> str:
    """The first names and how many more there are: `a, b, c and 4 more`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


@kind("LF201", Severity.ERROR)
def unpaired_factor(where: str, present: str, absent: str) -> Said:
    """One factor of a low-rank update is there and the other is missing.

    ## Why is this bad?
    The update is the product of both. Loaders that look at one name only skip the module in silence, so a part of the
    training is lost.

    ## Example
    `model.layers.0.self_attn.q_proj.lora_A` without `model.layers.0.self_attn.q_proj.lora_B`.

    ## Use instead
    Save the adapter again from the running model; the missing values cannot be computed from the others.

    ## Source
    peft 0.21.2, utils/save_and_load.py `set_peft_model_state_dict`: missing keys are only warned about.
    """
    return where, f"{present} is there, {absent} is missing", "save the adapter again; nothing can replace the values"


@kind("LF203", Severity.INFO)
def redundant_copy(where: str, names: list[str], original: str) -> Said:
    """Tensors that only repeat others, or that loading ignores, were left out.

    ## Why is this bad?
    It is not, but it makes files several times as large. PEFT writes a table of `modules_to_save` up to three times
    when the vocabulary was resized, and uses the first; full state dicts repeat the base model's weights.

    ## Example
    `lm_head.modules_to_save.weight` and `lm_head.original_module.weight` beside `lm_head.weight`.

    ## Use instead
    `loraformat convert` to the same format writes each tensor once.

    ## Source
    peft 0.21.2, utils/save_and_load.py `get_peft_model_state_dict`.
    """
    return where, f"left out {listed(names)}: {original}"


@kind("LF221", Severity.WARNING)
def foreign_name_part(where: str, part: str, count: int) -> Said:
    """Tensor names carry something that the format does not have there: a wrapper's prefix, an adapter's name.

    ## Why is this bad?
    Loaders look names up as they are. What they do not find they skip, so the adapter loads without an error and does
    nothing.

    ## Example
    `_orig_mod.base_model.model.…` from torch.compile; `….lora_A.default.weight` from a state dict saved by hand.

    ## Use instead
    `loraformat convert` to the same format writes clean names.

    ## Source
    peft 0.21.2, utils/save_and_load.py `set_peft_model_state_dict`: unknown keys are dropped without a word.
    """
    return (
        where,
        f"{part} in {count} tensor names; read as if it were not there",
        "convert to the same format to clean it",
    )


@kind("LF222", Severity.INFO)
def file_left_behind(where: str, names: list[str]) -> Said:
    """Files of the folder that are not carried along: pickles, optimizer state, weight files of no part of the format.

    ## Why is this bad?
    It is not. Pickles can run code when they are loaded, and none of these belongs to the adapter; they stay where they
    are.

    ## Example
    `training_args.bin`, `optimizer.pt`.

    ## Use instead
    Copy them yourself where they are needed.

    ## Source
    docs/formats/native.md, "Other files".
    """
    return where, f"not carried along: {listed(names)}"


@kind("LF223", Severity.WARNING)
def not_only_tensors(where: str, wrapper: tuple[str, ...], extras: list[str]) -> Said:
    """A weight file holds dicts around its tensors, or other values beside them.

    ## Why is this bad?
    Loaders of this format expect names → tensors and fail, or find nothing. What stands beside the tensors is lost when
    the adapter is written again.

    ## Example
    `torch.save({"model_state_dict": {…}, "epoch": 3}, "lora_weights.pt")`.

    ## Use instead
    Save the inner dict, or convert to the same format.

    ## Source
    docs/formats/native.md, N4.
    """
    faults = [f"the tensors lie under {' → '.join(wrapper)}"] if wrapper else []
    faults += [f"other values beside the tensors: {listed(extras)}"] if extras else []
    return where, f"{'; '.join(faults)}; only the tensors are read"


@kind("LF224", Severity.WARNING)
def undeclared_replacement(where: str, names: list[str]) -> Said:
    """Whole weights are in the file although the config does not say that any are replaced.

    ## Why is this bad?
    PEFT overwrites the base model's weights with them when it loads the adapter, without saying so. If they are copies
    of another base or another revision, the model is silently changed.

    ## Example
    `base_model.model.model.norm.weight` with `"modules_to_save": null`.

    ## Use instead
    Name the modules in `modules_to_save`, or leave the tensors out.

    ## Source
    peft 0.21.2, utils/save_and_load.py `set_peft_model_state_dict`.
    """
    return where, f"{len(names)} weights are replaced that the config does not name: {listed(names)}"


@kind("LF225", Severity.ERROR)
def announced_but_absent(where: str, what: str, names: list[str]) -> Said:
    """The config announces tensors that the file does not hold.

    ## Why is this bad?
    A loader fills the gap with the initial values, which are not what was trained.

    ## Example
    `"use_dora": true` without any `lora_magnitude_vector`; `"modules_to_save": ["lm_head"]` without `lm_head.weight`.

    ## Use instead
    Save the adapter again; or correct the config if the announcement is wrong.

    ## Source
    peft 0.21.2, utils/save_and_load.py `load_peft_weights`.
    """
    return where, f"{what}, but there is no tensor for {listed(names)}"


@kind("LF226", Severity.WARNING)
def unknown_setting(where: str, names: list[str]) -> Said:
    """The config has settings that this version does not know, with a value that is not empty.

    ## Why is this bad?
    A setting of a newer PEFT may change what the tensors mean. Old versions of PEFT drop it and compute something else.

    ## Example
    `"future_config": {"a": 1}`.

    ## Use instead
    Look up what wrote it. If it changes nothing at inference, remove it.

    ## Source
    peft 0.21.2, config.py `PeftConfigMixin.from_peft_type`.
    """
    return where, f"unknown settings were ignored: {listed(names)}"


@kind("LF227", Severity.ERROR)
def table_too_short(where: str, rows: int, vocab_size: int) -> Said:
    """An embedding table has fewer rows than the config's `vocab_size` says.

    ## Why is this bad?
    Tokens with a higher number have no row. Looking them up fails, on a GPU with an error far from the cause.

    ## Example
    `"vocab_size": 95` and `token_embedding.weight` of shape (90, 64).

    ## Use instead
    Save the tables after the tokens were added; or correct `vocab_size`.

    ## Source
    docs/formats/native.md, N23.
    """
    return where, f"expected at least {vocab_size} rows, as vocab_size says, found {rows}"


@kind("LF702", Severity.ERROR)
def unsupported_update(where: str, what: str, format_name: str) -> Said:
    """The target format cannot express an update of this kind.

    ## Why is this bad?
    Leaving it out would give another model.

    ## Example
    A LoHa update in the native format; plain and DoRA modules mixed in one PEFT folder.

    ## Use instead
    Merge the adapter into its base, or convert to a format that can hold it.

    ## Source
    The page of the format in docs/formats/.
    """
    return where, f"{what} cannot be written as {format_name}"


@kind("LF703", Severity.INFO)
def dropped_metadata(where: str, names: list[str]) -> Said:
    """Fields of the source config, or files, that mean nothing in the target format were left out.

    ## Why is this bad?
    They do not change the model, but they say how it was trained.

    ## Example
    PEFT's `lora_dropout` in the native format.

    ## Use instead
    Keep the source beside the result.

    ## Source
    The page of the format in docs/formats/.
    """
    return where, f"not written: {listed(names, 8)}"


@kind("LF705", Severity.ERROR)
def unknown_scale(where: str, names: list[str]) -> Said:
    """Nobody stated alpha, so the factor of the update is unknown, and the target format must state it.

    ## Why is this bad?
    Any guess makes the adapter too strong or too weak.

    ## Example
    A hand-written `lora_config.json` with `rank` and without `alpha`.

    ## Use instead
    `--alpha A` with the value from the training code.

    ## Source
    docs/formats/native.md, N9.
    """
    return (
        where,
        f"the scale of {listed(names)} is unknown: no alpha is stated",
        "give the value of training with --alpha",
    )


@kind("LF706", Severity.WARNING)
def unclaimed_tensor_lost(where: str, names: list[str]) -> Said:
    """Tensors that the reader did not understand cannot be written.

    ## Why is this bad?
    Whatever they mean, it would be missing from the result.

    ## Example
    `model.layers.0.self_attn.q_proj.lora_diag` of an adapter variant that is not supported.

    ## Use instead
    Remove them from the source if they mean nothing.

    ## Source
    The page of the source format in docs/formats/.
    """
    return where, f"{len(names)} tensors were not understood and would be lost: {listed(names)}"


FINDINGS = (
    unpaired_factor,
    redundant_copy,
    foreign_name_part,
    file_left_behind,
    not_only_tensors,
    undeclared_replacement,
    announced_but_absent,
    unknown_setting,
    table_too_short,
    unsupported_update,
    dropped_metadata,
    unknown_scale,
    unclaimed_tensor_lost,
)
