"""Inspections with values: figures, findings about values, several adapters, and what is left out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from merger.checkpoints import adapter_folder, config, save_base, weights
from safetensors.torch import load_file, save_file

from loraformat.cli import main
from loraformat.errors import UsageError
from loraformat.jobs.inspect import View, inspect
from loraformat.jobs.validate import validate
from loraformat.schema import check

SHAPES = {
    f"model.layers.{layer}.{name}.weight": shape
    for layer in range(2)
    for name, shape in {"q_proj": (24, 24), "up_proj": (130, 24)}.items()
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return adapter_folder(tmp_path / "adapter", SHAPES), save_base(tmp_path / "base", weights(), config())


def dense(folder: Path, weight: str) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    module = "base_model.model." + weight.removesuffix(".weight")
    return 2 * tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


def test_every_figure_of_the_json_agrees_with_the_dense_product(folders: tuple[Path, Path]) -> None:
    adapter, base = folders
    found = json.loads(run(adapter, "--base", base, "--spectrum", "--format", "json").stdout)
    assert list(check("report", found)) == []
    stored = weights()
    for record in found["data"]["weights"]:
        change = dense(adapter, record["weight"])
        values = torch.linalg.svdvals(change)[:3]
        shares = values / values.sum()
        assert record["norm"] == pytest.approx(float(change.norm()), rel=1e-9)
        assert record["spectral_norm"] == pytest.approx(float(values[0]), rel=1e-9)
        assert record["singular_values"] == pytest.approx(values.tolist(), rel=1e-6)
        assert record["effective_rank"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-6)
        relative = float(change.norm() / stored[record["weight"]].double().norm())
        assert record["relative_norm"] == pytest.approx(relative, rel=1e-5)
        assert record["base_norm"] == pytest.approx(record["norm"] / relative, rel=1e-5)
    total = math.hypot(*(float(dense(adapter, weight).norm()) for weight in SHAPES))
    whole = math.hypot(*(float(stored[weight].double().norm()) for weight in SHAPES))
    assert found["data"]["total_relative_norm"] == pytest.approx(total / whole, rel=1e-5)


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    """A PEFT adapter of the given tensors, of scale 1."""
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    stated = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x",
    }
    (folder / "adapter_config.json").write_text(json.dumps(stated | settings))
    return folder


def test_rank_90_is_the_rank_that_holds_90_percent(tmp_path: Path) -> None:
    """Of singular values 10, 5, 2, 1 the first hold 76.9, 96.2, 99.2 and 100 % of the squares."""
    module = "base_model.model.model.layers.0.q_proj"
    down = torch.diag(torch.tensor([10.0, 5.0, 2.0, 1.0])) @ torch.eye(4, 24)
    path = write_adapter(tmp_path / "a", {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": torch.eye(24, 4)})
    (record,) = json.loads(run(path, "--spectrum", "--format", "json").stdout)["data"]["weights"]
    assert record["singular_values"] == pytest.approx([10, 5, 2, 1])
    assert record["rank_90"] == 2


def test_parameters_are_counted_by_kind_of_update(tmp_path: Path) -> None:
    """LoRA of rank 4 on 24 x 24 is 192; the table is 70 x 24."""
    shapes = {"A": (4, 24), "B": (24, 4)}
    factors = {
        f"base_model.model.model.layers.{layer}.q_proj.lora_{side}.weight": torch.ones(*shape)
        for layer in range(2)
        for side, shape in shapes.items()
    }
    table = {"base_model.model.model.embed_tokens.weight": torch.ones(70, 24)}
    path = write_adapter(tmp_path / "a", factors | table, modules_to_save=["embed_tokens"])
    found = json.loads(run(path, "--format", "json").stdout)
    assert list(check("report", found)) == []
    assert found["summary"]["parameters_by_kind"] == {"low-rank": 384, "replace": 1680}
    assert found["summary"]["parameters"] == 384 + 1680
    assert "parameters 384 LoRA + 1,680 full = 2,064\n" in run(path).stdout
    base = save_base(tmp_path / "base", weights(), config())
    share = f"{2064 / (sum(value.numel() for value in weights().values()) + 2064):.2%}"
    assert (
        f"parameters 384 LoRA + 1,680 full = 2,064 ({share} of base and adapter)\n" in run(path, "--base", base).stdout
    )


def test_parameters_of_one_kind_are_named_once(folders: tuple[Path, Path]) -> None:
    assert "parameters 1,212 LoRA\n" in run(folders[0]).stdout


@pytest.mark.parametrize(("alpha", "worst"), [(None, "error"), (4, None)])
def test_inspect_judges_only_where_it_is_asked_to(tmp_path: Path, alpha: int | None, worst: str | None) -> None:
    module = "base_model.model.model.layers.0.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 24), f"{module}.lora_B.weight": torch.ones(24, 4)}
    path = write_adapter(tmp_path / "a", tensors, lora_alpha=alpha)
    told = run(path)
    assert told.exit_code == 0
    assert ("error[LF206]" in told.stdout) == (worst == "error")
    assert run(path, "--fail-on", "never").exit_code == 0
    for least in ("error", "warning"):
        failed = run(path, "--fail-on", least)
        assert failed.exit_code == (1 if worst else 0)
        assert failed.stdout == told.stdout
        assert run(path, path, "--fail-on", least, "--format", "json").exit_code == (1 if worst else 0)


def test_a_warning_fails_an_inspection_only_where_warnings_are_to(tmp_path: Path) -> None:
    module = "base_model.model.model.layers.0.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 24), f"{module}.lora_B.weight": torch.zeros(24, 4)}
    path = write_adapter(tmp_path / "a", tensors)
    assert "warning[LF401]" in run(path, "--norms").stdout
    assert run(path, "--norms", "--fail-on", "error").exit_code == 0
    assert run(path, "--norms", "--fail-on", "warning").exit_code == 1


def test_the_help_of_inspect_says_that_it_does_not_judge() -> None:
    assert "inspect does not judge" in " ".join(run("--help").stdout.split())


def test_headers_alone_have_no_figures(folders: tuple[Path, Path]) -> None:
    adapter, base = folders
    report = inspect(str(adapter), base=str(base))
    assert report.data.share > 0
    assert {record.norm for record in report.data.weights} == {None}
    assert {record.relative_norm for record in report.data.weights} == {None}


def test_values_that_are_read_are_judged(folders: tuple[Path, Path]) -> None:
    """With norms the rules about values run too: a NaN has no norm and a finding, and the base is not measured."""
    adapter, base = folders
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in tensors if "layers.0.q_proj.lora_B" in key)
    tensors[name][0, 0] = math.nan
    tensors[name.replace("layers.0", "layers.1")].zero_()
    save_file(tensors, adapter / "adapter_model.safetensors")
    report = inspect(str(adapter), base=str(base), spectrum=True)
    assert sorted(finding.code for finding in report.findings) == ["LF401", "LF402"]
    result = run(adapter, "--spectrum", "--format", "json")
    first = json.loads(result.stdout)["data"]["weights"][0]
    assert (first["norm"], first["spectral_norm"]) == (None, None)
    assert not inspect(str(adapter)).findings


def test_several_adapters_are_shown_one_after_the_other_and_then_together(folders: tuple[Path, Path]) -> None:
    adapter, _ = folders
    other = adapter.with_name("other")
    shutil.copytree(adapter, other)
    text = run(adapter, other, "--norms").stdout
    assert text.count("read as") == 2
    assert text.splitlines()[-3].split()[:3] == ["adapter", "format", "rank"]
    both = json.loads(run(adapter, other, "--norms", "--format", "json").stdout)
    assert list(check("reports", both)) == []
    assert [each["job"] for each in both["reports"]] == ["inspect", "inspect"]


def test_the_order_asked_for_is_that_of_the_records(folders: tuple[Path, Path]) -> None:
    adapter, _ = folders
    report = inspect(str(adapter), norms=True, view=View(sort="norm"))
    norms = [record.norm for record in report.data.weights]
    assert norms == sorted(norms, reverse=True)
    assert [row["norm"] for row in report.records()] == norms


def test_an_order_that_there_is_not_is_an_error() -> None:
    with pytest.raises(UsageError, match="expected one of weight, norm"):
        inspect("nothing", view=View(sort="size"))


def test_a_weight_that_stands_out_is_marked(tmp_path: Path) -> None:
    shapes = {f"model.layers.{layer}.q_proj.weight": (24, 24) for layer in range(12)}
    adapter = adapter_folder(tmp_path / "adapter", shapes)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.7.q_proj.lora_B.weight"] *= 50
    save_file(tensors, adapter / "adapter_model.safetensors")
    marked = [record.weight for record in inspect(str(adapter), norms=True).data.weights if record.is_outlier]
    assert marked == ["model.layers.7.q_proj.weight"]


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, 3.0, 50.0])
def test_inspect_marks_what_validate_warns_of(tmp_path: Path, factor: float) -> None:
    """Equal norms in all layers but one: it stands out from 2.4 times the median on."""
    shapes = {f"model.layers.{layer}.q_proj.weight": (24, 24) for layer in range(6)}
    adapter = adapter_folder(tmp_path / "adapter", shapes)
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    for layer in range(6):
        for part in ("A", "B"):
            tensors[f"{prefix}.{layer}.q_proj.lora_{part}.weight"] = tensors[
                f"{prefix}.0.q_proj.lora_{part}.weight"
            ].clone()
    tensors[f"{prefix}.3.q_proj.lora_B.weight"] *= factor
    save_file(tensors, adapter / "adapter_model.safetensors")
    marked = [record.weight for record in inspect(str(adapter), norms=True).data.weights if record.is_outlier]
    told = [found.location.tensor for found in validate(str(adapter), deep=True, select=["LF404"]).findings]
    assert marked == told == (["model.layers.3.q_proj.weight"] if not 1 / 2.4 < factor < 2.4 else [])


def test_threads_do_not_change_a_figure(folders: tuple[Path, Path]) -> None:
    adapter, base = folders
    one, three = (inspect(str(adapter), base=str(base), norms=True, jobs=jobs).data for jobs in (1, 3))
    assert one == three


def test_the_numbers_of_an_adapter_with_fused_modules_are_explained() -> None:
    """Three weights share one factor of 16 values, and the file has three alphas beside its six factors."""
    source = Path(__file__).parents[2] / "fixtures" / "good" / "kohya" / "tiny-flux"
    names = load_file(source / "lora.safetensors")
    alphas = sum(name.endswith(".alpha") for name in names)
    text = run(source).stdout
    assert f"has {len(names)} tensors in the names of kohya, {alphas} of them alphas" in text
    assert "fused modules split into their parts" in text
    values = sum(tensor.numel() for name, tensor in names.items() if not name.endswith(".alpha"))
    rows = [
        int(line.split()[-1]) for line in text.splitlines() if line.startswith("  transformer.") or "q_proj.w" in line
    ]
    assert f"parameters {values} LoRA; tables add up to {sum(rows)}" in text
    assert sum(rows) == values + 2 * 16
    plain = run(source.parents[1] / "peft" / "tiny-llama").stdout
    assert "add up to" not in plain
    assert "fused" not in plain
