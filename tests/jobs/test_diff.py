"""Differences of adapters and of checkpoints against dense float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from merger.checkpoints import adapter_folder, config, save_base, weights
from safetensors.torch import load_file, save_file

from loraformat.cli import main
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.jobs.convert import convert
from loraformat.jobs.diff import diff
from loraformat.jobs.measure.diff_adapters import update_difference
from loraformat.model.results.differences import DiffResult
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import BiasFromWeight, Scaled, SubtractedInit, Update, WeightNetwork
from loraformat.schema import check

MINIGPT = Path(__file__).parents[2] / "fixtures" / "minigpt"
GOOD = Path(__file__).parents[2] / "fixtures" / "good"
Q, UP = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)])


def found(before: Path, after: Path, **more: object) -> DiffResult:
    data = diff(str(before), str(after), **more).data
    assert isinstance(data, DiffResult)
    return data


def changed_copy(folder: Path, base: Path, **changes: torch.Tensor) -> Path:
    tensors = load_file(base / "model.safetensors")
    tensors |= changes
    return save_base(folder, tensors, config())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", weights(), config())


def test_a_full_finetuning_changed_every_weight_and_nothing_but_weights() -> None:
    result = found(MINIGPT / "base", MINIGPT / "full_finetuned")
    status = {weight.weight: weight.status for weight in result.weights}
    assert [name for name, each in status.items() if each == "equal"] == ["causal_mask"]
    assert [name for name, each in status.items() if each == "resized"] == ["lm_head.weight", "token_embedding.weight"]
    assert {field.field for field in result.fields} == {"finetuning_method", "vocab_size"}


def test_frozen_layers_are_those_that_were_frozen() -> None:
    result = found(MINIGPT / "base", MINIGPT / "layer_frozen")
    changed = {weight.weight for weight in result.weights if weight.status != "equal"}
    assert not [name for name in changed if name.startswith("blocks.0.")]
    assert len([name for name in changed if name.startswith("blocks.1.")]) == 16
    text = run(MINIGPT / "base", MINIGPT / "layer_frozen").stdout
    assert "untouched  layer 0" in text
    assert "trained    layer 1," in text


def test_a_merged_lora_has_the_rank_of_its_adapter() -> None:
    result = found(MINIGPT / "base", MINIGPT / "lora_merged")
    attention = [weight for weight in result.weights if "_proj.weight" in weight.weight]
    assert len(attention) == 8
    assert all(weight.status == "changed" and weight.rank_99 <= 4 for weight in attention)


def test_figures_of_tensors_agree_with_numpy(base: Path, tmp_path: Path) -> None:
    before = load_file(base / "model.safetensors")[UP]
    after = before.clone()
    after[3:20] += 0.1 * torch.randn(17, 1, generator=torch.Generator().manual_seed(1)) @ torch.ones(1, 24)
    result = found(base, changed_copy(tmp_path / "other", base, **{UP: after}))
    (weight,) = [each for each in result.weights if each.status != "equal"]
    a, b = before.double().numpy(), after.double().numpy()
    assert weight.weight == UP
    assert weight.distance == pytest.approx(np.linalg.norm(b - a), rel=1e-6)
    assert weight.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-6)
    assert weight.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-6)
    assert weight.changed == pytest.approx(17 / 130)
    assert weight.largest == pytest.approx(np.abs(b - a).max(), rel=1e-6)
    assert (weight.rank_90, weight.rank_99) == (1, 1)
    assert weight.effective_rank == pytest.approx(1.0, abs=1e-3)  # float32 rounding leaves small singular values


def test_ranks_of_a_large_matrix_are_never_below_the_truth(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    before = torch.randn(700, 600, generator=g)
    change = torch.randn(700, 40, generator=g) @ torch.randn(40, 600, generator=g) * 0.01
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, value in zip(folders, (before, before + change), strict=True):
        save_base(folder, {"w.weight": value}, {})
    (weight,) = found(*folders).weights
    squares = np.linalg.svd(change.double().numpy(), compute_uv=False) ** 2
    truth = [int(np.searchsorted(squares.cumsum() / squares.sum(), share)) + 1 for share in (0.9, 0.99)]
    assert truth[0] <= weight.rank_90 <= truth[0] + 1
    assert truth[1] <= weight.rank_99 <= truth[1] + 1
    assert weight.effective_rank is None


def test_ranks_of_stacked_experts_are_those_of_each_folded(tmp_path: Path) -> None:
    """Five experts of which three change, by 2, 5 and 11 directions: the median is 5, the most 11."""
    g = torch.Generator().manual_seed(0)
    before = torch.randn(5, 40, 30, generator=g)
    after = before.clone()
    ranks = {0: 5, 2: 11, 4: 2}
    for expert, rank in ranks.items():
        left, right = (torch.linalg.qr(torch.randn(size, rank, generator=g)).Q for size in (40, 30))
        after[expert] += left @ right.T
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folders = [tmp_path / label for label in ("a", "b")]
    for folder, value in zip(folders, (before, after), strict=True):
        save_base(folder, {name: value}, {})
    (weight,) = found(*folders).weights
    # Equal singular values: 90 % of 2, 5 and 11 of them need 2, 5 and 10, 99 % all of them.
    assert (weight.experts, weight.rank_90, weight.rank_99) == (3, 5, 5)
    assert (weight.rank_90_most, weight.rank_99_most) == (10, 11)
    assert weight.effective_rank == pytest.approx(5, rel=1e-2)  # float32 rounding leaves small singular values
    (shown,) = [line for line in run(*folders).stdout.splitlines() if name in line]
    assert shown.split()[-4:] == ["3", "10", "11", f"{weight.largest:.4g}"]
    document = json.loads(run(*folders, "--format", "json").stdout)
    assert not list(check("report", document))
    (stated,) = document["data"]["weights"]
    assert {key: stated[key] for key in ("experts", "rank_90_most", "rank_99_most")} == {
        "experts": 3,
        "rank_90_most": 10,
        "rank_99_most": 11,
    }


def test_a_kernel_is_no_stack_of_experts(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    before = torch.randn(20, 6, 3, generator=g)
    change = (torch.randn(20, 2, generator=g) @ torch.randn(2, 18, generator=g)).reshape(20, 6, 3)
    folders = [tmp_path / label for label in ("a", "b")]
    for folder, value in zip(folders, (before, before + change), strict=True):
        save_base(folder, {"conv1.weight": value}, {})
    (weight,) = found(*folders).weights
    assert (weight.experts, weight.rank_99_most, weight.rank_99) == (None, None, 2)


def test_a_resized_table_is_compared_where_both_have_rows(base: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    before = load_file(base / "model.safetensors")[name]
    longer = torch.cat([before, torch.ones(3, 24)])
    result = found(base, changed_copy(tmp_path / "other", base, **{name: longer}))
    (weight,) = [each for each in result.weights if each.weight == name]
    assert (weight.status, weight.distance, weight.changed) == ("resized", 0, 0)
    assert not result.is_equal


def test_names_that_one_of_them_lacks_are_listed(base: Path, tmp_path: Path) -> None:
    other = changed_copy(tmp_path / "other", base, extra=torch.zeros(2))
    result = found(base, other)
    assert (result.only_before, result.only_after) == ((), ("extra",))
    assert "only in B  1: extra" in run(base, other).stdout


def adapters(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters; the second has other factors for one weight and the same for the other."""
    first = adapter_folder(tmp_path / "first", {Q: (24, 24), UP: (130, 24)})
    second = adapter_folder(tmp_path / "second", {Q: (24, 24), UP: (130, 24)})
    tensors = load_file(second / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.q_proj.lora_B.weight"
    tensors[name] = tensors[name] + 0.3 * torch.randn(24, 3, generator=torch.Generator().manual_seed(8))
    save_file(tensors, second / "adapter_model.safetensors")
    return first, second


def delta(folder: Path, weight: str) -> np.ndarray:
    tensors = load_file(folder / "adapter_model.safetensors")
    module = "base_model.model." + weight.removesuffix(".weight")
    return 2 * tensors[f"{module}.lora_B.weight"].double().numpy() @ tensors[f"{module}.lora_A.weight"].double().numpy()


def test_figures_of_updates_agree_with_numpy(tmp_path: Path) -> None:
    first, second = adapters(tmp_path)
    result = found(first, second)
    by_name = {weight.weight: weight for weight in result.weights}
    assert {name: weight.status for name, weight in by_name.items()} == {Q: "changed", UP: "equal"}
    a, b = delta(first, Q), delta(second, Q)
    assert by_name[Q].distance == pytest.approx(np.linalg.norm(b - a), rel=1e-9)
    assert by_name[Q].cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-9)
    (left_a, _, right_a), (left_b, _, right_b) = np.linalg.svd(a), np.linalg.svd(b)
    outputs = np.linalg.norm(left_a[:, :3].T @ left_b[:, :3]) ** 2 / 3
    inputs = np.linalg.norm(right_a[:3] @ right_b[:3].T) ** 2 / 3
    assert by_name[Q].overlap_dimensions == 3
    assert (by_name[Q].overlap_outputs, by_name[Q].overlap_inputs) == pytest.approx((outputs, inputs), rel=1e-6)
    whole = [np.concatenate([delta(folder, name).ravel() for name in (Q, UP)]) for folder in (first, second)]
    assert result.distance == pytest.approx(np.linalg.norm(whole[1] - whole[0]), rel=1e-9)
    expected = whole[0] @ whole[1] / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1])
    assert result.cosine == pytest.approx(expected, rel=1e-9)


