"""resize: the best approximation of each update, as PEFT loads it; what it cannot do right it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from peft_adapters import deltas, matrix, save
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.cli import main
from loraformat.errors import AdapterRefused, NonFiniteValue, UnsupportedUpdate, UsageError
from loraformat.model.updates import Dense, LowRank
from loraformat.report import render
from loraformat.report.words import nbytes

ROOT = Path(__file__).parents[3]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save(tmp_path / "adapter", 1, rank_pattern={"layers.1.up": 5}, alpha_pattern={"down": 3}, use_rslora=True)


def spectra(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.linalg.svd(matrix(delta), compute_uv=False) for name, delta in deltas(folder).items()}


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_every_update_is_at_its_optimum(adapter: Path, tmp_path: Path, rank: int) -> None:
    report = loraformat.resize(adapter, tmp_path / "out", rank=rank)
    before, after = deltas(adapter), deltas(tmp_path / "out")
    assert before.keys() == after.keys()
    changes = {each.weight.removesuffix(".weight"): each for each in report.data.weights}
    for name, values in spectra(adapter).items():
        error = np.linalg.norm(before[name] - after[name])
        optimum, norm = np.linalg.norm(values[rank:]), np.linalg.norm(values)
        assert error <= optimum + 2.0**-22 * norm
        assert changes[name].error == pytest.approx(error / norm, rel=1e-5, abs=1e-9)
        assert changes[name].optimum == pytest.approx(optimum / norm, rel=1e-6, abs=1e-12)
        assert changes[name].norm == pytest.approx(norm, rel=1e-9)
        assert changes[name].energy == pytest.approx(1 - (optimum / norm) ** 2, rel=1e-6, abs=1e-12)
        assert changes[name].rank <= rank
    whole = np.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in before.values()))
    off = np.sqrt(sum(np.linalg.norm(before[name] - after[name]) ** 2 for name in before))
    assert report.data.error == pytest.approx(off / whole, rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "value", "meets"),
    [
        ("energy", 0.8, lambda s, k: (s[:k] ** 2).sum() >= 0.8 * (s**2).sum()),
        ("error", 0.4, lambda s, k: np.sqrt((s[k:] ** 2).sum()) <= 0.4 * np.sqrt((s**2).sum())),
        ("sv_fro", 0.85, lambda s, k: np.sqrt((s[:k] ** 2).sum()) >= 0.85 * np.sqrt((s**2).sum())),
        ("sv_cumulative", 0.7, lambda s, k: s[:k].sum() >= 0.7 * s.sum()),
        ("sv_ratio", 2.5, lambda s, k: k >= (s >= s[0] / 2.5).sum()),
    ],
)
def test_each_module_has_the_least_rank_of_a_rule(
    adapter: Path, tmp_path: Path, rule: str, value: float, meets: Any
) -> None:
    report = loraformat.resize(adapter, tmp_path / "out", **{rule: value})
    found = {each.weight.removesuffix(".weight"): each.rank for each in report.data.weights}
    for name, values in spectra(adapter).items():
        assert found[name] == next(k for k in range(1, len(values) + 1) if meets(values, k)), name
    assert len(set(found.values())) > 1
    assert deltas(tmp_path / "out").keys() == found.keys()


def test_a_size_is_kept_and_used(adapter: Path, tmp_path: Path) -> None:
    before = (adapter / WEIGHTS).stat().st_size
    for share in (0.35, 0.6, 0.9):
        out = tmp_path / str(share)
        report = loraformat.resize(adapter, out, size=int(before * share))
        size = (out / WEIGHTS).stat().st_size
        assert size <= before * share
        assert size > before * share - 4096
        assert all(each.rank <= each.rank_before for each in report.data.weights)
        deltas(out)
    with pytest.raises(UsageError, match="too few even for rank 1"):
        loraformat.resize(adapter, tmp_path / "none", size=2000)
    with pytest.raises(UsageError, match="cannot be combined"):
        loraformat.resize(adapter, tmp_path / "none", size=2_000_000, rank=2)
    assert not (tmp_path / "none").exists()


def test_a_rank_that_stays_keeps_its_bytes(adapter: Path, tmp_path: Path) -> None:
    report = loraformat.resize(adapter, tmp_path / "out", rank=8)
    assert report.data.error < 1e-7
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    point = next(name for name in before if "point.lora_A" in name)
    assert after[point].shape[0] == 5  # of 5 rows no rank is above 5, and this one was 8
    assert all(torch.equal(before[name], after[name]) for name in before if "point" not in name)
    for name, delta in deltas(adapter).items():
        assert deltas(tmp_path / "out")[name] == pytest.approx(delta, abs=1e-6)


def test_it_is_idempotent_and_repeats_its_bytes(adapter: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        loraformat.resize(adapter, tmp_path / name, rank=3)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    loraformat.resize(tmp_path / "one", tmp_path / "again", rank=3)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2.0**-9), ("bfloat16", 2.0**-6)])
def test_a_narrow_dtype_is_in_the_error(adapter: Path, tmp_path: Path, dtype: str, bound: float) -> None:
    report = loraformat.resize(adapter, tmp_path / "out", rank=3, dtype=dtype)
    before, after = deltas(adapter), deltas(tmp_path / "out")
    for each in report.data.weights:
        name = each.weight.removesuffix(".weight")
        error = np.linalg.norm(before[name] - after[name]) / np.linalg.norm(before[name])
        assert each.error == pytest.approx(error, rel=1e-3)
        assert each.optimum < each.error < each.optimum + bound
    assert all(str(value.dtype).endswith(dtype) for value in load_file(tmp_path / "out" / WEIGHTS).values())


def test_a_limit_that_breaks_a_bound_is_a_warning_and_strict_refuses(adapter: Path, tmp_path: Path) -> None:
    report = loraformat.resize(adapter, tmp_path / "out", error=0.1, max_rank=2)
    assert "LF711" in {each.code for each in report.findings}
    assert report.ok
    with pytest.raises(AdapterRefused, match="does not meet the bound"):
        loraformat.resize(adapter, tmp_path / "strict", error=0.1, max_rank=2, strict=True)
    assert not (tmp_path / "strict").exists()
    met = loraformat.resize(adapter, tmp_path / "met", error=0.99, max_rank=2)
    assert "LF711" not in {each.code for each in met.findings}


def test_saved_modules_and_trained_biases_stay(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", 2, target_modules=["up"], modules_to_save=["head"], lora_bias=True)
    loraformat.resize(folder, tmp_path / "out", rank=2)
    before, after = loraformat.load_adapter(folder), loraformat.load_adapter(tmp_path / "out")
    assert before.updates.keys() == after.updates.keys()
    for weight in ("head.weight", "head.bias"):
        assert (before.updates[weight][0].value.load() == after.updates[weight][0].value.load()).all()
    bias = "layers.0.up.bias"
    assert isinstance(after.updates[bias][0], Dense)
    assert after.delta(bias, dtype="float64") == pytest.approx(before.delta(bias, dtype="float64"), rel=1e-6)
    deltas(tmp_path / "out")


def test_modules_that_were_never_trained_are_left_out(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    for name in tensors:
        if "layers.0.up.lora_B" in name:
            tensors[name] *= 0
    save_file(tensors, adapter / WEIGHTS)
    report = loraformat.resize(adapter, tmp_path / "out", rank=2)
    assert report.data.left_out == ("layers.0.up.weight",)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "layers.0.up" not in config["target_modules"]
    assert "layers.1.up" in config["target_modules"]
    assert "layers.0.up" not in deltas(tmp_path / "out")
    save_file({name: value * 0 for name, value in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(AdapterRefused, match="all of them zero"):
        loraformat.resize(adapter, tmp_path / "zero", rank=2)


def test_experts_share_the_largest_rank_of_a_rule(tmp_path: Path) -> None:
    g = np.random.default_rng(3)
    ups, downs = (g.standard_normal(shape).astype("f4") for shape in ((3, 12, 6), (3, 6, 10)))
    ups[1, :, 2:] = 0
    update = LowRank(loraformat.LazyTensor.of(ups), loraformat.LazyTensor.of(downs), 0.5)
    from loraformat.algebra.rank_rules import RankRule
    from loraformat.jobs.algebra.resize import resized
    from loraformat.model.tensors import DType

    adapter = loraformat.Adapter(config=loraformat.AdapterConfig(), updates={"experts.w": (update,)})
    updates, (change,) = resized(adapter, RankRule(energy=0.9), DType.F32)
    (found,) = updates["experts.w"]
    assert isinstance(found, LowRank)
    assert found.is_stack
    for expert in range(3):
        exact = 0.5 * ups[expert].astype("f8") @ downs[expert]
        values = np.linalg.svd(exact, compute_uv=False)
        written = found.up.load()[expert].astype("f8") @ found.down.load()[expert]
        assert np.linalg.norm(exact - written) == pytest.approx(np.linalg.norm(values[found.rank :]), abs=1e-5)
        assert (values[: found.rank] ** 2).sum() >= 0.9 * (values**2).sum()
    assert change.rank == found.rank < 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: save(folder, 1, target_modules=["up"], use_dora=True), "DoRA"),
        (lambda folder: save(folder, 1, target_modules=["up"], init_lora_weights="pissa"), "pissa"),
        (lambda folder: save(folder, 1, peft.IA3Config(target_modules=["up"], feedforward_modules=[])), "scaled"),
    ],
)
def test_what_depends_on_the_base_is_refused_by_name(tmp_path: Path, make: Any, message: str) -> None:
    folder = make(tmp_path / "adapter")
    with pytest.raises((UnsupportedUpdate, AdapterRefused), match=f"(?i){message}"):
        loraformat.resize(folder, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(NonFiniteValue):
        loraformat.resize(adapter, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_factors_whose_product_is_beyond_float64_are_refused(adapter: Path, tmp_path: Path) -> None:
    tensors = {name: value.double() * 1e200 for name, value in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(NonFiniteValue, match="too large for float64"):
        loraformat.resize(adapter, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--rank", "0"],
        ["--energy", "1.5"],
        ["--error", "-1"],
        ["--sv-ratio", "0.5"],
        ["--rank", "2", "--dtype", "int8"],
        ["--rank", "2", "--to", "mlxx"],
        ["--rank", "2", "--to", "nemo"],
        ["--max-rank", "99999999"],
    ],
)
def test_senseless_options_are_usage_errors(adapter: Path, tmp_path: Path, arguments: list[str]) -> None:
    done = CliRunner().invoke(main, ["resize", str(adapter), *arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["native", "peft", "mlx", "loralib"])
def test_every_format_goes_out(tmp_path: Path, to: str) -> None:
    folder = save(tmp_path / "adapter", 1, target_modules=["up", "down"])
    loraformat.resize(folder, tmp_path / "out", rank=2, to=to)
    before = loraformat.load_adapter(folder)
    after = loraformat.load_adapter(tmp_path / "out")
    assert before.updates.keys() == after.updates.keys()
    for weight in before.updates:
        exact, found = (each.delta(weight, dtype="float64") for each in (before, after))
        optimum = np.linalg.norm(np.linalg.svd(exact, compute_uv=False)[2:])
        assert np.linalg.norm(exact - found) == pytest.approx(optimum, rel=1e-4)


def test_other_kinds_come_out_as_lora(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", 1, peft.LoHaConfig(r=2, alpha=4, target_modules=["up"]))
    report = loraformat.resize(folder, tmp_path / "out", error=1e-6)
    assert report.data.target == "peft"
    assert {each.rank for each in report.data.weights} == {4}  # a product of two products of rank 2
    before, after = deltas(folder), deltas(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[name] == pytest.approx(before[name], abs=1e-6) for name in before)


def test_sizes_before_and_after_are_of_the_tensors(adapter: Path, tmp_path: Path) -> None:
    """Files hold settings and a header beside them, which would make an adapter of the same size look larger."""
    wet = loraformat.resize(adapter, tmp_path / "out", rank=2)
    dry = loraformat.resize(adapter, tmp_path / "none", rank=2, dry_run=True)
    before, after = (
        sum(tensor.nbytes for tensor in load_file(folder / "adapter_model.safetensors").values())
        for folder in (adapter, tmp_path / "out")
    )
    assert after < before
    for report in (wet, dry):
        assert f"; tensors {nbytes(after)}, from {nbytes(before)}" in render(report)


def test_a_dry_run_reports_the_same_and_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    dry = loraformat.resize(adapter, tmp_path / "out", rank=2, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert dry.written == ()
    wet = loraformat.resize(adapter, tmp_path / "out", rank=2)
    assert dry.data.weights == wet.data.weights
    assert sorted(dry.data.files) == sorted(wet.data.files)


def test_the_report_is_json_of_its_schema_and_text_for_people(adapter: Path, tmp_path: Path) -> None:
    import jsonschema

    arguments = ["resize", str(adapter), "--rank", "2", "--dry-run", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*arguments, "--format", "json"])
    report = json.loads(done.stdout)
    jsonschema.validate(report, json.loads((ROOT / "schemas" / "report.schema.json").read_text()))
    assert report["data"]["weights"][0]["rank"] == 2
    text = CliRunner().invoke(main, arguments).stdout
    assert "nothing written (dry run)" in text
    assert "least possible" in text
