"""MLX's stacked experts (`switch_mlp`), one update for each expert under the names that the base has.

Source: mlx-lm 0.32.2, mlx_lm/tuner/lora.py `LoRASwitchLinear`; models/mixtral.py, models/qwen3_moe.py `sanitize`.
"""

from __future__ import annotations

from loraformat.diagnostics import in_weights
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats.kit.base import Hints
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

_STACK = "switch_mlp"
# What the layers of an expert are called in checkpoints: as in MLX, or as in Mixtral.
_NAMES = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3"), "down_proj": ("down_proj", "w2")}


def experts_of(module: str, a: LazyTensor, b: LazyTensor, scale: float | None, hints: Hints) -> dict[str, LowRank]:
    """The updates of all experts of a stack by weight.

    Args:
        a: (experts, rank, in), in old files (experts · rank, in).
        b: (experts, out, rank).

    Raises:
        ConfigError (LF103): the factors do not fit each other.
        UnsupportedUpdate (LF013): what the experts are called only the base tells, and it is not there or stacks them.
    """
    if len(b.shape) != 3 or not b.numel:
        raise ConfigError(f"expected lora_b (experts, out, rank), found {b.shape}", where=in_weights(module))
    count, out, rank = b.shape
    if a.numel != count * rank * a.shape[-1] or a.shape[0] not in (count, count * rank):
        raise ConfigError(f"lora_a {a.shape} does not fit lora_b {b.shape}", where=in_weights(module))
    names = _weights(module, count, hints)
    flat, cols = a.reshape(count * rank, a.shape[-1]), a.shape[-1]
    return {
        name: LowRank(
            b.rows(number, number + 1).reshape(out, rank),
            flat.rows(number * rank, (number + 1) * rank).reshape(rank, cols),
            scale,
        )
        for number, name in enumerate(names)
    }


def _weights(module: str, count: int, hints: Hints) -> list[str]:
    path, _, layer = module.rpartition(".")
    owner, _, stack = path.rpartition(".")
    for name in _NAMES.get(layer, ()) if stack == _STACK else ():
        weights = [f"{owner}.experts.{number}.{name}.weight" for number in range(count)]
        if hints.weights is not None and all(weight in hints.weights for weight in weights):
            return weights
    why = "the base has no such experts" if hints.weights is not None else "only the base has their names"
    raise UnsupportedUpdate(
        f"a stack of {count} experts: {why}", where=in_weights(module), hint="pass the base with --base"
    )