def test_another_format_of_the_same_adapter_is_equal(tmp_path: Path) -> None:
    first, _ = adapters(tmp_path)
    convert(str(first), str(tmp_path / "native"), to="native")
    result = found(first, tmp_path / "native")
    assert {weight.status for weight in result.weights} == {"equal"}
    assert result.is_equal


def lossless(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter, and what `convert` makes of it without a change of any value: a field of the config is left out."""
    path = Path(__file__).parents[2] / "fixtures" / "good" / "peft" / "tiny-llama"
    convert(str(path), str(tmp_path / "converted"), to="peft")
    return path, tmp_path / "converted"


def test_values_and_metadata_are_two_verdicts(tmp_path: Path) -> None:
    before, after = lossless(tmp_path)
    result = found(before, after)
    assert (result.has_equal_values, result.has_equal_metadata, result.is_equal) == (True, False, False)
    assert run(before, after).stdout.splitlines()[-1] == "values equal, metadata different (1 field)"
    data = json.loads(run(before, after, "--format", "json").stdout)["data"]
    assert (data["has_equal_values"], data["has_equal_metadata"]) == (True, False)
    first, second = adapters(tmp_path)
    assert run(first, first).stdout.splitlines()[-1] == "values equal, metadata equal"
    assert run(first, second).stdout.splitlines()[-1] == "values different, metadata equal"


def test_a_weight_that_only_one_has_is_a_difference_of_values(tmp_path: Path) -> None:
    first = adapter_folder(tmp_path / "one", {Q: (24, 24)})
    second = adapter_folder(tmp_path / "two", {Q: (24, 24), Q.replace("layers.0", "layers.1"): (24, 24)})
    result = found(first, second)
    assert (result.has_equal_values, result.has_equal_metadata) == (False, True)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ([], [0, 0, 0]),
        (["--exit-on", "never"], [0, 0, 0]),
        (["--exit-on", "values"], [0, 0, 1]),
        (["--exit-on", "metadata"], [0, 1, 0]),
        (["--exit-on", "any"], [0, 1, 1]),
        (["--exit-code"], [0, 1, 1]),
    ],
)
def test_either_verdict_decides_the_exit_code(tmp_path: Path, option: list[str], expected: list[int]) -> None:
    before, after = lossless(tmp_path)
    first, second = adapters(tmp_path)
    pairs = [(first, first), (before, after), (first, second)]
    assert [run(*pair, *option).exit_code for pair in pairs] == expected


def test_ranks_of_a_difference_hold_the_shares_that_they_are_named_by(tmp_path: Path) -> None:
    """Of singular values 10, 5, 2, 1 the first hold 76.9, 96.2, 99.2 and 100 % of the squares."""
    for name, scale in (("a", 0.0), ("b", 1.0)):
        change = torch.diag(torch.tensor([10.0, 5.0, 2.0, 1.0])) * scale
        save_base(tmp_path / name, {"w.weight": torch.eye(4) + change}, {})
    (weight,) = found(tmp_path / "a", tmp_path / "b").weights
    assert (weight.rank_90, weight.rank_99) == (2, 3)


def test_other_factors_of_the_same_product_are_equal_within_rounding(tmp_path: Path) -> None:
    first, _ = adapters(tmp_path)
    second = adapter_folder(tmp_path / "turned", {Q: (24, 24), UP: (130, 24)})
    tensors = load_file(second / "adapter_model.safetensors")
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3))).Q
    turned = {name: value @ turn if "lora_B" in name else turn.T @ value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in turned.items()}, second / "adapter_model.safetensors")
    assert not found(first, second).is_equal
    assert found(first, second, tolerance=1e-5).is_equal


def test_dora_differs_where_only_its_magnitude_does(tmp_path: Path) -> None:
    first, second = GOOD / "peft" / "dora", tmp_path / "dora"
    second.mkdir()
    for path in first.glob("adapter*"):
        (second / path.name).write_bytes(path.read_bytes())
    tensors = load_file(second / "adapter_model.safetensors")
    name = next(key for key in tensors if "magnitude" in key)
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, second / "adapter_model.safetensors")
    result = found(first, second)
    assert sorted(weight.status for weight in result.weights) == ["changed", "equal", "equal", "equal"]


VECTOR, SQUARE = LazyTensor.of(torch.ones(4)), LazyTensor.of(torch.eye(4))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SubtractedInit("pissa", 2, 1.0, (4, 4)), SubtractedInit("pissa", 3, 1.0, (4, 4))),
        (SubtractedInit("kasa", 2, None, (4, 4)), SubtractedInit("pissa", 2, None, (4, 4))),
        (WeightNetwork(SQUARE, SQUARE, 1.0, "tanh"), WeightNetwork(SQUARE, SQUARE, 1.0, "relu")),
        (WeightNetwork(SQUARE, SQUARE, 1.0), WeightNetwork(SQUARE, SQUARE, 2.0)),
        (BiasFromWeight("a.weight", VECTOR, 4), BiasFromWeight("b.weight", VECTOR, 4)),
        (Scaled(VECTOR), Scaled(VECTOR, is_sum=True)),
    ],
)
def test_equal_tensors_that_are_used_otherwise_are_not_equal(one: Update, other: Update) -> None:
    (apart,) = update_difference("w", (one,), (other,))
    assert (apart.status, apart.reason) == ("incomparable", "they are of different kinds, settings or rows")
    (same,) = update_difference("w", (one,), (one,))
    assert same.status == "equal"


def test_an_unknown_scale_is_said_to_be_the_reason() -> None:
    text = run(MINIGPT / "fact_all", MINIGPT / "lora_adapter").stdout
    assert "incomparable: a scale is unknown; pass it with --alpha" in text
    assert "values incomparable, metadata" in run(MINIGPT / "fact_all", MINIGPT / "fact_all").stdout
    assert "together" not in text
    assert "8 changed" in run(MINIGPT / "fact_all", MINIGPT / "lora_adapter", "--alpha", 1).stdout


def test_an_adapter_is_not_compared_with_a_checkpoint() -> None:
    with pytest.raises(ConfigError, match=r"is an adapter, .* is a checkpoint"):
        diff(str(MINIGPT / "fact_all"), str(MINIGPT / "base"))


def test_what_is_neither_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    result = run(tmp_path, MINIGPT / "base")
    assert result.exit_code == 3
    assert "LF010" in result.stderr


@pytest.mark.parametrize("group", ["auto", "module", "layer", "none"])
def test_every_grouping_and_the_json_hold_together(tmp_path: Path, group: str) -> None:
    first, second = adapters(tmp_path)
    assert "layers.0" in run(first, second, "--group", "none").stdout
    assert run(first, second, "--group", group).exit_code == 0
    document = json.loads(run(first, second, "--group", group, "--format", "json").stdout)
    assert list(check("report", document)) == []


def test_the_exit_code_says_whether_anything_differs(tmp_path: Path) -> None:
    first, second = adapters(tmp_path)
    assert run(first, first, "--exit-code").exit_code == 0
    assert run(first, second, "--exit-code").exit_code == 1
    assert run(first, second, "--exit-code", "--tol", 10).exit_code == 0
    assert run(first, second).exit_code == 0
    assert run(MINIGPT / "base", MINIGPT / "base", "--exit-code").exit_code == 0


@pytest.mark.filterwarnings("error")
def test_an_adapter_of_complex_numbers_is_refused_by_name(tmp_path: Path) -> None:
    """Their real parts may be equal where they differ."""
    folders = []
    for name, part in (("one", 1), ("two", 2)):
        folder = adapter_folder(tmp_path / name, {Q: (8, 6)})
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(
            {key: torch.complex(value, value * part) for key, value in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        folders.append(folder)
    with pytest.raises(UnsupportedUpdate, match="complex") as refused:
        found(*folders)
    assert refused.value.code == "LF013"
    plain = adapter_folder(tmp_path / "plain", {Q: (8, 6)})
    for before, after in ((plain, folders[0]), (folders[0], plain)):
        refusal = run(before, after)
        assert refusal.exit_code != 0
        assert "LF013" in refusal.output
