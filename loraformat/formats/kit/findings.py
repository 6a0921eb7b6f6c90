"""The findings of readers (LF2): one function each, whose docstring is its page."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeAlias

from loraformat.diagnostics import Finding, FindingLocation, Severity, counted, in_file, in_weights, listed
from loraformat.model.unpaired import PRESENT

P = ParamSpec("P")

Where: TypeAlias = "str | FindingLocation"
Said: TypeAlias = "tuple[Where, str] | tuple[Where, str, str]"


@dataclass(frozen=True, slots=True)
class Kind(Generic[P]):
    """A kind of finding; called with the facts of one occurrence it gives the Finding.

    Attributes:
        code, name, severity: of every finding of this kind.
        say: the facts → (where, message) or (where, message, hint); where a text is the name of a tensor or module.
        forgivable: `--force` turns its errors into warnings.
    """

    code: str
    name: str
    severity: Severity
    say: Callable[P, Said]
    forgivable: bool = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Finding:
        """The finding of one occurrence."""
        where, message, *hint = self.say(*args, **kwargs)
        return Finding(
            code=self.code,
            name=self.name,
            severity=self.severity,
            location=in_weights(where) if isinstance(where, str) else where,
            message=message,
            hint=hint[0] if hint else "",
            forgivable=self.forgivable,
        )

    @property
    def page(self) -> str:
        """The text that `explain` prints."""
        return inspect.getdoc(self.say) or ""


def kind(code: str, severity: Severity, *, forgivable: bool = False) -> Callable[[Callable[P, Said]], Kind[P]]:
    """Make a Kind of a function; its name is the function's, with hyphens. Registers nothing."""

    def decorate(say: Callable[P, Said]) -> Kind[P]:
        return Kind(code, say.__name__.replace("_", "-"), severity, say, forgivable)

    return decorate


@kind("LF201", Severity.ERROR)
def unpaired_factor(where: Where, present: str, absent: str) -> Said:
    """A low-rank update has only one of its two factors.

    ## Why it matters
    The update is the product of both. Loaders that look for only one of the names skip the module without a warning, so
    part of the training is lost.

    ## Example
    `model.layers.0.self_attn.q_proj.lora_A` without `model.layers.0.self_attn.q_proj.lora_B`.

    ## What to do
    Save the adapter again from the running model; the missing values cannot be computed from the others.

    ## Source
    peft 0.21.2, utils/save_and_load.py `set_peft_model_state_dict`: missing keys are only warned about.
    """
    return (
        where,
        f"{present}{PRESENT}{absent} is missing",
        "save the adapter again; the values cannot be reconstructed",
    )


def unpaired_factors(where: Where, there: Collection[str], *pairs: tuple[str, str]) -> Iterator[Finding]:
    """An LF201 for each of the pairs of which one is there and the other is not."""
    for one, other in pairs:
        if one in there and other not in there:
            yield unpaired_factor(where, one, other)
        elif other in there and one not in there:
            yield unpaired_factor(where, other, one)


@kind("LF203", Severity.INFO)
def redundant_copy(where: Where, names: list[str], original: str) -> Said:
    """Tensors that repeat others, or that loaders ignore, were left out.

    ## Why it matters
    They only make the file several times larger. PEFT writes a table of `modules_to_save` up to three times when the
    vocabulary was resized, and uses the first; full state dicts repeat the base model's weights.

    ## Example
    `lm_head.modules_to_save.weight` and `lm_head.original_module.weight` next to `lm_head.weight`.

    ## What to do
    Run `loraformat convert` to the same format: it writes each tensor once.

    ## Source
    peft 0.21.2, utils/save_and_load.py `get_peft_model_state_dict`.
    """
    return where, f"left out {listed(names)}: {original}"


@kind("LF221", Severity.WARNING)
def foreign_name_part(where: Where, part: str, count: int) -> Said:
    """Tensor names contain parts that the format does not have: a wrapper's prefix, an adapter's name.

    ## Why it matters
    Loaders look for exact names and skip what they do not find, so the adapter loads without an error and does nothing.

    ## Example
    `_orig_mod.base_model.model.…` from torch.compile; `….lora_A.default.weight` from a state dict saved by hand.

    ## What to do
    Run `loraformat convert` to the same format: it writes clean names.

    ## Source
    peft 0.21.2, utils/save_and_load.py `set_peft_model_state_dict`: unknown keys are dropped without a word.
    """
    return (
        where,
        f"{part} in {counted(count, 'tensor name')} was ignored",
        "convert to the same format to clean it",
    )


