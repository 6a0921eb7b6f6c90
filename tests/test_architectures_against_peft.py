"""Merging on disk against PEFT's merge in memory: tiny random models of many architectures × configurations of LoRA.

Each model is saved by transformers, its adapter by PEFT, and what loraformat merges is compared tensor by tensor with
what transformers saves of PEFT's merged model: names, shapes and values. Where PEFT's merge is known not to be what its
un-merged model computes, the outputs of the un-merged model are the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import loraformat

LM = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ENCODER = {**LM, "is_decoder": False}
GPT = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
VISION = {**VIT, "patch_size": 4}
SIDES = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 24))}
WHISPER = {
    "vocab_size": 40,
    "d_model": 16,
    **SIDES,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
}


def text_model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**{**LM, **settings})
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


def model(name: str, head: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**settings))


def vision_language(name: str, text: str, vision: str = "CLIPVision", **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        inner = getattr(transformers, f"{text}Config")(**LM)
        tower = getattr(transformers, f"{vision}Config")(**VISION, projection_dim=16)
        config = getattr(transformers, f"{name}Config")(
            text_config=inner, vision_config=tower, image_token_index=39, tie_word_embeddings=False, **more
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return build


def gemma3() -> nn.Module:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**LM))


def clip() -> nn.Module:
    parts = {"text_config": {**LM, "projection_dim": 8}, "vision_config": {**VISION, "projection_dim": 8}}
    return transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=8))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": text_model("Llama"),
    "llama-tied": text_model("Llama", tie_word_embeddings=True),
    "mistral": text_model("Mistral"),
    "qwen2": text_model("Qwen2"),
    "qwen3": text_model("Qwen3"),
    "gemma2": text_model("Gemma2"),
    "gemma3": gemma3,
    "phi3": text_model("Phi3"),
    "olmo2": text_model("Olmo2"),
    "starcoder2": text_model("Starcoder2"),
    "stablelm": text_model("StableLm"),
    "cohere": text_model("Cohere"),
    "falcon": model("Falcon", "ForCausalLM", {name: value for name, value in LM.items() if name != "head_dim"}),
    "gpt-neox": text_model("GPTNeoX"),
    "bloom": text_model("Bloom"),
    "opt": text_model("OPT", ffn_dim=24, word_embed_proj_dim=16),
    "mamba": text_model("Mamba", state_size=4),
    "mixtral": text_model("Mixtral", **EXPERTS),
    "qwen2-moe": text_model("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=12),
    "qwen3-moe": text_model("Qwen3Moe", **EXPERTS),
    "olmoe": text_model("Olmoe", **EXPERTS),
    "deepseek-v3": text_model("DeepseekV3", **EXPERTS, **DEEPSEEK),
    "gpt-oss": text_model("GptOss", **EXPERTS),
    "gpt2": model("GPT2", "LMHeadModel", GPT),
    "bert": model("Bert", "ForSequenceClassification", ENCODER),
    "roberta": model("Roberta", "ForSequenceClassification", ENCODER),
    "t5": model("T5", "ForConditionalGeneration", {**T5, "tie_word_embeddings": False}),
    "vit": model("ViT", "ForImageClassification", VISION),
    "deit": model("DeiT", "ForImageClassification", VISION),
    "llava": vision_language("Llava", "Llama"),
    "llava-mistral": vision_language("Llava", "Mistral"),
    "vipllava": vision_language("VipLlava", "Llama"),
    "llava-next": vision_language("LlavaNext", "Llama"),
    "llava-onevision": vision_language("LlavaOnevision", "Qwen2", "SiglipVision"),
    "gemma3-vision": vision_language("Gemma3", "Gemma3Text", "SiglipVision", mm_tokens_per_image=4),
    "paligemma": vision_language("PaliGemma", "Gemma", "SiglipVision", projection_dim=16),
    "dinov2": model("Dinov2", "ForImageClassification", {**VISION, "use_swiglu_ffn": True}),
    "beit": model("Beit", "ForImageClassification", VISION),
    "clip": clip,
    "whisper": model("Whisper", "ForConditionalGeneration", WHISPER),
    "granitemoe": text_model("GraniteMoe", **EXPERTS),
    "phimoe": text_model("Phimoe", **EXPERTS),
    "minimax": text_model("MiniMax", **EXPERTS),
    "hunyuan-moe": text_model("HunYuanMoEV1", **EXPERTS),
    "ernie-moe": text_model("Ernie4_5_Moe", **EXPERTS, moe_num_experts=3, moe_k=2),
    "glm4-moe": text_model("Glm4Moe", **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1),
}

HEADS = ("lm_head", "classifier", "score", "embed_out", "proj_out")


def linear_layers(instance: nn.Module) -> list[str]:
    """Last name components of linear layers, heads left out."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    names = {name.rpartition(".")[2] for name, part in instance.named_modules() if isinstance(part, kinds)}
    return sorted(names - {*HEADS, *(["out_proj"] if instance.config.model_type == "mamba" else [])})


def plain(instance: nn.Module) -> dict[str, Any]:
    return {"target_modules": linear_layers(instance)}


def scaled(instance: nn.Module) -> dict[str, Any]:
    first, *others = linear_layers(instance)
    return {
        "target_modules": [first, *others],
        "use_rslora": True,
        "rank_pattern": {first: 2},
        "alpha_pattern": {others[-1]: 5, f"0.*{first}": 3},
    }


def dora(instance: nn.Module) -> dict[str, Any]:
    return {"target_modules": linear_layers(instance), "use_dora": True}


