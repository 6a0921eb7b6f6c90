"""Headers to write: the trainers' fields that readers look for, ModelSpec, diffusers' settings.

Source: sd-scripts 48d368fa, library/sai_model_spec.py and networks/lora.py; Stability AI, ModelSpec 1.0.1; diffusers
0.42.1, loaders/lora_base.py `_pack_dict_with_prefix`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from loraformat.diagnostics import json_text
from loraformat.formats.kit.image.metadata import KEY
from loraformat.formats.kit.image.modules import BIAS
from loraformat.formats.kit.image.write import Plan, common, ranks_and_scales
from loraformat.formats.kit.scaling import Scaling
from loraformat.formats.kit.update_slots import most_common
from loraformat.model.adapter import Adapter
from loraformat.model.patterns.keys import ends_of
from loraformat.model.updates import LowRank

# Family → (architecture of ModelSpec, implementation of ModelSpec, the trainer's module).
_MODELS = {
    "sd": ("stable-diffusion-v1", "https://github.com/Stability-AI/generative-models", "networks.lora"),
    "sdxl": ("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models", "networks.lora"),
    "sd3": ("stable-diffusion-3", "https://github.com/Stability-AI/sd3-ref", "networks.lora_sd3"),
    "flux": ("flux-1-dev", "https://github.com/black-forest-labs/flux", "networks.lora_flux"),
    "flux2": ("flux-2", "https://github.com/black-forest-labs/flux2", "networks.lora_flux_2"),
    "chroma": ("chroma", "https://huggingface.co/lodestones/Chroma", "networks.lora_flux"),
    "qwen-image": ("qwen-image", "https://github.com/QwenLM/Qwen-Image", "networks.lora_qwen_image"),
    "wan": ("wan", "https://github.com/Wan-Video/Wan2.1", "networks.lora_wan"),
    "hunyuan-video": ("hunyuan-video", "https://github.com/Tencent/HunyuanVideo", "networks.lora"),
    "z-image": ("z-image", "https://github.com/Tongyi-MAI/Z-Image", "networks.lora_zimage"),
    "lumina2": ("lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", "networks.lora_lumina"),
}
_SPEC = "modelspec."


def modelspec(adapter: Adapter, plan: Plan) -> dict[str, str]:
    """The fields of ModelSpec that are true of any adapter of the family; title and date stay the source's."""
    raw = adapter.config.raw
    title = next(
        (raw[name] for name in ("modelspec.title", "ss_output_name") if isinstance(raw.get(name), str)), "LoRA"
    )
    found = {f"{_SPEC}sai_model_spec": "1.0.0", f"{_SPEC}title": str(title)}
    if plan.family is not None and plan.family.name in _MODELS:
        architecture, implementation, _ = _MODELS[plan.family.name]
        before = raw.get(f"{_SPEC}architecture")
        # A source of the same family may know the version better: flux-1-schnell, stable-diffusion-v3-large.
        is_same = isinstance(before, str) and before.lower().startswith(architecture.rpartition("-")[0].lower())
        found[f"{_SPEC}architecture"] = str(before) if is_same else f"{architecture}/lora"
        found[f"{_SPEC}implementation"] = implementation
    return found


def of_trainer(adapter: Adapter, plan: Plan, module: str = "") -> dict[str, str]:
    """ss_network_module, ss_network_dim and ss_network_alpha as the file has them, and ModelSpec."""
    every = [(rank, Scaling().alpha(scale, rank)) for _, _, rank, scale in ranks_and_scales(plan)]
    rank = common([rank for rank, _ in every])
    alpha = common([alpha for _, alpha in every])
    known = _MODELS[plan.family.name][2] if plan.family is not None and plan.family.name in _MODELS else "networks.lora"
    return {
        **modelspec(adapter, plan),
        "ss_network_module": module or known,
        "ss_network_dim": "Dynamic" if rank is None else str(rank),
        "ss_network_alpha": "Dynamic" if alpha is None else repr(float(alpha)),
    }


def of_diffusers(adapter: Adapter, plan: Plan) -> dict[str, str]:
    """`lora_adapter_metadata` where tensors alone do not say the scale of all modules, or what is DoRA; ModelSpec."""
    found = modelspec(adapter, plan) if any(name.startswith(_SPEC) for name in adapter.config.raw) else {}
    every = list(ranks_and_scales(plan))
    has_dora = any(_has_dora(plan, component) for component in plan.components)
    has_bias = any(BIAS in chains for modules in plan.components.values() for chains in modules.values())
    ranks = {component: {r for c, _, r, _ in every if c == component} for component in plan.components}
    if (
        has_dora
        or has_bias
        or any(scale != 1.0 for *_, scale in every)
        or any(len(each) > 1 for each in ranks.values())
    ):
        settings = {
            f"{component}.{name}": value
            for component in plan.components
            for name, value in _settings(plan, component).items()
        }
        found[KEY] = json.dumps(json.loads(json_text(settings)), indent=2, sort_keys=True)
    return found


def _settings(plan: Plan, component: str) -> Mapping[str, object]:
    """LoraConfig of one component: names without `text_model.`, which transformers 5 does not have in memory.

    Keys of patterns and names of targets select every module that ends so, but for those that begin with `^`: the
    denoiser's "proj_out" would select "single_transformer_blocks.0.proj_out" too.
    """
    every = {
        module.removeprefix("text_model."): (rank, Scaling().alpha(scale, rank))
        for each, module, rank, scale in ranks_and_scales(plan)
        if each == component
    }
    rank = most_common([rank for rank, _ in every.values()], 1)
    alpha = most_common([alpha for _, alpha in every.values()], float(rank))
    has_bias = any(BIAS in chains for chains in plan.components[component].values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_key(component, module): each for module, (each, _) in every.items() if each != rank},
        "alpha_pattern": {_key(component, module): each for module, (_, each) in every.items() if each != alpha},
        "target_modules": _targets(every),
        "use_dora": _has_dora(plan, component),
        "use_rslora": False,
        "lora_bias": has_bias,
        "bias": "none",
    }


def _key(component: str, module: str) -> str:
    return module if component.startswith("text_encoder") else f"^{module}"


def _targets(modules: Collection[str]) -> list[str] | str:
    """The modules as names, or as one pattern where one name is the end of another."""
    ends = {end for module in modules for end in ends_of(module) if end != module}
    if not ends.intersection(modules):
        return sorted(modules)
    return "|".join(re.escape(module) for module in sorted(modules))


def _has_dora(plan: Plan, component: str) -> bool:
    return any(
        isinstance(update, LowRank) and update.magnitude is not None
        for chains in plan.components[component].values()
        for chain in chains.values()
        for update in chain
    )
