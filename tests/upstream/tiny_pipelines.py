"""Tiny random models of every family by diffusers, and its loaders around them: a second opinion in process."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Family → (class of the model, its config, the mixin with the loader).
MODELS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "sd": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 2,
            "sample_size": 8,
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        "StableDiffusionLoraLoaderMixin",
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (8, 8, 8),
            "layers_per_block": 2,
            "sample_size": 8,
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 24,
        },
        "StableDiffusionXLLoraLoaderMixin",
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 12,
            "dual_attention_layers": (0,),
        },
        "SD3LoraLoaderMixin",
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 12,
            "axes_dims_rope": [2, 2, 4],
            "guidance_embeds": True,
        },
        "FluxLoraLoaderMixin",
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": [2, 2, 2, 2],
        },
        "Flux2LoraLoaderMixin",
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": [2, 2, 4],
            "approximator_num_channels": 4,
            "approximator_hidden_dim": 8,
            "approximator_layers": 2,
        },
        "FluxLoraLoaderMixin",
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (2, 2, 4),
        },
        "QwenImageLoraLoaderMixin",
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 8,
            "ffn_dim": 24,
            "num_layers": 2,
            "cross_attn_norm": True,
            "rope_max_seq_len": 16,
        },
        "WanLoraLoaderMixin",
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 12,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 2, 4),
        },
        "HunyuanVideoLoraLoaderMixin",
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": [4, 2, 2],
            "axes_lens": [64, 64, 64],
        },
        "ZImageLoraLoaderMixin",
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 4,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "axes_dim_rope": [4, 2, 2],
            "cap_feat_dim": 12,
        },
        "Lumina2LoraLoaderMixin",
    ),
}
# diffusers writes FLUX.1's and HunyuanVideo's sizes into its converters, and Lumina 2's.
_SIZED = ("_convert_kohya_flux_lora_to_diffusers", "_convert_hunyuan_video_lora_to_diffusers")


def model_of(family: str) -> Any:
    """A model with random values, the same each time."""
    import diffusers

    name, config, _ = MODELS[family]
    torch.manual_seed(7)
    with torch.no_grad():
        model = getattr(diffusers, name)(**config).eval()
        for parameter in model.parameters():
            if float(parameter.abs().max()) == 0:
                parameter.normal_(std=0.02)
    return model


def pipeline_of(family: str, model: Any) -> Any:
    """The loader of the family around a model, as users call it."""
    import diffusers.loaders as loaders
    from diffusers.loaders import lora_conversion_utils, lora_pipeline

    for name in _SIZED:
        setattr(lora_pipeline, name, of_size(lora_conversion_utils, name, family))
    kind = getattr(loaders, MODELS[family][2])
    component = "unet" if family in ("sd", "sdxl") else "transformer"

    class Pipeline(kind):  # type: ignore[misc, valid-type]
        hf_device_map = None
        components: dict[str, Any]
        _lora_loadable_modules = (component,)

    found = Pipeline()
    found.components = {component: model}
    setattr(found, component, model)
    found.text_encoder = found.text_encoder_2 = None
    return found


_SOURCES: dict[str, str] = {}


def of_size(module: Any, name: str, family: str) -> Any:
    """A function of diffusers with the sizes of the tiny model in place of those that are written in its source."""
    config = MODELS[family][1]
    hidden = config.get("attention_head_dim", 0) * config.get("num_attention_heads", 0)
    if name not in _SOURCES:
        _SOURCES[name] = inspect.getsource(getattr(module, name))
    source = _SOURCES[name]
    sizes = {"12288": 4 * hidden, "3072": hidden, "2304": config.get("hidden_size", 0)}
    sizes["768"] = sizes["2304"] // 3
    for before, after in sizes.items():
        source = source.replace(before, str(after))
    exec(source, module.__dict__)
    return module.__dict__[name]


def inputs_of(family: str) -> dict[str, Any]:  # noqa: C901 - one case for each family
    """Arguments of one step of the denoiser."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    time = torch.tensor([5.0])
    if family in ("sd", "sdxl"):
        found: dict[str, Any] = {
            "sample": random(1, 4, 8, 8),
            "timestep": time,
            "encoder_hidden_states": random(1, 5, 12),
        }
        if family == "sdxl":
            found["added_cond_kwargs"] = {"text_embeds": random(1, 16), "time_ids": random(1, 2)}
        return found
    if family == "sd3":
        return {
            "hidden_states": random(1, 4, 8, 8),
            "encoder_hidden_states": random(1, 5, 16),
            "pooled_projections": random(1, 12),
            "timestep": time,
        }
    if family in ("flux", "flux2", "chroma"):
        axes = len(MODELS[family][1]["axes_dims_rope"])
        found = {
            "hidden_states": random(1, 4, 4),
            "encoder_hidden_states": random(1, 5, 12),
            "timestep": time / 10,
            "img_ids": torch.zeros(4, axes),
            "txt_ids": torch.zeros(5, axes),
        }
        if family != "chroma":
            found["guidance"] = time
        if family == "flux":
            found["pooled_projections"] = random(1, 12)
        return found
    if family == "qwen-image":
        return {
            "hidden_states": random(1, 4, 16),
            "encoder_hidden_states": random(1, 5, 12),
            "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
            "timestep": time,
            "img_shapes": [[(1, 2, 2)]],
        }
    if family == "wan":
        return {
            "hidden_states": random(1, 4, 1, 4, 4),
            "encoder_hidden_states": random(1, 5, 12),
            "timestep": time.long(),
        }
    if family == "hunyuan-video":
        return {
            "hidden_states": random(1, 4, 1, 4, 4),
            "encoder_hidden_states": random(1, 5, 12),
            "encoder_attention_mask": torch.ones(1, 5),
            "pooled_projections": random(1, 8),
            "timestep": time,
            "guidance": time,
        }
    if family == "z-image":
        return {"x": [random(4, 1, 4, 4)], "t": time / 10, "cap_feats": [random(5, 12)]}
    return {
        "hidden_states": random(1, 4, 4, 4),
        "timestep": time / 10,
        "encoder_hidden_states": random(1, 5, 12),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
    }


def step(family: str, model: Any) -> Tensor:
    """What one step of the denoiser gives."""
    with torch.no_grad():
        found = model(**inputs_of(family), return_dict=False)[0]
    return found[0] if isinstance(found, list) else found
