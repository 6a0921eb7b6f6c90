"""Tiny models of transformers as GGUF files, written by the gguf package by what llama.cpp's converter does with them.

Nothing of loraformat is used here: names are those of the package's table, rows are put in order by torch.

Source: llama.cpp of llama_cpp_python 0.3.36, conversion/{base,llama,gemma,phi,qwen}.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

VOCABULARY, LAYERS, HIDDEN, INNER = 320, 2, 256, 256
HEADS, KV_HEADS, HEAD_SIZE = 8, 4, 32
_CONTEXT = 128

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": _CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """A class of transformers, and what is needed to write it as GGUF.

    Attributes:
        architecture: llama.cpp's word.
        sizes: fields of the config that differ.
        targets: modules that the adapter changes.
        permuted: whether q and k are put in another order.
        settings: of the header, beside those of every model, without the architecture before them.
    """

    name: str
    architecture: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    permuted: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", permuted=True),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3"),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3",
        {
            "sliding_window": 64,
            "layer_types": ["sliding_attention"] * LAYERS,
            "query_pre_attn_scalar": HEAD_SIZE,
            "tie_word_embeddings": True,
        },
        settings={"attention.sliding_window": 64},
    ),
    "phi3": Family("Phi3ForCausalLM", "phi3", {"head_dim": None}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "mixtral": Family(
        "MixtralForCausalLM",
        "llama",
        _EXPERTS,
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        permuted=True,
        settings={"expert_count": 4, "expert_used_count": 2},
    ),
    "qwen3moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        {**_EXPERTS, "moe_intermediate_size": 256, "decoder_sparse_step": 1, "norm_topk_prob": True},
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        settings={"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 256},
    ),
}


def model_of(family: Family, seed: int = 0) -> Any:
    """A random model in float32."""
    import transformers

    kind: Any = getattr(transformers, family.name)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {key: value for key, value in {**_SIZES, **family.sizes}.items() if value is not None}
        return kind(kind.config_class(**sizes)).eval()


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """Save a model as transformers does, and what it stored."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if (folder / "config.json").is_file():  # a list of classes is not written for a model that was made from a config
        config = json.loads((folder / "config.json").read_text())
        config.setdefault("architectures", [type(model).__name__])
        (folder / "config.json").write_text(json.dumps(config))
    return tensors


def in_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def as_gguf(family: Family, tensors: Mapping[str, Tensor], *, turn: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Tensors under llama.cpp's names.

    Args: turn: whether rows of q and k are put in its order, where it has another.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, LAYERS)
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        value = tensor.float()
        if family.permuted and turn and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = in_halves(value, HEADS if "q_proj" in name else KV_HEADS)
        if family.architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + 1
        before, found, after = name.partition(".experts.")
        if found:
            number, leaf = after.split(".", 1)
            whole = f"{before.replace('block_sparse_moe', 'mlp')}.experts.{_MIXTRAL.get(leaf, leaf)}"
            experts.setdefault(whole, {})[int(number)] = value
            continue
        mapped = names.get_name(name, try_suffixes=(".weight",))
        assert mapped is not None, name
        yield mapped, value
    for name, parts in experts.items():
        mapped = names.get_name(name, try_suffixes=(".weight",))
        assert mapped is not None, name
        yield mapped, torch.stack([parts[number] for number in sorted(parts)])


_MIXTRAL = {"w1.weight": "gate_proj.weight", "w2.weight": "down_proj.weight", "w3.weight": "up_proj.weight"}


def write_base(
    path: Path,
    family: Family,
    tensors: Mapping[str, Tensor],
    kind: str | Callable[[str], str] = "F32",
    *,
    config: Any = None,
) -> Path:
    """A GGUF file with these weights, vectors in F32 and all else in a type, and a tokenizer of as many pieces.

    Args: kind: of matrices: the name of an element type, or the name of each tensor's.
    """
    import gguf

    writer = gguf.GGUFWriter(path, family.architecture)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    inner = tensors.get("model.layers.0.mlp.gate_proj.weight")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER if inner is None else inner.shape[0])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(getattr(config, "rms_norm_eps", 1e-6)))
    writer.add_vocab_size(VOCABULARY)
    for key, value in family.settings.items():
        writer.add_uint32(f"{family.architecture}.{key}", value)
    _add_tokenizer(writer)
    writer.add_file_type(1)
    for name, tensor in as_gguf(family, tensors):
        wanted = kind if isinstance(kind, str) else kind(name)
        _add(writer, name, tensor, "F32" if tensor.dim() < 2 or "ffn_gate_inp" in name else wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"\u2581w{number}" for number in range(VOCABULARY - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *([1] * (VOCABULARY - 3))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(value=False)


def _add(writer: Any, name: str, tensor: Tensor, kind: str) -> None:
    import gguf

    wanted = gguf.GGMLQuantizationType[kind]
    values = np.ascontiguousarray(tensor.numpy())
    if kind in ("F32", "F16"):
        writer.add_tensor(name, values.astype(np.float32 if kind == "F32" else np.float16))
        return
    try:
        blocks = gguf.quants.quantize(values, wanted)
    except NotImplementedError:
        blocks = random_blocks(kind, values.shape, sum(name.encode()))
    writer.add_tensor(name, blocks, raw_dtype=wanted)


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """Blocks with any codes and small scales, for types that the package does not encode."""
    import gguf

    elements, nbytes = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    count = int(np.prod(shape)) // elements
    chance = np.random.default_rng(seed)
    blocks = chance.integers(0, 256, (count, nbytes), dtype=np.uint8)
    for at in _SCALES_AT[kind]:
        halves = chance.uniform(1e-4, 1e-3, (count, 1)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(*shape[:-1], shape[-1] // elements * nbytes)


# Where the float16 scales of a block stand.
_SCALES_AT = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ1_S": (0,),
}


def adapter_of(model: Any, family: Family, folder: Path, seed: int = 1, **fields: Any) -> Any:
    """A PEFT model with random factors, saved to a folder."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=fields.pop("r", 4),
            lora_alpha=fields.pop("lora_alpha", 12),
            target_modules=list(fields.pop("target_modules", family.targets)),
            **fields,
        )
        wrapped = get_peft_model(model, config).eval()
        torch.manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.15
        wrapped.save_pretrained(folder)
    return wrapped


def values_of(path: Path) -> dict[str, Any]:
    """All tensors of a GGUF file as float32 arrays, by the gguf package."""
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
    return found
