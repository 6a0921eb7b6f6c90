"""Adapters whose names are not those of the checkpoint: other classes, older names, other prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from pins import skip_without_class
from safetensors.torch import load_file, save_file
from test_architectures_against_peft import LM, VISION

import loraformat
from loraformat.model.assumptions import Assumptions

BERT = {**LM, "num_key_value_heads": 2, "type_vocab_size": 2}
GEMMA = {"text_config": LM, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 39}


def merge(folder: Path, base: str = "base", adapter: str = "adapter", **more: Any) -> Path:
    loraformat.merge(str(folder / base), [str(folder / adapter)], str(folder / "out"), verify="full", **more)
    return folder / "out"


def test_aya_vision(tmp_path: Path) -> None:
    """Its checkpoint says language_model.model.layers, its adapter model.language_model.layers."""
    text = transformers.Cohere2Config(**LM)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.AyaVisionConfig(text_config=text, vision_config=vision, image_token_index=39)
    torch.manual_seed(0)
    model = transformers.AyaVisionForConditionalGeneration(config).eval()
    both = tiny.adapted(model, tmp_path, target_modules=["down_proj", "fc1"])
    tiny.check_merged(merge(tmp_path), "AyaVisionForConditionalGeneration", both)


def test_detr(tmp_path: Path) -> None:
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    sides = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 24))
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4}
    for name in ("Detr", "ConditionalDetr"):
        config = getattr(transformers, f"{name}Config")(
            backbone_config=backbone,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            d_model=16,
            **sides,
            **heads,
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
        folder = tmp_path / name
        both = tiny.adapted(model, folder, target_modules=["q_proj", "o_proj"])
        inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)}
        tiny.check_merged(merge(folder), f"{name}ForObjectDetection", both, inputs)


def test_gamma_and_beta(tmp_path: Path) -> None:
    model = tiny.build("BertForMaskedLM", "BertConfig", BERT)
    both = tiny.adapted(model, tmp_path, target_modules=["query"], bias="all")
    path = tmp_path / "base" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, value in load_file(path).items():
        end = next((end for end in old if name.endswith(end)), "")
        tensors[name.removesuffix(end) + old.get(end, "")] = value
    save_file(tensors, path, metadata={"format": "pt"})
    tiny.check_merged(merge(tmp_path), "BertForMaskedLM", both)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def gemma(name: str) -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma3Config(**GEMMA) if name == "Gemma3ForConditionalGeneration" else None
    return getattr(transformers, name)(config or transformers.Gemma3TextConfig(**LM)).eval()


@pytest.mark.parametrize(
    ("trained", "stored"),
    [
        ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    ],
)
def test_a_language_model_with_and_without_the_model_around_it(trained: str, stored: str, tmp_path: Path) -> None:
    """The adapter of one class is that of the other under other names."""
    targets = r".*self_attn\.[qv]_proj" if stored.endswith("LM") is False else r"(?!.*vision).*self_attn\.[qv]_proj"
    tiny.adapted(gemma(trained), tmp_path, target_modules=targets)
    gemma(stored).save_pretrained(tmp_path / "other")
    out = merge(tmp_path, base="other")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "other", out))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    factors = {name.split("layers.")[1].removesuffix(".lora_A.weight"): name for name in adapter if "lora_A" in name}
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert {name.split("layers.")[1].removesuffix(".weight") for name in changed} == factors.keys()
    for name in changed:
        a = factors[name.split("layers.")[1].removesuffix(".weight")]
        update = 2 * adapter[a.replace("lora_A", "lora_B")] @ adapter[a]
        torch.testing.assert_close(after[name], before[name] + update, atol=1e-5, rtol=0)


def test_a_dump_of_the_bare_model_below_other_names(tmp_path: Path) -> None:
    """As sentence-transformers saves a training step: its own prefix, base weights included."""
    tiny.build("BertForMaskedLM", "BertConfig", BERT).save_pretrained(tmp_path / "base")
    bare = transformers.BertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False).eval()
    both = peft.get_peft_model(bare, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query"]))
    tiny.randomize(both)
    step = {f"0.auto_model.{name.replace('.default', '')}": value for name, value in both.state_dict().items()}
    save_file({name: value.contiguous() for name, value in step.items()}, tmp_path / "step.safetensors")
    out = merge(tmp_path, adapter="step.safetensors", assumptions=Assumptions(alpha=4))
    model = transformers.BertModel.from_pretrained(out, add_pooling_layer=False).eval()
    torch.testing.assert_close(tiny.outputs(model), tiny.outputs(both.eval()), atol=1e-4, rtol=0)


def test_a_head_that_checkpoints_keep_inside_a_module_of_their_own(tmp_path: Path) -> None:
    """Its checkpoint says segmentation_head.blocks.0.pwconv1; renamed, it is below the prefix of the bare model."""
    backbone = transformers.RfDetrConfig().backbone_config
    shrunk = type(backbone)(
        **{**VISION, "num_hidden_layers": 3, "num_windows": 1, "image_size": 32, "out_features": ["stage1", "stage2"]}
    )
    config = transformers.RfDetrConfig(backbone_config=shrunk, d_model=16, decoder_layers=1, num_queries=4)
    torch.manual_seed(0)
    model = transformers.RfDetrForInstanceSegmentation(config).eval()
    both = tiny.adapted(model, tmp_path, target_modules=["pointwise_conv", "o_proj"])
    inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}
    tiny.check_merged(merge(tmp_path), "RfDetrForInstanceSegmentation", both, inputs)


def test_a_model_of_which_one_rule_counts(tmp_path: Path) -> None:
    """Inkling 2: one of its rules adds to a number, and all others are plain renamings."""
    skip_without_class("Inkling2ForCausalLM")
    torch.manual_seed(0)
    config = transformers.Inkling2TextConfig(**{**LM, "num_key_value_heads": 2})
    model = transformers.Inkling2ForCausalLM(config).eval()
    both = tiny.adapted(model, tmp_path, target_modules=["q_proj", "v_proj", "o_proj"])
    tiny.check_merged(merge(tmp_path), "Inkling2ForCausalLM", both)
