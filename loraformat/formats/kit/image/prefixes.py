"""Prefixes of module names by component: kohya's numbers of text encoders, ComfyUI's names for them.

Source: sd-scripts 48d368fa, networks/lora.py, lora_sd3.py and lora_flux.py; ComfyUI 0.26.1, comfy/lora.py
`model_lora_keys_clip`.
"""

from __future__ import annotations

from loraformat.naming.families import Family

# Families whose pipelines have several text encoders, so that the first of them has a number too.
_NUMBERED = ("sdxl", "sd3", "flux", "hunyuan-video")
_CLIP_NAMES = {
    "sd": {"text_encoder": "clip_l"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "chroma": {"text_encoder": "t5xxl"},
    "hunyuan-video": {"text_encoder": "llama", "text_encoder_2": "clip_l"},
}


def kohya(component: str, family: Family | None) -> str | None:
    """`lora_unet_` for every denoiser; T5 of FLUX.1 is the third encoder of sd-scripts, and the second of diffusers."""
    name = family.name if family is not None else ""
    numbers = {
        "text_encoder": "1" if name in _NUMBERED else "",
        "text_encoder_2": "3" if name == "flux" else "2",
        "text_encoder_3": "3",
    }
    if component in numbers:
        return f"lora_te{numbers[component]}_"
    return None if component.startswith("text_encoder") else "lora_unet_"


def lycoris(component: str, family: Family | None) -> str | None:
    """`lycoris_` for the denoiser, as LyCORIS' own wrapper has it; text encoders as kohya's scripts."""
    return kohya(component, family) if component.startswith("text_encoder") else "lycoris_"


def comfy(component: str, family: Family | None) -> str | None:
    """`diffusion_model.`, and `text_encoders.clip_l.transformer.`."""
    if not component.startswith("text_encoder"):
        return "diffusion_model."
    name = _CLIP_NAMES.get(family.name if family is not None else "", {}).get(component)
    return None if name is None else f"text_encoders.{name}.transformer."


def diffusers(component: str, family: Family | None) -> str | None:
    """The component's own name."""
    del family
    return f"{component}."
