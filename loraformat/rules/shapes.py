"""Family 2, first part: the tensors of an adapter against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from loraformat.diagnostics import Severity, counted
from loraformat.model.adapter import Adapter, UpdateGroup
from loraformat.model.updates import Hadamard, Kronecker, LowRank, Replace, Rows, Update, products_of, tensors
from loraformat.rules.base import Hit, Subject, rule

if TYPE_CHECKING:
    from loraformat.model.checkpoint import Checkpoint


def updates_of(adapter: Adapter) -> Iterator[tuple[str, Update]]:
    """Every update with its base weight."""
    return ((base_weight, update) for base_weight, chain in adapter.updates.items() for update in chain)


def name_of(role: str) -> str:
    """How a message calls the tensor of a role: the factors by PEFT's names, which everybody knows."""
    return {"up": "lora_B", "down": "lora_A"}.get(role, role)


def weights_where(adapter: Adapter, holds: Callable[[Update], bool]) -> list[str]:
    """The base weights, sorted, of updates of whose headers something holds."""
    return sorted(name for group in adapter.update_groups if holds(group.update) for name in group.weights)


def is_vocabulary_table(base_weight: str) -> bool:
    """Whether the weight's name is that of an input embedding or of a language model's head."""
    from loraformat.matching.ties import EMBEDDINGS

    return base_weight.endswith(".weight") and base_weight.split(".")[-2] in (*EMBEDDINGS, "lm_head", "embed_out")


def table_rows(base_weight: str, update: Update) -> int | None:
    """Rows of the vocabulary table that an update stands for; None where it is none, or no matrix."""
    if isinstance(update, LowRank) and update.is_embedding and len(update.up.shape) == 2:
        return update.up.shape[0]
    is_table = isinstance(update, Replace) and is_vocabulary_table(base_weight) and len(update.shape) == 2
    return update.shape[0] if is_table else None


def base_rows(base: Checkpoint | None, name: str) -> int | None:
    """Rows of the tensor `name` of the base; None without a base or such a tensor."""
    tensor = base.tensors.get(name) if base is not None else None
    return tensor.shape[0] if tensor is not None and tensor.shape else None


def is_exchanged(group: UpdateGroup) -> bool:
    """Whether the factors of updates are those of one another: they would fit as (out, rank), (rank, in) if exchanged.

    Where the config states no rank for them, only factors that do not fit tell.
    """
    update, declared = group.update, group.declared_rank
    if not isinstance(update, LowRank) or update.kernel or len(update.up.shape) != 2 or len(update.down.shape) != 2:
        return False
    (rank, columns), (rows, inner) = update.up.shape, update.down.shape
    is_known = columns != rows if declared is None else declared == rank
    return is_known and rank == inner and rank < min(columns, rows)