def all_linear(_: nn.Module) -> dict[str, Any]:
    return {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def embeddings(_: nn.Module) -> dict[str, Any]:
    return {"target_modules": ["embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "q_proj"]}


def saved(instance: nn.Module) -> dict[str, Any]:
    names = {name.rpartition(".")[2] for name, _ in instance.named_modules()}
    whole = [name for name in ("lm_head", "classifier", "embed_tokens") if name in names]
    return {"target_modules": linear_layers(instance)[:2], "modules_to_save": whole}


def biases(instance: nn.Module) -> dict[str, Any]:
    return {"target_modules": linear_layers(instance), "bias": "all"}


def factor_bias(_: nn.Module) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "k_proj", "v_proj", "query", "value"], "lora_bias": True}


def tokens(_: nn.Module) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "c_attn"], "trainable_token_indices": [3, 39, 7]}


def experts(_: nn.Module) -> dict[str, Any]:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    return {"target_modules": ["q_proj", "q_b_proj"], "target_parameters": names, "rank_pattern": {names[1]: 2}}


def one_parameter(_: nn.Module) -> dict[str, Any]:
    return {"target_modules": [], "target_parameters": ["experts.down_proj"]}


def pissa(instance: nn.Module) -> dict[str, Any]:
    return {"target_modules": linear_layers(instance), "init_lora_weights": "pissa"}


def olora(instance: nn.Module) -> dict[str, Any]:
    return {"target_modules": linear_layers(instance), "init_lora_weights": "olora"}


def kasa(_: nn.Module) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "o_proj"], "kasa_config": peft.KasaConfig()}


def blocks(_: nn.Module) -> dict[str, Any]:
    pairs = {"target_modules_bd_a": ["o_proj", "down"], "target_modules_bd_b": ["q_proj", "up"], "nblocks": 2}
    names = ["o_proj", "down_proj", "q_proj", "up_proj"]
    return {"target_modules": names, "use_bdlora": peft.tuners.lora.BdLoraConfig(**pairs)}


MOE = (
    *("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss", "phimoe", "minimax", "hunyuan-moe"),
    *("ernie-moe", "glm4-moe"),
)
NO_DORA = ("deepseek-v3", "glm4-moe", "hunyuan-moe", "ernie-moe")
CASES = [
    *((name, kind) for name in MODELS for kind in (plain, scaled)),
    *((name, dora) for name in MODELS if name not in NO_DORA),
    *((name, all_linear) for name in ("llama", "gpt2", "bloom", "gpt-neox", "mixtral")),
    *((name, embeddings) for name in ("llama", "qwen2", "opt", "mistral")),
    *((name, saved) for name in ("llama", "bert", "roberta", "vit", "llava", "gemma3", "llava-mistral")),
    *((name, biases) for name in ("bert", "opt", "gpt2", "vit", "qwen2", "starcoder2")),
    *((name, factor_bias) for name in ("bert", "opt", "vit", "qwen2", "deit")),
    *((name, tokens) for name in ("llama", "llama-tied", "qwen3", "gpt2")),
    *((name, kind) for name in MOE for kind in (experts, one_parameter)),
    *((name, kind) for name in ("llama", "vit") for kind in (pissa, olora)),
    ("gpt2", pissa),
    *((name, kind) for name in ("llama", "mistral") for kind in (kasa, blocks)),
]


def trained(kind: Callable[[nn.Module], dict[str, Any]], instance: nn.Module) -> Any:
    """A PEFT model around `instance` whose trainable parameters are random."""
    settings = {"r": 4, "lora_alpha": 7, "init_lora_weights": False, **kind(instance)}
    wrapped = peft.get_peft_model(instance, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return wrapped


def load(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def build(name: str, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    instance = MODELS[name]().eval()
    for parameter in instance.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    instance.save_pretrained(folder)
    return instance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_the_merged_checkpoint_is_that_of_peft(
    name: str, kind: Callable[[nn.Module], dict[str, Any]], tmp_path: Path
) -> None:
    wrapped = trained(kind, build(name, tmp_path / "base"))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    wrapped.merge_and_unload().save_pretrained(tmp_path / "expected")
    found, expected = load(tmp_path / "out"), load(tmp_path / "expected")
    assert {name: value.shape for name, value in found.items()} == {k: v.shape for k, v in expected.items()}
    for tensor, value in expected.items():
        # float32 products of rank 4, and decompositions, which differ in the last bits by the order of sums
        assert torch.allclose(found[tensor], value, rtol=1e-4, atol=1e-5), tensor
    changed = [tensor for tensor, value in load(tmp_path / "base").items() if not torch.equal(value, found[tensor])]
    assert changed


def replicated(_: nn.Module) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "down_proj"], "layer_replication": [[0, 2], [1, 2]], "task_type": "CAUSAL_LM"}


def head_only(_: nn.Module) -> dict[str, Any]:
    return {"target_modules": ["lm_head", "q_proj"]}


def embedding_only(_: nn.Module) -> dict[str, Any]:
    return {"target_modules": ["embed_tokens", "q_proj"]}


UNLIKE_PEFT = [
    ("llama", replicated),
    ("mistral", replicated),
    ("llama-tied", head_only),
    ("llama-tied", embedding_only),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), UNLIKE_PEFT, ids=lambda value: getattr(value, "__name__", value))
def test_the_merged_model_computes_what_the_unmerged_one_does(
    name: str, kind: Callable[[nn.Module], dict[str, Any]], tmp_path: Path
) -> None:
    wrapped = trained(kind, build(name, tmp_path / "base"))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    report = loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    assert "LF810" in [finding.code for finding in report.findings]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    words = torch.arange(1, 9).reshape(1, 8)
    with torch.no_grad():
        found, expected = merged(words, use_cache=False).logits, wrapped(words, use_cache=False).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)  # float32 through a few layers


def test_there_are_at_least_as_many_cases_as_parity_cases() -> None:
    assert len(CASES) + len(UNLIKE_PEFT) >= 43
