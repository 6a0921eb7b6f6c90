"""Weights that were trained with a PEFT adapter and lie in files of their own beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

import loraformat
from loraformat.errors import AdapterRefused, ContainerError
from loraformat.io import open_adapter
from loraformat.model.updates import Replace

NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture
def both(tmp_path: Path) -> Any:
    """A base and an adapter, and the model of both, whose norm was trained too."""
    found = tiny.adapted(tiny.llama(), tmp_path, target_modules=["q_proj"])
    with torch.no_grad():
        found.base_model.model.model.norm.weight.copy_(torch.linspace(-1, 1, 16))
    return found


def merged(folder: Path) -> Any:
    return loraformat.merge(str(folder / "base"), [str(folder / "adapter")], str(folder / "out"), verify="full")


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.base_model.model.", ""])
@pytest.mark.parametrize(
    "name", ["non_lora_trainables.bin", "non_lora_state_dict.bin", "new_embeddings.safetensors", "norms.safetensors"]
)
def test_weights_in_a_second_file_are_merged(name: str, prefix: str, both: Any, tmp_path: Path) -> None:
    tensors = {prefix + NORM: both.base_model.model.model.norm.weight.detach().clone()}
    path = tmp_path / "adapter" / name
    save_file(tensors, path) if name.endswith(".safetensors") else torch.save(tensors, path)
    report = merged(tmp_path)
    assert {finding.code for finding in report.findings} >= {"LF245"}
    tiny.check_merged(tmp_path / "out", "LlamaForCausalLM", both)


def test_a_bias_below_an_adapted_layer_is_one_too(tmp_path: Path) -> None:
    """As code that saves all that has a gradient calls it: below `base_layer`."""
    model = tiny.llama(attention_bias=True)
    both = tiny.adapted(model, tmp_path, target_modules=["q_proj"])
    layer = both.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    with torch.no_grad():
        layer.bias.copy_(torch.linspace(-1, 1, 16))
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    torch.save({name: layer.bias.detach().clone()}, tmp_path / "adapter" / "non_lora_trainables.bin")
    merged(tmp_path)
    tiny.check_merged(tmp_path / "out", "LlamaForCausalLM", both)


def test_converting_puts_them_where_peft_loads_them(both: Any, tmp_path: Path) -> None:
    save_file({NORM: torch.linspace(-1, 1, 16)}, tmp_path / "adapter" / "norms.safetensors")
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "converted"), to="peft")
    updates = open_adapter(str(tmp_path / "converted")).adapter.updates
    (norm,) = updates[NORM]
    assert isinstance(norm, Replace)
    assert torch.equal(norm.value.torch(), torch.linspace(-1, 1, 16))


def test_weights_that_the_base_lacks_are_refused(both: Any, tmp_path: Path) -> None:
    torch.save({"model.extra.weight": torch.ones(1, 16)}, tmp_path / "adapter" / "extra.bin")
    with pytest.raises(AdapterRefused, match=r"model.extra.weight: the base has no such weight"):
        merged(tmp_path)


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
def test_a_value_head_stays_beside_and_is_named(name: str, both: Any, tmp_path: Path) -> None:
    """LLaMA-Factory puts it there; it is a head of training, and no model has it."""
    tensors = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
    path = tmp_path / "adapter" / name
    save_file(tensors, path) if name.endswith(".safetensors") else torch.save(tensors, path)
    report = merged(tmp_path)
    (note,) = [finding for finding in report.findings if finding.code == "LF246"]
    assert "value head" in note.message
    assert not any("v_head" in weight for weight in open_adapter(str(tmp_path / "adapter")).adapter.updates)


def test_a_file_of_trained_weights_that_cannot_be_read_is_refused(both: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter" / "non_lora_trainables.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ContainerError):
        merged(tmp_path)


def test_the_adapters_own_file_counts_where_both_have_a_weight(tmp_path: Path) -> None:
    """PEFT loads it last."""
    both = tiny.adapted(tiny.llama(), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    torch.save({HEAD: torch.ones(40, 16)}, tmp_path / "adapter" / "non_lora_trainables.bin")
    assert "LF246" in {finding.code for finding in merged(tmp_path).findings}
    tiny.check_merged(tmp_path / "out", "LlamaForCausalLM", both)


def test_a_whole_model_beside_the_adapter_is_not_taken_for_trained_weights(both: Any, tmp_path: Path) -> None:
    for file in (tmp_path / "base").iterdir():
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    opened = open_adapter(str(tmp_path / "adapter"))
    assert all(weight.endswith("q_proj.weight") for weight in opened.adapter.updates)
    assert [note.where for note in opened.adapter.notes if note.code == "LF246"] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.pt", "rng_state_0.pth", "training_args.bin"])
def test_the_state_of_a_trainer_is_no_part_of_the_adapter(name: str, both: Any, tmp_path: Path) -> None:
    torch.save({NORM: torch.ones(16)}, tmp_path / "adapter" / name)
    opened = open_adapter(str(tmp_path / "adapter"))
    assert NORM not in opened.adapter.updates
    assert not {note.code for note in opened.adapter.notes} & {"LF245", "LF246"}


def test_two_files_with_one_weight_are_told(both: Any, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({NORM: torch.ones(16)}, tmp_path / "adapter" / name)
    notes = open_adapter(str(tmp_path / "adapter")).adapter.notes
    (told,) = [note.message for note in notes if note.code == "LF246"]
    assert told == "not read: a.safetensors also has model.norm.weight"


def test_rows_alone_are_refused_with_what_to_save_instead(both: Any, tmp_path: Path) -> None:
    """They would otherwise be taken for a weight called "input_embeddings", and converted as one."""
    rows = {"input_embeddings": torch.ones(2, 16), "output_embeddings": torch.ones(2, 16)}
    save_file(rows, tmp_path / "adapter" / "new_embeddings.safetensors")
    opened = open_adapter(str(tmp_path / "adapter"))
    assert opened.adapter.unclaimed.keys() == rows.keys()
    assert not rows.keys() & opened.adapter.updates.keys()
    (note,) = [note for note in opened.adapter.notes if note.code == "LF246"]
    assert "save the whole embed_tokens.weight and lm_head.weight" in note.message
    with pytest.raises(AdapterRefused, match="LF210"):
        merged(tmp_path)
    with pytest.raises(AdapterRefused, match="input_embeddings"):
        loraformat.convert(tmp_path / "adapter", tmp_path / "converted", to="peft")
