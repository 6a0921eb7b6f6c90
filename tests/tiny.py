"""Tiny random models of transformers with adapters of PEFT, saved side by side, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TOKENS = {"input_ids": torch.tensor([[3, 5, 7, 9]])}


def build(name: str, config: str, settings: dict[str, Any]) -> Any:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def llama(**settings: Any) -> Any:
    return build("LlamaForCausalLM", "LlamaConfig", {**LLAMA, **settings})


def adapted(model: Any, folder: Path, **lora: Any) -> Any:
    """The model saved in `folder`/base, an adapter with random values in `folder`/adapter, and both together."""
    import peft

    if not (folder / "base").exists():
        model.save_pretrained(folder / "base")
    both = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **lora}))
    randomize(both)
    both.save_pretrained(folder / "adapter")
    return both.eval()


def randomize(model: Any) -> None:
    """Random values in all that is trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad or "modules_to_save.default" in name:
                value.copy_(torch.randn_like(value) * 0.3)


def outputs(model: Any, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad():
        found = model(**(inputs or TOKENS))
    return found["logits"] if "logits" in found else found[0]


def check_merged(out: Path, name: str, both: Any, inputs: dict[str, torch.Tensor] | None = None) -> None:
    """That the folder loads as the class `name` without a tensor too many or too few, and computes the same."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(outputs(model.eval(), inputs), outputs(both, inputs), atol=1e-4, rtol=0)
