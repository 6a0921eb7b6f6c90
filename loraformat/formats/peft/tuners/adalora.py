"""AdaLoRA: a singular value for each direction, folded into the second factor.

ΔW = alpha / (init_r + 1e-5) · B (A ∘ E). Source: peft 0.21.2, tuners/adalora/layer.py `SVDLinear.get_delta_weight`.
"""

from __future__ import annotations

from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, require
from loraformat.model.floats import float64_of
from loraformat.model.updates import LowRank

_DEFAULT_RANK = 12


def _read(source: Source, module: str, parts: Parts) -> Chains:
    a, b, e = (parts.get(f"lora_{part}") for part in "ABE")
    if a is None or b is None or e is None:
        return {}
    require(e.shape == (a.shape[0], 1), module, f"lora_E {e.shape} does not fit lora_A {a.shape}")
    # The divisor is the first rank also after pruning, which leaves fewer directions in the file.
    rank = source.integer("init_r", _DEFAULT_RANK)
    alpha = source.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else float(rank)) / (rank + 1e-5)
    return {f"{module}.weight": (LowRank(b, computed(a.shape, lambda: float64_of(a) * float64_of(e)), scale),)}


ADALORA = Tuner(
    parts={f"lora_{part}": (2,) for part in "ABE"},
    read=_read,
    settings=(
        *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "beta1", "beta2", "corda_config", "deltaT"),
        *("eva_config", "init_lora_weights", "init_r", "kasa_config", "layer_replication", "loftq_config"),
        *("lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core"),
        *("monteclora_config", "orth_reg_weight", "qalora_group_size", "r", "rank_pattern", "runtime_config"),
        *("target_parameters", "target_r", "tfinal", "tinit", "total_step", "use_bdlora", "use_dora", "use_qalora"),
        *("use_rslora", "velora_config"),
    ),
)