@rule("LF202", Severity.ERROR, since="0.1.0")
def rank_mismatch(subject: Subject) -> Iterator[Hit]:
    """The two factors of an update have different ranks.

    ## Why it matters
    `lora_B` is (out, rank) and `lora_A` is (rank, in); they can be multiplied only if the ranks are equal. The file was
    combined from two adapters or cut, or its factors are swapped.

    ## Example
    `q_proj.lora_A.weight` has shape (8, 4096), `q_proj.lora_B.weight` has shape (4096, 16).

    ## What to do
    Take both factors from the same training run: `lora_A` (16, 4096) with `lora_B` (4096, 16).

    ## Source
    Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    assert subject.adapter is not None
    for group in subject.adapter.update_groups:
        if is_exchanged(group):
            continue  # LF220 says so
        for up, down in products_of(group.update):
            if len(up.shape) == 2 and len(down.shape) == 2 and up.shape[1] != down.shape[0]:
                message = f"lora_B {up.shape} has rank {up.shape[1]}, but lora_A {down.shape} has {down.shape[0]}"
                yield from (Hit(base_weight, message) for base_weight in group.weights)


_GATHER = "gather the parameters and save again; DeepSpeed's zero_to_fp32.py creates them from a global_step folder"


@rule("LF205", Severity.ERROR, since="0.1.0")
def empty_factor(subject: Subject) -> Iterator[Hit]:
    """A tensor is empty, or is not a matrix although a matrix is needed.

    ## Why it matters
    Under ZeRO stage 3 and FSDP a rank holds placeholders of size 0 instead of parameters. If they were saved without
    gathering them first, the adapter has all of its names but none of its values.

    ## Example
    `q_proj.lora_A.weight` has shape (0,).

    ## What to do
    Gather before saving: set `stage3_gather_16bit_weights_on_model_save` in DeepSpeed's configuration, or pass
    `accelerator.get_state_dict(model)` to `save_pretrained`.

    ## Source
    accelerate, accelerator.py `get_state_dict`; deepspeed, runtime/zero/partition_parameters.py.
    """
    assert subject.adapter is not None
    for group in subject.adapter.update_groups:
        for role, tensor in tensors(group.update):
            if 0 in tensor.shape:
                message, hint = f"{name_of(role)} is empty: shape {tensor.shape}", _GATHER
                yield from (Hit(base_weight, message, hint) for base_weight in group.weights)
            elif len(tensor.shape) != 2:
                message = f"{name_of(role)}: expected a matrix, found shape {tensor.shape}"
                matrices = (name for name in group.weights if _is_matrix(name, group.update, role))
                yield from (Hit(base_weight, message) for base_weight in matrices)


def _is_matrix(base_weight: str, update: Update, role: str) -> bool:
    if isinstance(update, LowRank) and update.is_stack:
        return False
    if isinstance(update, (LowRank, Hadamard, Kronecker)):
        return role != "magnitude"
    return isinstance(update, Rows) or (isinstance(update, Replace) and is_vocabulary_table(base_weight))


@rule("LF212", Severity.ERROR, since="0.1.0")
def magnitude_shape(subject: Subject) -> Iterator[Hit]:
    """A DoRA magnitude does not have one value per row of the weight (per column, for an embedding).

    ## Why it matters
    DoRA scales each output of a layer by its own factor. With a different number of factors the update cannot be
    applied.

    ## Example
    `q_proj.lora_magnitude_vector` has shape (1, 16) where `lora_B` has shape (4096, 16).

    ## What to do
    Save a vector of 4096 values, one for each row of `lora_B`.

    ## Source
    Liu et al. 2024, arXiv 2402.09353; peft 0.21.2, tuners/lora/dora.py.
    """
    assert subject.adapter is not None
    for group in subject.adapter.update_groups:
        update = group.update
        if isinstance(update, LowRank) and update.magnitude is not None:
            factor, axis = (update.up, 0) if update.magnitude.axis == 1 else (update.down, -1)
            found = update.magnitude.vector.numel
            if len(factor.shape) == 2 and found != factor.shape[axis]:
                message = f"magnitude: expected {factor.shape[axis]} values, found {found}"
                yield from (Hit(base_weight, message) for base_weight in group.weights)


@rule("LF213", Severity.ERROR, since="0.1.0")
def no_updates(subject: Subject) -> Iterator[Hit]:
    """The adapter changes nothing: loraformat recognized none of its tensors as an update.

    ## Why it matters
    Merging it gives the base model, and loading it gives the base model's answers, without a warning.

    ## Example
    A weight file that holds only `{"step": …}`, or no tensors at all.

    ## What to do
    Save the adapter's own state: `model.save_pretrained(…)` of the PEFT model, not of the base model inside it.

    ## Source
    peft 0.21.2, utils/save_and_load.py `get_peft_model_state_dict`.
    """
    assert subject.adapter is not None
    if not subject.adapter.updates:
        yield Hit("", "expected at least one update, found none")


@rule("LF231", Severity.ERROR, since="0.1.0", forgivable=True)
def no_factors(subject: Subject) -> Iterator[Hit]:
    """The adapter has no factor pairs at all: it only replaces weights of the base.

    ## Why it matters
    Somebody saved the model's own weights under the adapter's name. Merging it would overwrite weights of the base,
    which looks like success but has nothing to do with LoRA.

    ## Example
    `adapter_model.safetensors` with `model.layers.0.self_attn.q_proj.weight`, and no `lora_A` anywhere.

    ## What to do
    Save the adapter's own state: `get_peft_model_state_dict(model)`, or `model.save_pretrained(…)` of the PEFT model.

    ## Source
    peft 0.21.2, utils/save_and_load.py `get_peft_model_state_dict`.
    """
    assert subject.adapter is not None
    config = subject.adapter.config
    is_of_factors = subject.format == "peft" and config.raw.get("peft_type") in ("LORA", "ADALORA", "LOHA", "LOKR")
    updates = [update for _, update in updates_of(subject.adapter)]
    if is_of_factors and config.targets and updates and all(isinstance(update, Replace) for update in updates):
        yield Hit("", f"expected factor pairs, found only {counted(len(updates), 'full weight')}")


@rule("LF214", Severity.ERROR, since="0.1.0", forgivable=True)
def unusual_dtype(subject: Subject) -> Iterator[Hit]:
    """A tensor of an update is not of a floating-point type of 16 bits or more.

    ## Why it matters
    Integers and 8-bit floats store quantized values, which mean nothing without their scales. Read as they are, they
    would make updates a hundred times too large.

    ## Example
    `q_proj.lora_A.weight` has dtype I8.

    ## What to do
    Use F32, F16 or BF16: dequantize before saving. Adapters are small, so quantizing them saves little.

    ## Source
    safetensors 0.8.0, `Dtype`; QLoRA keeps its adapters in 16 bits: Dettmers et al. 2023, arXiv 2305.14314, section 3.
    """
    assert subject.adapter is not None
    for group in subject.adapter.update_groups:
        for role, tensor in tensors(group.update):
            if not tensor.dtype.is_floating:
                message = f"{name_of(role)}: expected a floating-point type, found {tensor.dtype.safetensors}"
                yield from (Hit(base_weight, message) for base_weight in group.weights)
