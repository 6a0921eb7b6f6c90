"""Modules that programs load fused, and therefore in one precision."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

# vLLM and SGLang want one precision for all of a group.
# Source: vllm 0.33.0, model_executor/models, `packed_modules_mapping`; quantization/utils `is_layer_skipped`.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
    ("in_proj_qkvz", "in_proj_ba"),
)
_EXPERTS = ".experts."


def fused_with(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """Those of `weights` that are loaded as one with a touched one: q, k and v; gate and up; a layer's experts.

    >>> sorted(fused_with({"m.q_proj.weight"}, {"m.q_proj.weight", "m.v_proj.weight", "m.o_proj.weight"}))
    ['m.q_proj.weight', 'm.v_proj.weight']
    """
    groups = {group for name in touched for group in _groups(name)}
    return {name for name in weights if name in touched or any(group in groups for group in _groups(name))}


def _groups(name: str) -> Iterator[tuple[str, int]]:
    module = name.removesuffix(".weight")
    parent, _, last = module.rpartition(".")
    for number, members in enumerate(_FUSED):
        if last in members:
            yield parent, number
    if _EXPERTS in f"{module}.":
        yield f"{module}.".partition(_EXPERTS)[0], len(_FUSED)
