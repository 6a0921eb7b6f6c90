"""Adapters with a task head, merged into the checkpoint that they were trained from.

The base is what transformers saves of a model without that head, the adapter what PEFT saves of the class with it. The
merged folder is loaded by the class with the head, and its outputs are compared with those of the un-merged model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_architectures_against_peft import GPT, LM

import loraformat
from loraformat.errors import AdapterRefused, ConfigError
from loraformat.jobs.verify import verify
from loraformat.model.assumptions import Assumptions

INPUTS = {"input_ids": torch.tensor([[3, 5, 7, 9]])}
BERT = {**LM, "num_key_value_heads": 2, "type_vocab_size": 2}
DISTILBERT = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "eos_token_id": 9}
MODERN = {**LM, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "reference_compile": False}

# (config class, settings, class of the base, class of the task, task, targets)
HEADS: dict[str, tuple[str, dict[str, Any], str, str, str | None, Any]] = {
    "llama": ("LlamaConfig", LM, "LlamaForCausalLM", "LlamaForSequenceClassification", "SEQ_CLS", ["q_proj", "v_proj"]),
    "llama-bare": ("LlamaConfig", LM, "LlamaModel", "LlamaForSequenceClassification", "SEQ_CLS", ["q_proj"]),
    "llama-tied": (
        "LlamaConfig",
        {**LM, "tie_word_embeddings": True},
        "LlamaForCausalLM",
        "LlamaForTokenClassification",
        "TOKEN_CLS",
        ["up_proj"],
    ),
    "qwen2": ("Qwen2Config", LM, "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "SEQ_CLS", ["q_proj"]),
    "gpt2": (
        "GPT2Config",
        {**GPT, "pad_token_id": 0},
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        "SEQ_CLS",
        ["c_attn"],
    ),
    "bert-bare": ("BertConfig", BERT, "BertModel", "BertForSequenceClassification", "SEQ_CLS", ["query"]),
    "bert-tokens": ("BertConfig", BERT, "BertForMaskedLM", "BertForTokenClassification", "TOKEN_CLS", ["query"]),
    "bert-answers": ("BertConfig", BERT, "BertForMaskedLM", "BertForQuestionAnswering", "QUESTION_ANS", ["value"]),
    "roberta": ("RobertaConfig", BERT, "RobertaForMaskedLM", "RobertaForSequenceClassification", "SEQ_CLS", ["query"]),
    "distilbert": (
        "DistilBertConfig",
        DISTILBERT,
        "DistilBertForMaskedLM",
        "DistilBertForQuestionAnswering",
        "QUESTION_ANS",
        ["q_lin"],
    ),
    "modernbert": (
        "ModernBertConfig",
        MODERN,
        "ModernBertForMaskedLM",
        "ModernBertForSequenceClassification",
        "SEQ_CLS",
        ["Wqkv"],
    ),
    "by-its-names": ("LlamaConfig", LM, "LlamaForCausalLM", "LlamaForSequenceClassification", None, ["q_proj"]),
}


def trained(folder: Path, case: tuple[Any, ...], labels: int = 3, saved: list[str] | None = None) -> Any:
    """A base and an adapter in `folder`, and the un-merged model."""
    config_class, settings, base_class, head_class, task, targets = case
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    getattr(transformers, base_class)(config).save_pretrained(folder / "base")
    answers = task == "QUESTION_ANS"
    counted = {} if answers else {"num_labels": labels}
    model = getattr(transformers, head_class).from_pretrained(folder / "base", **counted)
    modules = saved or (["score"] if task is None else None)
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type=task, modules_to_save=modules)
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if value.requires_grad or "modules_to_save" in name:
                value.copy_(torch.randn_like(value) * 0.3)
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval()


def outputs(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(**INPUTS)
    return [found[name] for name in ("logits", "start_logits", "end_logits") if name in found]


def loaded(out: Path, head_class: str) -> Any:
    model, info = getattr(transformers, head_class).from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("name", HEADS)
def test_a_merge_with_a_head_computes_what_the_un_merged_model_does(name: str, tmp_path: Path) -> None:
    case = HEADS[name]
    adapted = trained(tmp_path, case)
    report = loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"), verify="full")
    assert "LF816" in {finding.code for finding in report.findings}
    model = loaded(tmp_path / "out", case[3])
    for mine, theirs in zip(outputs(model), outputs(adapted), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_tensors_and_config_are_what_peft_saves(name: str, tmp_path: Path) -> None:
    case = HEADS[name]
    adapted = trained(tmp_path, case)
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    mine, theirs = (load_file(tmp_path / kind / "model.safetensors") for kind in ("out", "peft"))
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}
    ours, wanted = (json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("out", "peft"))
    for key in ("architectures", "id2label", "label2id"):
        assert ours.get(key) == wanted.get(key), key


def test_a_renamed_base_is_still_compared_with_the_output(tmp_path: Path) -> None:
    trained(tmp_path, HEADS["bert-bare"])
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    assert verify(str(tmp_path / "out"), base=str(tmp_path / "base")).findings == ()


def test_a_head_of_one_label_is_a_reward_model(tmp_path: Path) -> None:
    adapted = trained(tmp_path, HEADS["llama"], labels=1)
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "LABEL_0"}
    torch.testing.assert_close(outputs(loaded(tmp_path / "out", HEADS["llama"][3]))[0], outputs(adapted)[0])


def test_a_head_in_shards_leaves_the_other_shards_as_they_are(tmp_path: Path) -> None:
    adapted = trained(tmp_path, HEADS["llama"])
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for key, value in tensors.items():
        parts["model-00002-of-00002.safetensors" if key == "lm_head.weight" else "model-00001-of-00002.safetensors"][
            key
        ] = value
    for file, part in parts.items():
        save_file(part, tmp_path / "base" / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {key: file for file, part in parts.items() for key in part}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"), verify="full")
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]["score.weight"]
    torch.testing.assert_close(outputs(loaded(tmp_path / "out", HEADS["llama"][3]))[0], outputs(adapted)[0])


def refused(tmp_path: Path, **more: Any) -> str:
    with pytest.raises(AdapterRefused) as caught:
        loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"), **more)
    assert not (tmp_path / "out").exists()
    return str(caught.value) + caught.value.hint


BERT_POOLED = ("BertConfig", BERT, "BertForMaskedLM", "BertForSequenceClassification", "SEQ_CLS", ["query"])


def test_a_random_layer_that_nobody_saved_is_named(tmp_path: Path) -> None:
    """The checkpoint of a masked language model has no pooler, and PEFT leaves the random one out of the file."""
    trained(tmp_path, BERT_POOLED)
    assert "BertForSequenceClassification also needs bert.pooler.dense.bias" in refused(tmp_path)


def test_a_layer_that_was_saved_is_written(tmp_path: Path) -> None:
    adapted = trained(tmp_path, BERT_POOLED, saved=["classifier", "pooler"])
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    torch.testing.assert_close(outputs(loaded(tmp_path / "out", BERT_POOLED[3]))[0], outputs(adapted)[0])


def without_statements(folder: Path) -> None:
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "task_type": None, "auto_mapping": None}))


def test_a_task_that_nobody_states_is_asked_for(tmp_path: Path) -> None:
    """`classifier` is the head of two classes of BERT."""
    adapted = trained(tmp_path, HEADS["bert-tokens"])
    without_statements(tmp_path)
    assert "--assume task=, SEQ_CLS (BertForSequenceClassification) or TOKEN_CLS" in refused(tmp_path)
    said = Assumptions(task="TOKEN_CLS")
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"), assumptions=said)
    torch.testing.assert_close(outputs(loaded(tmp_path / "out", HEADS["bert-tokens"][3]))[0], outputs(adapted)[0])


def test_what_the_caller_says_does_not_overrule_the_adapter(tmp_path: Path) -> None:
    trained(tmp_path, HEADS["llama"])
    said = Assumptions(task="TOKEN_CLS")
    with pytest.raises(ConfigError, match="SEQ_CLS"):
        loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"), assumptions=said)


def test_a_head_for_a_model_that_is_not_known_is_called_one(tmp_path: Path) -> None:
    trained(tmp_path, HEADS["llama"])
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "somebodys"}))
    assert "a task head" in refused(tmp_path)