@kind("LF222", Severity.INFO)
def file_left_behind(where: Where, names: list[str]) -> Said:
    """Files of the folder are not copied to the output: pickles, optimizer state, unknown weight files.

    ## Why it matters
    Nothing is lost from the adapter. Pickles can run code when they are loaded, and none of these files belongs to the
    adapter; they stay where they are.

    ## Example
    `training_args.bin`, `optimizer.pt`.

    ## What to do
    Copy them yourself if you need them.

    ## Source
    docs/formats/native.md, "Other files".
    """
    return where, f"left out: {listed(names)}"


@kind("LF223", Severity.WARNING)
def not_only_tensors(where: Where, wrapper: tuple[str, ...], extras: list[str]) -> Said:
    """A weight file nests its tensors in dicts, or contains values that are not tensors.

    ## Why it matters
    Loaders of this format expect a flat dict of tensors and fail, or find nothing. Values that are not tensors are lost
    when the adapter is written again.

    ## Example
    `torch.save({"model_state_dict": {…}, "epoch": 3}, "lora_weights.pt")`.

    ## What to do
    Save the inner dict, or convert to the same format.

    ## Source
    docs/formats/native.md, N4.
    """
    faults = [f"the tensors are nested under {' → '.join(wrapper)}"] if wrapper else []
    faults += [f"values besides the tensors: {listed(extras)}"] if extras else []
    return where, f"{'; '.join(faults)}; only the tensors are read"


@kind("LF224", Severity.WARNING)
def undeclared_replacement(where: Where, names: list[str]) -> Said:
    """The file contains whole weights although the config does not declare any as replaced.

    ## Why it matters
    PEFT overwrites the base model's weights with them when it loads the adapter, without a warning. If they are copies
    from another base or revision, the model is changed.

    ## Example
    `base_model.model.model.norm.weight` with `"modules_to_save": null`.

    ## What to do
    List the modules in `modules_to_save`, or leave the tensors out.

    ## Source
    peft 0.21.2, utils/save_and_load.py `set_peft_model_state_dict`.
    """
    return where, f"{counted(len(names), 'weight', 'is')} replaced but not named in the config: {listed(names)}"


@kind("LF225", Severity.ERROR, forgivable=True)
def announced_but_absent(where: Where, what: str, names: list[str]) -> Said:
    """The config announces tensors that are not in the file.

    ## Why it matters
    A loader fills the gap with initial values instead of the trained ones.

    ## Example
    `"use_dora": true` without any `lora_magnitude_vector`; `"modules_to_save": ["lm_head"]` without `lm_head.weight`.

    ## What to do
    Save the adapter again, or correct the config if the setting is wrong.

    ## Source
    peft 0.21.2, utils/save_and_load.py `load_peft_weights`.
    """
    return where, f"{what}, but there is no tensor for {listed(names)}"


@kind("LF226", Severity.WARNING)
def unknown_setting(where: Where, names: list[str]) -> Said:
    """The config has non-empty settings that this version does not know.

    ## Why it matters
    A setting of a newer PEFT may change what the tensors mean. Old versions of PEFT drop it and compute something else.

    ## Example
    `"future_config": {"a": 1}`.

    ## What to do
    Find out what wrote it. If it changes nothing at inference, remove it.

    ## Source
    peft 0.21.2, config.py `PeftConfigMixin.from_peft_type`.
    """
    return where, f"unknown settings were ignored: {listed(names)}"


@kind("LF227", Severity.ERROR, forgivable=True)
def table_too_short(where: Where, rows: int, vocab_size: int) -> Said:
    """An embedding table has fewer rows than `vocab_size` in the config.

    ## Why it matters
    Tokens with higher numbers have no row. Looking them up fails; on a GPU the error appears far from the cause.

    ## Example
    `"vocab_size": 95` and `token_embedding.weight` of shape (90, 64).

    ## What to do
    Save the tables after adding the tokens, or correct `vocab_size`.

    ## Source
    docs/formats/native.md, N23.
    """
    return where, f"expected at least {vocab_size} rows, as vocab_size says, found {rows}"


