"""Dialects that are not read, told by the names of their tensors, so that they are not taken for hand-written code."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The names of a file → whose they are. Each is a spelling that no transformer of a single person's code has.
# Source: sd-scripts, networks/lora.py; diffusers 0.42.1, loaders/lora_conversion_utils.py; ComfyUI, comfy/lora.py;
# x-flux; torchtune 0.6.1, models/convert_weights.py; NeMo 1.x, parts/peft_config.py; llama.cpp, gguf-py.
_DIALECTS = (
    (r"lora_(unet|te[12]?|te3|transformer|prior_unet|llm_adapter)_", "an image or video adapter of kohya's scripts"),
    (r"(model\.)?diffusion_model\.", "an image or video adapter in ComfyUI's names"),
    (r"(unet|text_encoder(_[23])?|transformer_2)\.", "an image adapter of diffusers"),
    (r"transformer\.(single_)?transformer_blocks\.", "an image adapter of diffusers"),
    (r"(single_)?transformer_blocks\.[0-9]+\.", "an image adapter of diffusers"),
    (r"(double|single)_blocks\.[0-9]+\.", "an adapter for FLUX in the names of its authors or of XLabs"),
    (r"(down_blocks|up_blocks|mid_block)\.", "an image adapter of diffusers"),
    (
        r"layers\.[0-9]+\.(attn\.\w+_proj|mlp\.w[123])\.(lora_[ab]\.weight|magnitude)",
        "an adapter of torchtune",
    ),
    (r"(model\.)?decoder\.layers\.[0-9]+\.self_attention\.(linear_|adapter_)", "an adapter of NeMo or Megatron"),
    (r"model\.language_model\.encoder\.layers\.", "an adapter of NeMo or Megatron"),
    (r"blk\.[0-9]+\.", "an adapter in llama.cpp's names"),
)
_PATTERNS = tuple((re.compile(pattern), whose) for pattern, whose in _DIALECTS)


def dialect_of(names: Iterable[str]) -> tuple[str, str] | None:
    """(whose names they are, the first such name); None where they are nobody's that is known."""
    for name in names:
        for pattern, whose in _PATTERNS:
            if pattern.match(name):
                return whose, name
    return None
