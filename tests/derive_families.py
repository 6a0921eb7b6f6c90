"""Write loraformat/naming/families/families.json: the module names of image and video models, as rules.

    python tests/derive_families.py [--check]

Needs diffusers and transformers, which nothing else of this package does. The names in diffusers are those of module
trees that diffusers 0.42.1 builds from tiny configs: each name of the table must be in a tree, and each module with a
weight that LoRA can reach must be in the table. The names of the originals are the rules below; that they are right is
shown by diffusers' own checkpoint converters in tests/upstream/test_families.py.

With --check nothing is written: exit 1 where the table on disk is another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TABLE = Path(__file__).parents[1] / "loraformat" / "naming" / "families" / "families.json"
Rules = dict[str, "str | list[str]"]


def within(original: str, diffusers: str, modules: Rules) -> Rules:
    """Rules below a prefix of each naming; "=" stands for the same name."""
    found: Rules = {}
    for name, parts in modules.items():
        listed = parts if isinstance(parts, list) else [name if parts == "=" else parts]
        found[original + name] = [diffusers + part for part in listed]
    return found


def same(*names: str) -> Rules:
    return {name: name for name in names}


def embedder(original: tuple[str, str], diffusers: str) -> Rules:
    """The two layers of an embedding of a time, a guidance or a pooled text."""
    return {name: f"{diffusers}.linear_{number}" for number, name in enumerate(original, 1)}


QKV = ["attn.to_q", "attn.to_k", "attn.to_v"]
ADDED = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
FF = ("ff.net.0.proj", "ff.net.2")
CONTEXT = ("ff_context.net.0.proj", "ff_context.net.2")


def norms(*prefixes: str) -> Rules:
    """The norms of queries and keys in blocks of FLUX, of the image and of the text; their parameter is `scale`."""
    return {
        f"{prefix}{name}_norm": f"attn.norm_{added}{name[0]}"
        for prefix, added in zip(prefixes, ("", "added_"), strict=False)
        for name in ("query", "key")
    }


def flux_blocks(*, modulated: bool) -> Rules:
    double: Rules = {
        "img_attn.qkv": QKV,
        "txt_attn.qkv": ADDED,
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": FF[0],
        "img_mlp.2": FF[1],
        "txt_mlp.0": CONTEXT[0],
        "txt_mlp.2": CONTEXT[1],
    }
    single: Rules = {"linear1": [*QKV, "proj_mlp"], "linear2": "proj_out"}
    double |= norms("img_attn.norm.", "txt_attn.norm.")
    single |= norms("norm.")
    if modulated:
        double |= {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}
        single |= {"modulation.lin": "norm.linear"}
    return within("double_blocks.{}.", "transformer_blocks.{}.", double) | within(
        "single_blocks.{}.", "single_transformer_blocks.{}.", single
    )


FLUX = {
    **flux_blocks(modulated=True),
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **embedder(("time_in.in_layer", "time_in.out_layer"), "time_text_embed.timestep_embedder"),
    **embedder(("guidance_in.in_layer", "guidance_in.out_layer"), "time_text_embed.guidance_embedder"),
    **embedder(("vector_in.in_layer", "vector_in.out_layer"), "time_text_embed.text_embedder"),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
CHROMA = {
    **flux_blocks(modulated=False),
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **same(
        "distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj", "distilled_guidance_layer.norms.{}"
    ),
    "distilled_guidance_layer.layers.{}.in_layer": "distilled_guidance_layer.layers.{}.linear_1",
    "distilled_guidance_layer.layers.{}.out_layer": "distilled_guidance_layer.layers.{}.linear_2",
    "final_layer.linear": "proj_out",
}
FLUX2 = {
    **within(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "img_attn.qkv": QKV,
            "txt_attn.qkv": ADDED,
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
            **norms("img_attn.norm.", "txt_attn.norm."),
        },
    ),
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.attn.to_out",
    **within("single_blocks.{}.", "single_transformer_blocks.{}.", norms("norm.")),
    **{
        f"{name}.lin": f"{name}.linear"
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **embedder(("time_in.in_layer", "time_in.out_layer"), "time_guidance_embed.timestep_embedder"),
    **embedder(("guidance_in.in_layer", "guidance_in.out_layer"), "time_guidance_embed.guidance_embedder"),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SD3 = {
    **within(
        "joint_blocks.{}.x_block.",
        "transformer_blocks.{}.",
        {
            "attn.qkv": QKV,
            "attn.proj": "attn.to_out.0",
            "attn2.qkv": [name.replace("attn.", "attn2.") for name in QKV],
            "attn2.proj": "attn2.to_out.0",
            "mlp.fc1": FF[0],
            "mlp.fc2": FF[1],
            "adaLN_modulation.1": "norm1.linear",
            **{f"{attn}.ln_{part}": f"{attn}.norm_{part}" for attn in ("attn", "attn2") for part in "qk"},
        },
    ),
    **within(
        "joint_blocks.{}.context_block.",
        "transformer_blocks.{}.",
        {
            "attn.qkv": ADDED,
            "attn.proj": "attn.to_add_out",
            "mlp.fc1": CONTEXT[0],
            "mlp.fc2": CONTEXT[1],
            "adaLN_modulation.1": "norm1_context.linear",
            **{f"attn.ln_{part}": f"attn.norm_added_{part}" for part in "qk"},
        },
    ),
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "=",
    **embedder(("t_embedder.mlp.0", "t_embedder.mlp.2"), "time_text_embed.timestep_embedder"),
    **embedder(("y_embedder.mlp.0", "y_embedder.mlp.2"), "time_text_embed.text_embedder"),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
QWEN = same(
    *(f"transformer_blocks.{{}}.{name}" for name in (*QKV, *ADDED, "attn.to_out.0", "attn.to_add_out")),
    *(f"transformer_blocks.{{}}.attn.norm_{name}" for name in ("q", "k", "added_q", "added_k")),
    *(
        f"transformer_blocks.{{}}.{side}_{name}"
        for side in ("img", "txt")
        for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2")
    ),
    *("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
)
WAN = {
    **within(
        "blocks.{}.",
        "blocks.{}.",
        {
            **{
                f"{before}.{name}": f"{after}.{leaf}"
                for before, after in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for name, leaf in (
                    *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
                    *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
                )
            },
            "cross_attn.k_img": "attn2.add_k_proj",
            "cross_attn.v_img": "attn2.add_v_proj",
            "cross_attn.norm_k_img": "attn2.norm_added_k",
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            "norm3": "norm2",
        },
    ),
    "patch_embedding": "=",
    **embedder(("text_embedding.0", "text_embedding.2"), "condition_embedder.text_embedder"),
    **embedder(("time_embedding.0", "time_embedding.2"), "condition_embedder.time_embedder"),
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
REFINER = {
    "self_attn_qkv": QKV,
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": FF[0],
    "mlp.fc2": FF[1],
    "adaLN_modulation.1": "norm_out.linear",
    "norm1": "norm1",
    "norm2": "norm2",
}
HUNYUAN = {
    **within(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "img_mod.linear": "norm1.linear",
            "txt_mod.linear": "norm1_context.linear",
            "img_attn_qkv": QKV,
            "txt_attn_qkv": ADDED,
            "img_attn_proj": "attn.to_out.0",
            "txt_attn_proj": "attn.to_add_out",
            "img_mlp.fc1": FF[0],
            "img_mlp.fc2": FF[1],
            "txt_mlp.fc1": CONTEXT[0],
            "txt_mlp.fc2": CONTEXT[1],
            **{
                f"{side}_attn_{part}_norm": f"attn.norm_{added}{part}"
                for side, added in (("img", ""), ("txt", "added_"))
                for part in "qk"
            },
        },
    ),
    **within(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        {
            "linear1": [*QKV, "proj_mlp"],
            "linear2": "proj_out",
            "modulation.linear": "norm.linear",
            "q_norm": "attn.norm_q",
            "k_norm": "attn.norm_k",
        },
    ),
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    **embedder(
        ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2"), "context_embedder.time_text_embed.timestep_embedder"
    ),
    **embedder(
        ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2"), "context_embedder.time_text_embed.text_embedder"
    ),
    **within(
        "txt_in.individual_token_refiner.blocks.{}.", "context_embedder.token_refiner.refiner_blocks.{}.", REFINER
    ),
    **embedder(("time_in.mlp.0", "time_in.mlp.2"), "time_text_embed.timestep_embedder"),
    **embedder(("vector_in.in_layer", "vector_in.out_layer"), "time_text_embed.text_embedder"),
    **embedder(("guidance_in.mlp.0", "guidance_in.mlp.2"), "time_text_embed.guidance_embedder"),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def next_dit(attention: str, feed_forward: tuple[str, str, str], modulation: dict[str, str]) -> Rules:
    """The blocks that Z-Image and Lumina 2 have in common, each with its own names in diffusers."""
    block: Rules = {
        "attention.qkv": [f"{attention}.to_{part}" for part in "qkv"],
        "attention.out": f"{attention}.to_out.0",
        **{f"attention.{part}_norm": f"{attention}.norm_{part}" for part in "qk"},
        **{f"feed_forward.w{number}": f"feed_forward.{name}" for number, name in enumerate(feed_forward, 1)},
    }
    found: Rules = {}
    for stack in ("layers", "noise_refiner", "context_refiner"):
        inner = block if stack == "context_refiner" else block | modulation
        found |= within(f"{stack}.{{}}.", f"{stack}.{{}}.", inner)
    return found


ZIMAGE = {
    **next_dit("attention", ("w1", "w2", "w3"), {"adaLN_modulation.0": "adaLN_modulation.0"}),
    **{
        f"{stack}.{{}}.{name}": "="
        for stack in ("layers", "noise_refiner", "context_refiner")
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    },
    **same("cap_embedder.0", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"),
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
LUMINA2 = {
    **next_dit("attn", ("linear_1", "linear_2", "linear_3"), {"adaLN_modulation.1": "norm1.linear"}),
    **{
        f"{stack}.{{}}.{original}": f"{stack}.{{}}.{name}"
        for stack, first in (("layers", "norm1.norm"), ("noise_refiner", "norm1.norm"), ("context_refiner", "norm1"))
        for original, name in (
            *(("attention_norm1", first), ("attention_norm2", "norm2")),
            *(("ffn_norm1", "ffn_norm1"), ("ffn_norm2", "ffn_norm2")),
        )
    },
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    **embedder(("t_embedder.mlp.0", "t_embedder.mlp.2"), "time_caption_embed.timestep_embedder"),
    "x_embedder": "=",
    "final_layer.linear": "norm_out.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
}
RESNET: Rules = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def attention(layer: str) -> Rules:
    inner = [f"attn{number}.{leaf}" for number in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
    names = [*inner, *FF, "norm1", "norm2", "norm3"]
    return same("norm", "proj_in", "proj_out", *(f"transformer_blocks.{layer}.{name}" for name in names))


def unet(down: str, up: str, layer: str, *, has_label: bool) -> Rules:
    """The U-Net of Stable Diffusion: two resnets in each block of the way down, three in each of the way up.

    Args:
        down, up: a letter for each block: "A" where it has attention.
        layer: number of a transformer block within an attention: "{}", or "0" where there is one.
    """
    found: Rules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        **within("middle_block.0.", "mid_block.resnets.0.", RESNET),
        **within("middle_block.1.", "mid_block.attentions.0.", attention(layer)),
        **within("middle_block.2.", "mid_block.resnets.1.", RESNET),
    }
    if has_label:
        found |= {f"label_emb.0.{2 * number}": f"add_embedding.linear_{number + 1}" for number in (0, 1)}
    for i, kind in enumerate(down):
        for j in range(2):
            found |= within(f"input_blocks.{3 * i + j + 1}.0.", f"down_blocks.{i}.resnets.{j}.", RESNET)
            if kind == "A":
                found |= within(
                    f"input_blocks.{3 * i + j + 1}.1.", f"down_blocks.{i}.attentions.{j}.", attention(layer)
                )
        if i < len(down) - 1:
            found[f"input_blocks.{3 * i + 3}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
    for i, kind in enumerate(up):
        for j in range(3):
            found |= within(f"output_blocks.{3 * i + j}.0.", f"up_blocks.{i}.resnets.{j}.", RESNET)
            if kind == "A":
                found |= within(f"output_blocks.{3 * i + j}.1.", f"up_blocks.{i}.attentions.{j}.", attention(layer))
        if i < len(up) - 1:
            place = 2 if kind == "A" else 1
            found[f"output_blocks.{3 * i + 2}.{place}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return found


# OpenCLIP, whose names the checkpoints of Stable Diffusion 2 and XL have: open_clip 2.20.0, transformer.py. Its
# positional embedding and its text projection are parameters without a module, the latter stored as its transpose.
CLIP: Rules = {
    **within(
        "transformer.resblocks.{}.",
        "text_model.encoder.layers.{}.",
        {
            "attn": [f"self_attn.{part}_proj" for part in "qkv"],
            "attn.out_proj": "self_attn.out_proj",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
        },
    ),
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    **same("text_model.embeddings.position_embedding", "text_projection"),
}
T5 = same(
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{part}" for part in "qkvo"),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{part}" for part in ("wi", "wi_0", "wi_1", "wo")),
    *(
        "encoder.block.{}.layer.0.layer_norm",
        "encoder.block.{}.layer.1.layer_norm",
        "encoder.final_layer_norm",
        "shared",
    ),
)

# Rows of a module, a number for each of its parts, in units of its inputs. They part a fused module where no base does,
# and tell families with the same names.
DOUBLE = {f"double_blocks.{{}}.{side}_attn.qkv": "1 1 1" for side in ("img", "txt")}
ROWS = {
    "flux": {
        **DOUBLE,
        "single_blocks.{}.linear1": "1 1 1 4",
        **{f"double_blocks.{{}}.{side}_mlp.0": "4" for side in ("img", "txt")},
        **{f"double_blocks.{{}}.{side}_mlp.2": "1/4" for side in ("img", "txt")},
        "single_blocks.{}.linear2": "1/5",
    },
    "flux2": {
        **DOUBLE,
        "single_blocks.{}.linear1": "9",
        **{f"double_blocks.{{}}.{side}_mlp.0": "6" for side in ("img", "txt")},
        **{f"double_blocks.{{}}.{side}_mlp.2": "1/3" for side in ("img", "txt")},
        "single_blocks.{}.linear2": "1/4",
    },
    "sd3": {
        f"joint_blocks.{{}}.{block}.qkv": "1 1 1" for block in ("x_block.attn", "x_block.attn2", "context_block.attn")
    },
    "hunyuan-video": {
        **{f"double_blocks.{{}}.{side}_attn_qkv": "1 1 1" for side in ("img", "txt")},
        "single_blocks.{}.linear1": "1 1 1 4",
        "single_blocks.{}.linear2": "1/5",
        "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv": "1 1 1",
    },
    "z-image": {f"{stack}.{{}}.attention.qkv": "1 1 1" for stack in ("layers", "noise_refiner", "context_refiner")},
    "lumina2": {  # 24 heads, 8 of keys and values: diffusers 0.42.1, `convert_lumina2_to_diffusers` has 2304, 768, 768
        f"{stack}.{{}}.attention.qkv": "1 1/3 1/3" for stack in ("layers", "noise_refiner", "context_refiner")
    },
}
ROWS["chroma"] = ROWS["flux"]
ROWS["clip"] = {"transformer.resblocks.{}.attn": "1 1 1"}
# What the original calls a parameter that is `weight` or `bias` in diffusers.
SCALE = {"weight": "scale"}
NORMS = {
    f"{block}norm.{name}_norm": SCALE
    for block in ("double_blocks.{}.img_attn.", "double_blocks.{}.txt_attn.", "single_blocks.{}.")
    for name in ("query", "key")
}
PARAMETERS = {
    "flux": NORMS,
    "flux2": NORMS,
    "chroma": NORMS | {"distilled_guidance_layer.norms.{}": SCALE},
    "clip": {"transformer.resblocks.{}.attn": {"weight": "in_proj_weight", "bias": "in_proj_bias"}},
}
# Two halves of the rows stand in the other order in diffusers: (shift, scale) there, (scale, shift) here. Where the
# module has more rows than twice its inputs, it is another one than the last, and nothing is swapped.
SWAPPED = {
    "flux": ["final_layer.adaLN_modulation.1"],
    "flux2": ["final_layer.adaLN_modulation.1"],
    "sd3": ["final_layer.adaLN_modulation.1", "joint_blocks.{}.context_block.adaLN_modulation.1"],
    "hunyuan-video": ["final_layer.adaLN_modulation.1"],
}
# Other names for the same module, which some tool writes.
MUSUBI = {  # musubi-tuner's convert_lora.py gives FLUX.2 the names of HunyuanVideo: musubi-tuner issue 905
    f"double_blocks.{{}}.{side}_attn_{leaf}": f"double_blocks.{{}}.{side}_attn.{leaf}"
    for side in ("img", "txt")
    for leaf in ("qkv", "proj")
}
XLABS = {  # x-flux, src/flux/modules/layers.py `DoubleStreamBlockLoraProcessor`
    **{
        f"double_blocks.{{}}.processor.{leaf}{number}": f"double_blocks.{{}}.{side}_attn.{leaf}"
        for number, side in ((1, "img"), (2, "txt"))
        for leaf in ("qkv", "proj")
    },
    "single_blocks.{}.processor.proj": "single_blocks.{}.linear2",
}
CLIP_5 = {  # transformers 5 has no `text_model.` in memory
    name.removeprefix("text_model."): name
    for parts in CLIP.values()
    for name in (parts if isinstance(parts, list) else [parts])
    if name.startswith("text_model.")
}
CUT = {  # a prefix that some tool cut off at the wrong place
    f"sformer_blocks.{{}}.{name.partition('.{}.')[2]}": name
    for module in FLUX2.values()
    for name in (module if isinstance(module, list) else [module])
    if name.startswith("transformer_blocks.")
}
ALIASES = {"flux": XLABS, "flux2": MUSUBI, "clip": CLIP_5}
DIFFUSERS_ALIASES = {"flux2": CUT}
# What a tool adapts as one module and the original does not have as one.
PARTIAL = {"flux": {"single_blocks.{}.processor.qkv": [f"single_transformer_blocks.{{}}.{name}" for name in QKV]}}

DIFFUSERS = "diffusers 0.42.1"
FAMILIES = {
    "sd": ("Stable Diffusion 1 and 2", "unet", ["UNet2DConditionModel"], unet("AAA-", "-AAA", "0", has_label=False)),
    "sdxl": ("Stable Diffusion XL", "unet", ["UNet2DConditionModel"], unet("-AA", "AA-", "{}", has_label=True)),
    "sd3": ("Stable Diffusion 3 and 3.5", "transformer", ["SD3Transformer2DModel"], SD3),
    "flux": ("FLUX.1", "transformer", ["FluxTransformer2DModel"], FLUX),
    "flux2": ("FLUX.2", "transformer", ["Flux2Transformer2DModel"], FLUX2),
    "chroma": ("Chroma", "transformer", ["ChromaTransformer2DModel"], CHROMA),
    "qwen-image": ("Qwen-Image", "transformer", ["QwenImageTransformer2DModel"], QWEN),
    "wan": ("Wan 2.1 and 2.2", "transformer", ["WanTransformer3DModel"], WAN),
    "hunyuan-video": ("HunyuanVideo", "transformer", ["HunyuanVideoTransformer3DModel"], HUNYUAN),
    "z-image": ("Z-Image", "transformer", ["ZImageTransformer2DModel"], ZIMAGE),
    "lumina2": ("Lumina 2", "transformer", ["Lumina2Transformer2DModel"], LUMINA2),
    "clip": ("CLIP", "text_encoder", ["CLIPTextModel", "CLIPTextModelWithProjection"], CLIP),
    "t5": ("T5", "text_encoder_2", ["T5EncoderModel"], T5),
}
# Which names the trainers' files have after `lora_unet_`, and ComfyUI's after `diffusion_model.`.
KOHYA = {"sd": "diffusers", "qwen-image": "diffusers", "z-image": "diffusers"}
COMFY = {"qwen-image": "diffusers", "z-image": "diffusers"}


def table() -> dict[str, object]:
    found: dict[str, object] = {}
    for name, (title, component, classes, rules) in FAMILIES.items():
        modules = []
        for original, parts in rules.items():
            listed = [original if part == "=" else part for part in (parts if isinstance(parts, list) else [parts])]
            line: dict[str, object] = {"original": original, "diffusers": listed}
            if rows := ROWS.get(name, {}).get(original):
                line["rows"] = rows.split()
            if original in SWAPPED.get(name, []):
                line["swapped"] = True
            if parameters := PARAMETERS.get(name, {}).get(original):
                line["parameters"] = parameters
            modules.append(line)
        found[name] = {
            "title": title,
            "component": component,
            "classes": classes,
            "kohya": KOHYA.get(name, "original"),
            "comfy": COMFY.get(name, "original"),
            "modules": modules,
            "aliases": {**ALIASES.get(name, {}), **DIFFUSERS_ALIASES.get(name, {})},
            "partial": PARTIAL.get(name, {}),
        }
    return found


def text_of(families: dict[str, object]) -> str:
    """JSON with a line for each module."""
    blocks = []
    for name, family in families.items():
        assert isinstance(family, dict)
        head = [f"    {json.dumps(key)}: {json.dumps(value)}," for key, value in family.items() if key != "modules"]
        lines = ",\n".join(f"      {json.dumps(line)}" for line in family["modules"])
        blocks.append("\n".join([f"  {json.dumps(name)}: {{", *head, '    "modules": [', lines, "    ]", "  }"]))
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> int:
    text = text_of(table())
    if "--check" in sys.argv:
        return int(text != TABLE.read_text(encoding="utf-8"))
    TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