@kind("LF240", Severity.WARNING)
def base_weights_in_file(where: Where, names: list[str]) -> Said:
    """The file contains other weights of the model next to the factors, and does not say whether they were trained.

    ## Why it matters
    They are assumed to be copies of the base's, which LoRA does not change, and left out. If they were trained as well
    (an embedding, the norms), that training is lost.

    ## Example
    `{"model_state_dict": …}` of a whole model with `q_proj.lora_A` next to `model.embed_tokens.weight`.

    ## What to do
    Pass `--base BASE`: each weight is compared with the base's; equal ones are left out, all others are kept.

    ## Source
    Hu et al. 2021, arXiv 2106.09685, section 4.1: the pretrained weights are frozen.
    """
    return (
        where,
        f"{counted(len(names), 'weight', 'is')} left out, assumed to be unchanged from the base: {listed(names)}",
        "use --base to compare them with the base's",
    )


@kind("LF241", Severity.WARNING)
def scale_by_definition(where: Where, scale: float, source: str) -> Said:
    """The file does not state its scale; it was taken from the code that writes such files, where it is a constant.

    ## Why it matters
    It is wrong if somebody changed the constant in a copy of that code.

    ## Example
    Adapters of mlx-examples (`adapters.npz`), whose layers multiply by 20.

    ## What to do
    Pass `--assume scale=S` or `--alpha A` if the training code had another value.

    ## Source
    The page of the format in docs/formats/.
    """
    return (
        where,
        f"the file does not state its scale; {scale:g} was assumed, as in {source}",
        "use --assume scale=S to set another",
    )


@kind("LF242", Severity.ERROR, forgivable=True)
def transposed_factors(where: Where, names: list[str]) -> Said:
    """All factors are transposed under PEFT's names: `lora_A` (in, rank), `lora_B` (rank, out).

    ## Why it matters
    PEFT rejects the file because of its shapes or, if rank and size are equal, loads wrong values.

    ## Example
    `q_proj.lora_A.weight` of shape (4096, 8) at rank 8, as in MLX and much hand-written code.

    ## What to do
    Run `loraformat convert` to the same format: it transposes them back (LF902).

    ## Source
    peft 0.21.2, tuners/lora/layer.py `update_layer`: A (rank, in), B (out, rank).
    """
    return (
        where,
        f"the factors of {counted(len(names), 'module')} are transposed: {listed(names)}",
        "convert transposes them back",
    )


@kind("LF244", Severity.WARNING)
def scale_of_two_versions(where: Where, taken: float, other: float, source: str) -> Said:
    """Two versions of the program that wrote the file use different scales, and the file does not say which.

    ## Why it matters
    If the other one is right, the update is many times too strong or too weak.

    ## Example
    An adapter of mlx-vlm with tensors `A` and `B`: before March 2026 the factor was `alpha` itself, after that alpha /
    rank.

    ## What to do
    Pass `--assume scale=S` with the factor of the version that trained it; `inspect --norms` shows how strong the
    update is.

    ## Source
    The page of the format in docs/formats/.
    """
    return (
        where,
        f"the scale depends on the version of {source}: {taken:g} was assumed, others use {other:g}",
        f"use --assume scale={other:g} for the other, --assume scale={taken:g} to confirm this one",
    )


@kind("LF245", Severity.WARNING)
def trained_weight_files(files: list[str], names: list[str]) -> Said:
    """Other weight files in the folder contain whole weights trained with the adapter; they are read as part of it.

    ## Why it matters
    The trained model has these weights, so `merge` and `convert` apply them. PEFT and serving engines do not load them
    unless the code that wrote the files does, and then run a model that nobody trained.

    ## Example
    `non_lora_trainables.bin` of LLaVA, with the projector between vision and language.

    ## What to do
    Run `loraformat convert` to the same format, which writes one file that PEFT loads. If a file is not part of the
    adapter, move it out of the folder.

    ## Source
    LLaVA issue 1592; LLaVA 1.2, train.py `get_peft_state_non_lora_maybe_zero_3`.
    """
    text = f"{counted(len(names), 'weight', 'is')} next to the adapter and read as part of it, but not loaded by PEFT"
    return in_file(files[0]), f"{text}: {listed(names)}"


