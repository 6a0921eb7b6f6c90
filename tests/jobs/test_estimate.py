"""Estimates against figures that were published or counted by hand, and against adapters that PEFT makes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from loraformat.cli import main
from loraformat.errors import LoraFormatError, UsageError
from loraformat.jobs.estimate import estimate
from loraformat.model.results.estimates import EstimateResult
from loraformat.schema import check

ROOT = Path(__file__).parents[2]
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


def config_file(folder: Path, config: dict[str, object]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


def estimated(base: str, rank: int, targets: str) -> EstimateResult:
    data = estimate(base, rank=rank, targets=targets.split(",")).data
    assert isinstance(data, EstimateResult)
    return data


def test_llama_7b_at_rank_8_on_q_and_v(tmp_path: Path) -> None:
    """PEFT prints: trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622."""
    found = estimated(config_file(tmp_path, LLAMA_7B), 8, "q_proj,v_proj")
    assert found.parameters == 4_194_304
    assert found.base_parameters + found.parameters == 6_742_609_920
    assert f"{found.share:.4%}" == "0.0622%"
    assert found.parameters_by_layer == dict.fromkeys(range(32), 131_072)


def test_llama_7b_at_rank_16_on_all_of_attention(tmp_path: Path) -> None:
    assert estimated(config_file(tmp_path, LLAMA_7B), 16, "q_proj,k_proj,v_proj,o_proj").parameters == 16_777_216


def test_minigpt_at_rank_4(tmp_path: Path) -> None:
    found = estimated(str(ROOT / "fixtures" / "minigpt" / "base"), 4, "q_proj,k_proj,v_proj,out_proj")
    assert (found.source, found.parameters) == ("headers", 4_096)


def test_one_projection_of_8192(tmp_path: Path) -> None:
    """A header alone: the file is as long as it says, and holds nothing."""
    header = json.dumps({"q_proj.weight": {"dtype": "BF16", "shape": [8192, 8192], "data_offsets": [0, 2 * 8192**2]}})
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + 2 * 8192**2)
    found = estimated(str(path), 16, "q_proj")
    assert (found.source, found.parameters) == ("headers", 262_144)


@pytest.mark.parametrize(("pairs", "expected"), [(32, 9_437_184), (8, 7_667_712)])
def test_qwen3_8b_with_and_without_grouped_queries(tmp_path: Path, pairs: int, expected: int) -> None:
    path = config_file(tmp_path, {**QWEN3_8B, "num_key_value_heads": pairs})
    assert estimated(path, 8, "q_proj,k_proj,v_proj,o_proj").parameters == expected


def test_memory_is_what_the_methods_hold(tmp_path: Path) -> None:
    found = estimated(config_file(tmp_path, LLAMA_7B), 8, "q_proj,v_proj")
    full, lora, qlora = found.memory
    base, own = 6_738_415_616, 4_194_304
    assert full.total == 16 * base
    assert lora.total == 2 * base + 16 * own
    tables_and_norms = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096
    bits = (base - tables_and_norms) * (4 + 8 / 64 + 32 / (64 * 256))
    assert qlora.total == pytest.approx(bits / 8 + 2 * tables_and_norms + 16 * own, abs=1)


def test_experts_count_each(tmp_path: Path) -> None:
    mixtral = {**LLAMA_7B, "model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8}
    found = estimated(config_file(tmp_path, {**mixtral, "num_local_experts": 8}), 8, "w1,w2,w3")
    assert found.parameters == 32 * 8 * 3 * 8 * (4096 + 14336)
    assert {(each.module, each.weights) for each in found.modules} == {("w1", 256), ("w2", 256), ("w3", 256)}


def test_stacked_experts_and_kernels_of_headers(tmp_path: Path) -> None:
    tensors = {"mlp.experts.gate_up_proj": torch.zeros(4, 20, 6), "conv.weight": torch.zeros(5, 3, 7)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert estimated(str(tmp_path), 2, "experts.gate_up_proj").parameters == 4 * 2 * (20 + 6)
    assert estimated(str(tmp_path), 2, "conv").parameters == 2 * (5 + 3 * 7)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_peft_makes_as_many_parameters(tmp_path: Path, targets: list[str] | str) -> None:
    import peft
    import transformers

    fields = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**fields, intermediate_size=80, vocab_size=101)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=6, target_modules=targets))
    trainable, whole = wrapped.get_nb_trainable_parameters()
    names = targets if isinstance(targets, str) else ",".join(targets)
    found = estimated(config_file(tmp_path, config.to_dict()), 6, names)
    assert (found.parameters, found.base_parameters + found.parameters) == (trainable, whole)


def test_a_target_that_matches_nothing_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'"q_porj" matches no weight.*q_proj'):
        estimated(config_file(tmp_path, LLAMA_7B), 8, "q_porj")


def test_a_folder_without_weights_and_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoraFormatError):
        estimated(str(tmp_path), 8, "q_proj")


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_command_says_it_all(tmp_path: Path, form: str) -> None:
    path = config_file(tmp_path, LLAMA_7B)
    arguments = ["estimate", path, "--rank", "8", "--targets", "q_proj, v_proj", "--format", form]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    if form == "json":
        assert list(check("report", json.loads(result.stdout))) == []
        assert json.loads(result.stdout)["data"]["parameters"] == 4_194_304
    else:
        assert "4,194,304 (0.0622% of base and adapter)" in result.stdout


def test_no_targets_are_a_usage_error(tmp_path: Path) -> None:
    path = config_file(tmp_path, LLAMA_7B)
    assert CliRunner().invoke(main, ["estimate", path, "--rank", "8", "--targets", ","]).exit_code == 2
