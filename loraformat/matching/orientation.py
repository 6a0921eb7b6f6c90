"""Whether a checkpoint stores a weight as (in, out), the transpose of an update's (out, in)."""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.model.adapter import AdapterConfig
from loraformat.model.bundle import Json
from loraformat.model.updates import LowRank, Update, kind_of
from loraformat.naming import task_classes, tied_names

# Architectures whose `Conv1D` layers store (in, out), and the names of those layers.
# Source: transformers 5.23.0, pytorch_utils.py `Conv1D` and its users in models/*/modeling_*.py.
CONV1D = {
    "clvp": ("c_attn", "c_proj", "c_fc"),
    "clvp_decoder": ("c_attn", "c_proj", "c_fc"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
}

# Architectures whose stacked experts are stored as (experts, in, out).
# Source: transformers 5.23.0, `is_transposed` of models/*/modeling_*.py.
TRANSPOSED_EXPERTS = ("gpt_oss",)


def is_stack_transposed(
    updates: tuple[Update, ...], stored: tuple[int, ...], config: Mapping[str, Json], claims: AdapterConfig
) -> bool:
    """Whether the experts of a stack are stored as the transposes of its update's.

    The shape decides; where experts are square, what the adapter's format says, and else the architecture.

    Args:
        stored: (experts, rows, cols).
        claims: of the adapter.
    """
    shape = next((u.shape for u in updates if isinstance(u, LowRank)), stored)
    if len(shape) == 2:
        shape = (1, *shape)
    transposed = (*stored[:-2], stored[-1], stored[-2])
    if shape != transposed or stored[-1] != stored[-2]:
        return shape == transposed and shape != stored
    if claims.transposes_square_experts is not None:
        return claims.transposes_square_experts
    return config.get("model_type") in TRANSPOSED_EXPERTS


def is_stored_transposed(
    weight: str,
    updates: tuple[Update, ...],
    stored: tuple[int, ...],
    config: Mapping[str, Json],
    fan_in_fan_out: bool | None,
) -> tuple[bool, bool]:
    """(transposed, is_guess) of one weight.

    In the architectures that have `Conv1D` layers, those layers are. Elsewhere the shape decides, where the class is
    not known or the adapter says `fan_in_fan_out`: a Llama with one transposed weight is a damaged Llama. For a square
    weight of a class that is not known the flag decides, and that is a guess.

    Args:
        weight: name of the weight.
        updates: what is done to it, in Linear orientation.
        stored: shape in the checkpoint.
        config: config.json of the base.
        fan_in_fan_out: the adapter's claim, or None.
    """
    first = next((u for u in updates if not kind_of(u).overwrites), None)
    if first is None or len(stored) != 2 or len(first.shape) != 2:
        return False, False
    if any(isinstance(update, LowRank) and update.is_embedding for update in updates):
        return False, False
    if config.get("model_type") in CONV1D:
        return is_conv1d(weight, config), False
    is_known = is_class_known(config)
    if not first.fits(stored):
        return (bool(fan_in_fan_out) or not is_known) and first.fits(stored[::-1]), False
    if stored[0] == stored[1] and fan_in_fan_out:
        return not is_known, not is_known
    return False, False


def is_conv1d(weight: str, config: Mapping[str, Json]) -> bool:
    """Whether a weight is that of a `Conv1D` layer, which stores (in, out)."""
    layer = weight.split(".")[-2] if "." in weight else ""
    return layer in CONV1D.get(str(config.get("model_type")), ())


def is_class_known(config: Mapping[str, Json]) -> bool:
    """Whether transformers has the class or the model type that config.json names, so that its layers are known."""
    return tied_names(config) is not None or bool(task_classes(config))