@kind("LF246", Severity.WARNING)
def unread_weight_file(where: Where, reason: str) -> Said:
    """A weight file next to the adapter was not read.

    ## Why it matters
    If it contains weights that were trained with the adapter, the output lacks them.

    ## Example
    `pytorch_model.bin` next to `adapter_model.safetensors`: a whole model, or the state of a training run.

    ## What to do
    Move the file out of the folder if it does not belong to the adapter. If it does, save only its weights, under the
    names of the base, as `non_lora_trainables.bin` or any safetensors file.

    ## Source
    loraformat's own principle: nothing is dropped silently.
    """
    return where, f"not read: {reason}"


@kind("LF248", Severity.INFO)
def found_below(where: Where, folder: str) -> Said:
    """The folder itself does not contain an adapter; the only one in its subfolders was read.

    ## Why it matters
    If you meant another one, it does not exist yet or is nested deeper.

    ## Example
    `run/`, into which PEFT saved the adapter "policy" as `run/policy/`; a trainer's folder with one `checkpoint-500/`.

    ## What to do
    Pass the folder of the adapter.

    ## Source
    peft 0.21.2, peft_model.py `save_pretrained`: an adapter that is not called "default" gets a folder of its name.
    """
    return where, f"the adapter was read from {folder}"


@kind("LF249", Severity.WARNING)
def left_out(where: Where, names: list[str], reason: str) -> Said:
    """Tensors of the file were left out of the adapter; each is listed.

    ## Why it matters
    With `--partial`, what was trained in them is missing from every output. Without it, only tensors that do not change
    a weight are left out.

    ## Example
    `lora_unet_double_blocks_0_img_attn_gate.lora_down.weight` among modules of FLUX.2, which does not have this module.

    ## What to do
    Find out what wrote them. An adapter of a newer model may need its base: `--base BASE`.

    ## Source
    loraformat's own principle: nothing is dropped silently.
    """
    return where, f"left out {counted(len(names), 'tensor')}: {reason}: {', '.join(names)}"


@kind("LF250", Severity.WARNING)
def uneven_modules(where: Where, what: str, names: list[str]) -> Said:
    """Some modules of the file lack a tensor that others of the same kind have: an alpha, a DoRA magnitude, a delta.

    ## Why it matters
    Each module is read with its own scale. A module without `.alpha` has scale 1, which may be many times too strong;
    one without a magnitude is plain LoRA. A tool that lost a tensor leaves such a file behind.

    ## Example
    `.alpha` for all modules except `lora_unet_double_blocks_0_img_attn_proj`.

    ## What to do
    Download the file again, or save it again from the training run. If it was trained this way, there is nothing to do.

    ## Source
    diffusers 0.42.1 and OneTrainer 23df3832 read modules without alpha with the scale 1.
    """
    return where, f"{what}; without: {listed(names)}"


@kind("LF251", Severity.WARNING)
def for_residual_base(where: Where, folder: str) -> Said:
    """The folder is one that LLaMA-Factory saves next to a PiSSA run, and its factors do not fit the original base.

    ## Why it matters
    PiSSA trains factors on a base without its principal singular values. `pissa_init` holds the factors before training
    and `pissa_backup` those after it; in both the config says `"init_lora_weights": true`, as if the base were
    complete. Applied to the original base, they add the principal singular values a second time.

    ## Example
    `loraformat merge BASE output/pissa_backup`.

    ## What to do
    Use the folder `pissa_converted`, or the adapter in the folder of the run, whose config names PiSSA.

    ## Source
    LLaMA-Factory ff6d4d1, train/callbacks.py `PissaConvertCallback`.
    """
    return (
        where,
        f"{folder} holds factors for a base whose principal singular values were removed",
        "use pissa_converted",
    )


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
    base_weights_in_file,
    scale_by_definition,
    transposed_factors,
    scale_of_two_versions,
    trained_weight_files,
    unread_weight_file,
    found_below,
    left_out,
    uneven_modules,
    for_residual_base,
)
