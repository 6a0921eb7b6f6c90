"""combine: the exact sum and its relatives, against float64 sums and PEFT's own; contradictions are refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from peft_adapters import deltas, matrix, net, save
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.algebra import row_blocks
from loraformat.cli import main
from loraformat.errors import AdapterRefused, UnsupportedUpdate

ROOT = Path(__file__).parents[3]
WEIGHTS = "adapter_model.safetensors"
RATIOS = [0.7, -0.4]


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Of other ranks, scales and targets."""
    return [
        save(tmp_path / "a", 1),
        save(tmp_path / "b", 2, r=3, use_rslora=True, target_modules=["up", "conv", "embed"]),
    ]


@pytest.fixture
def twins(tmp_path: Path) -> list[Path]:
    """Of one rank and one scale."""
    return [save(tmp_path / name, seed) for seed, name in enumerate("ab")]


def weighted(adapters: list[Path], weights: list[float]) -> list[str]:
    return [f"{adapter}={weight}" for adapter, weight in zip(adapters, weights, strict=True)]


def total(adapters: list[Path], weights: list[float]) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in deltas(adapter).items():
            found[name] = found.get(name, np.zeros_like(delta)) + weight * delta
    return found


def by_peft(adapters: list[Path], weights: list[float], kind: str, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    model = peft.PeftModel.from_pretrained(net(), str(adapters[0]), adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(str(adapter), adapter_name=str(number))
    model = model.double()
    names = [str(number) for number in range(len(adapters))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, weights, adapter_name="new", combination_type=kind, **options)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "new" in module.scaling:
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight("new").detach().numpy()
    return found


def near(found: dict[str, Any], exact: dict[str, Any], bound: float) -> None:
    assert found.keys() == exact.keys()
    for name, delta in exact.items():
        assert np.linalg.norm(found[name] - delta) <= bound * np.linalg.norm(delta), name


def test_the_default_is_the_exact_sum(adapters: list[Path], tmp_path: Path) -> None:
    report = loraformat.combine(weighted(adapters, RATIOS), tmp_path / "out")
    assert report.data.method == "cat"
    near(deltas(tmp_path / "out"), total(adapters, RATIOS), 2.0**-22)
    ranks = {each.weight: each.rank for each in report.data.weights}
    assert ranks["layers.0.up.weight"] == 11
    assert ranks["layers.0.down.weight"] == 8
    assert ranks["point.weight"] == 5  # of 5 rows no rank is above 5
    for each in report.data.weights:
        assert each.error < 2.0**-22


def test_equal_scales_change_no_factor(twins: list[Path], tmp_path: Path) -> None:
    loraformat.combine(twins, tmp_path / "out")
    parts = [load_file(twin / WEIGHTS) for twin in twins]
    found = load_file(tmp_path / "out" / WEIGHTS)
    name = "base_model.model.layers.0.up.lora_"
    assert torch.equal(found[f"{name}A.weight"], torch.cat([part[f"{name}A.weight"] for part in parts]))
    assert torch.equal(found[f"{name}B.weight"], torch.cat([part[f"{name}B.weight"] for part in parts], dim=1))


def test_it_is_linear(adapters: list[Path], tmp_path: Path) -> None:
    """(a + b) + (a - b) = 2a, by files."""
    loraformat.combine(weighted(adapters, [1, 1]), tmp_path / "sum")
    loraformat.combine(weighted(adapters, [1, -1]), tmp_path / "difference")
    loraformat.combine([tmp_path / "sum", tmp_path / "difference"], tmp_path / "both")
    exact = {name: 2 * delta for name, delta in deltas(adapters[0]).items()}
    near(deltas(tmp_path / "both"), exact, 2.0**-20)


def test_one_adapter_is_itself_times_its_weight(adapters: list[Path], tmp_path: Path) -> None:
    loraformat.combine(weighted(adapters[:1], [0.25]), tmp_path / "out")
    near(deltas(tmp_path / "out"), total(adapters[:1], [0.25]), 2.0**-22)


@pytest.mark.parametrize("rank", [2, 6])
def test_svd_is_the_best_of_the_sum(adapters: list[Path], tmp_path: Path, rank: int) -> None:
    report = loraformat.combine(weighted(adapters, RATIOS), tmp_path / "out", rank=rank)
    assert report.data.method == f"svd, rank {rank}"
    found = deltas(tmp_path / "out")
    for name, delta in total(adapters, RATIOS).items():
        optimum = np.linalg.norm(np.linalg.svd(matrix(delta), compute_uv=False)[rank:])
        norm = np.linalg.norm(delta)
        assert np.linalg.norm(found[name] - delta) <= optimum + 2.0**-22 * norm


@pytest.mark.parametrize("kind", ["ties_svd", "magnitude_prune_svd"])
def test_methods_on_updates_are_those_of_peft(twins: list[Path], tmp_path: Path, kind: str) -> None:
    """At full rank nothing is cut, so all that is left of PEFT's result is its method."""
    linear = [
        save(path.with_name(f"{path.name}-linear"), 7 + at, target_modules=["up"]) for at, path in enumerate(twins)
    ]
    exact = by_peft(linear, RATIOS, kind, density=0.3, svd_rank=24)
    loraformat.combine(weighted(linear, RATIOS), tmp_path / "out", like_peft=kind, density=0.3, rank=24)
    near(deltas(tmp_path / "out"), exact, 1e-5)
    named = {"ties_svd": "ties", "magnitude_prune_svd": "magnitude"}[kind]
    loraformat.combine(weighted(linear, RATIOS), tmp_path / "own", method=named, density=0.3, rank=24)
    assert (tmp_path / "own" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("linear", {}), ("ties", {"density": 0.4}), ("magnitude_prune", {"density": 0.4})],
)
def test_combinations_of_factors_are_those_of_peft(
    twins: list[Path], tmp_path: Path, kind: str, options: dict[str, float]
) -> None:
    report = loraformat.combine(weighted(twins, RATIOS), tmp_path / "out", like_peft=kind, **options)
    near(deltas(tmp_path / "out"), by_peft(twins, RATIOS, kind, **options), 1e-5)
    found, exact = deltas(tmp_path / "out"), total(twins, RATIOS)
    for each in report.data.weights:
        name = each.weight.removesuffix(".weight")
        off = np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name])
        assert each.cross_terms == pytest.approx(off, rel=1e-5)
    assert report.data.cross_terms > 0.5


def test_combinations_of_factors_need_one_rank(adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedUpdate, match="different ranks"):
        loraformat.combine(adapters, tmp_path / "out", like_peft="linear")


@pytest.mark.parametrize(
    "method", ["dare", "dare-ties", "della", "breadcrumbs", "knots-ties", "core-ties", "magnitude"]
)
def test_every_method_is_written_as_peft_reads_it(adapters: list[Path], tmp_path: Path, method: str) -> None:
    report = loraformat.combine(weighted(adapters, RATIOS), tmp_path / "out", method=method, density=0.6, rank=48)
    assert deltas(tmp_path / "out").keys() == total(adapters, RATIOS).keys()
    assert 0 <= report.data.conflicts <= 1
    assert report.data.error < 1e-5


@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_nothing_dropped_is_the_sum(adapters: list[Path], tmp_path: Path, method: str) -> None:
    loraformat.combine(weighted(adapters, RATIOS), tmp_path / "out", method=method, density=1, rank=48)
    near(deltas(tmp_path / "out"), total(adapters, RATIOS), 1e-6)


@pytest.mark.parametrize("method", ["knots-ties", "core-ties"])
def test_methods_in_a_shared_basis_need_no_rule(adapters: list[Path], tmp_path: Path, method: str) -> None:
    report = loraformat.combine(adapters, tmp_path / "out", method=method, density=0.5)
    assert all(each.rank <= each.rank_before for each in report.data.weights)
    assert report.data.error < 1e-6
    deltas(tmp_path / "out")


@pytest.mark.parametrize("method", ["ties", "dare", "della", "core-ties"])
def test_seeds_and_blocks(adapters: list[Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, seed: int) -> bytes:
        options: dict[str, Any] = {"method": method, "density": 0.5, "rank": 8, "seed": seed}
        loraformat.combine(adapters, tmp_path / name, **options)
        return (tmp_path / name / WEIGHTS).read_bytes()

    first = run("one", 7)
    assert run("two", 7) == first
    assert (run("three", 8) == first) == (method in ("ties", "core-ties"))
    monkeypatch.setattr(row_blocks, "HEIGHT", 5)
    assert run("four", 7) == first


def test_what_cancels_is_left_out_or_refused(adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="nothing is left"):
        loraformat.combine(weighted([adapters[0]] * 2, [1, -1]), tmp_path / "out")
    with pytest.raises(AdapterRefused, match="nothing is left"):
        loraformat.combine(weighted([adapters[0]] * 2, [1, -1]), tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
    report = loraformat.combine(weighted([adapters[0], adapters[0], adapters[1]], [1, -1, 1]), tmp_path / "out")
    assert "point.weight" in report.data.left_out
    near(deltas(tmp_path / "out"), deltas(adapters[1]), 1e-6)


def test_small_differences_do_not_cancel(adapters: list[Path], tmp_path: Path) -> None:
    weights = [1.0, -1.0 + 1e-6]
    loraformat.combine(weighted([adapters[0]] * 2, weights), tmp_path / "out", rank=8)
    exact = {name: delta * (weights[0] + weights[1]) for name, delta in deltas(adapters[0]).items()}
    near(deltas(tmp_path / "out"), exact, 1e-6)


def test_saved_modules(tmp_path: Path) -> None:
    first, second = (
        save(tmp_path / str(seed), seed, target_modules=["up"], modules_to_save=["head"]) for seed in (1, 2)
    )
    plain = save(tmp_path / "plain", 3, target_modules=["up"])
    with pytest.raises(UnsupportedUpdate, match=r"head\.\w+: the weight is replaced"):
        loraformat.combine([first, second], tmp_path / "out")
    with pytest.raises(UnsupportedUpdate, match="depends on the base"):
        loraformat.combine([f"{first}=0.5", plain], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = loraformat.combine([first, f"{plain}=0.5"], tmp_path / "one")
    assert report.data.kept == ("head.bias", "head.weight")
    tensors = load_file(first / WEIGHTS)
    other = load_file(second / WEIGHTS)
    save_file({name: tensors[name] if ".head." in name else value for name, value in other.items()}, second / WEIGHTS)
    loraformat.combine([first, second], tmp_path / "same")
    for folder in ("one", "same"):
        found = load_file(tmp_path / folder / WEIGHTS)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors if ".head." in name)
        deltas(tmp_path / folder)


def test_trained_biases_are_summed(tmp_path: Path) -> None:
    folders = [
        save(tmp_path / str(seed), seed, target_modules=["up"], lora_bias=True, lora_alpha=alpha)
        for seed, alpha in ((1, 12), (2, 5))
    ]
    loraformat.combine(weighted(folders, RATIOS), tmp_path / "out")
    exact = [loraformat.load_adapter(folder) for folder in folders]
    found = loraformat.load_adapter(tmp_path / "out")
    assert found.updates.keys() == exact[0].updates.keys()
    for weight in found.updates:
        wanted = sum(ratio * each.delta(weight, dtype="float64") for ratio, each in zip(RATIOS, exact, strict=True))
        assert found.delta(weight, dtype="float64") == pytest.approx(wanted, abs=1e-6)


def test_other_kinds_take_part(tmp_path: Path) -> None:
    loha = save(tmp_path / "loha", 1, peft.LoHaConfig(r=2, alpha=4, target_modules=["up"]))
    lokr = save(tmp_path / "lokr", 2, peft.LoKrConfig(r=2, alpha=4, target_modules=["up"]))
    lora = save(tmp_path / "lora", 3, target_modules=["up"])
    loraformat.combine([loha, lokr, lora], tmp_path / "out")
    near(deltas(tmp_path / "out"), total([loha, lokr, lora], [1, 1, 1]), 1e-6)


def stamped(folder: Path, fingerprint: str, name: str = "a/b") -> Path:
    """The adapter, whose weight file says what it was trained on."""
    from safetensors import safe_open

    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, path, {"loraformat.base_fingerprint": fingerprint, "loraformat.base_model": name})
    return folder


def test_other_bases_are_refused_or_told(twins: list[Path], tmp_path: Path) -> None:
    for number, twin in enumerate(twins):
        config = json.loads((twin / "adapter_config.json").read_text())
        (twin / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": f"a/{number}"}))
    report = loraformat.combine(twins, tmp_path / "names")
    assert "LF712" in {each.code for each in report.findings}
    prints = [f"lf1:dense:{digit * 16}:{'1' * 32}:{'2' * 32}:{'4' * 32}:{'3' * 8}" for digit in "45"]
    for twin, text in zip(twins, prints, strict=True):
        stamped(twin, text)
    with pytest.raises(AdapterRefused, match="fingerprints differ"):
        loraformat.combine(twins, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loraformat.combine(twins, tmp_path / "forced", force=True)
    assert loraformat.load_adapter(tmp_path / "forced").config.base_fingerprint is None
    stamped(twins[1], prints[0])
    same = loraformat.combine(twins, tmp_path / "same")
    assert "LF712" not in {each.code for each in same.findings}
    assert loraformat.load_adapter(tmp_path / "same").config.base_fingerprint == prints[0]


TOKENIZERS = [json.dumps({"model": {"type": "WordLevel", "vocab": {word: 0}}}) for word in "ab"]


def test_other_tokenizers_are_refused(twins: list[Path], tmp_path: Path) -> None:
    for twin, text in zip(twins, TOKENIZERS, strict=True):
        (twin / "tokenizer.json").write_text(text)
    with pytest.raises(AdapterRefused, match="vocabularies differ"):
        loraformat.combine(twins, tmp_path / "out")
    (twins[1] / "tokenizer.json").write_text(TOKENIZERS[0])
    loraformat.combine(twins, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == TOKENIZERS[0]


def test_dora_and_other_shapes_are_refused(twins: list[Path], tmp_path: Path) -> None:
    dora = save(tmp_path / "dora", 1, target_modules=["up"], use_dora=True)
    with pytest.raises(UnsupportedUpdate, match="magnitude"):
        loraformat.combine([twins[0], dora], tmp_path / "out")
    renamed = tmp_path / "renamed"
    loraformat.pick(twins[1], renamed, select=["layers.0.down"], rename=[("down", "up")])
    with pytest.raises(UnsupportedUpdate, match="different shapes"):
        loraformat.combine([twins[0], renamed], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "ties", "--rank", "4"],
        ["--method", "ties", "--density", "0.5"],
        ["--method", "cat", "--rank", "4"],
        ["--method", "svd"],
        ["--method", "svd", "--rank", "4", "--density", "0.5"],
        ["--method", "cat", "--like-peft", "cat"],
        ["--method", "dare", "--rank", "4", "--density", "0"],
        ["--method", "dare", "--rank", "4", "--density", "1.5"],
        ["--method", "della", "--rank", "4", "--density", "0.1", "--epsilon", "0.2"],
        ["--method", "breadcrumbs", "--rank", "4", "--density", "0.1", "--gamma", "1"],
        ["--like-peft", "ties"],
        ["--like-peft", "linnear"],
    ],
)
def test_senseless_options_are_usage_errors(twins: list[Path], tmp_path: Path, arguments: list[str]) -> None:
    done = CliRunner().invoke(main, ["combine", *map(str, twins), *arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert not (tmp_path / "out").exists()


def test_a_size_is_kept(adapters: list[Path], tmp_path: Path) -> None:
    for method, density in (("svd", None), ("ties", 0.5)):
        out = tmp_path / method
        loraformat.combine(adapters, out, method=method, density=density, size=20_000)
        assert 14_000 < (out / WEIGHTS).stat().st_size <= 20_000
        deltas(out)


def test_the_report_is_json_of_its_schema_and_text_for_people(adapters: list[Path], tmp_path: Path) -> None:
    import jsonschema

    arguments = [*("combine", *map(str, adapters), "--method", "ties", "--density", "0.5", "--rank", "4", "--dry-run")]
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out"), "--format", "json"])
    report = json.loads(done.stdout)
    jsonschema.validate(report, json.loads((ROOT / "schemas" / "report.schema.json").read_text()))
    ((first, second, cosine),) = report["data"]["cosines"]
    one, other = map(deltas, adapters)
    shared = one.keys() & other.keys()
    product = sum((one[name] * other[name]).sum() for name in shared)
    lengths = [np.sqrt(sum((each[name] ** 2).sum() for name in shared)) for each in (one, other)]
    assert (first, second) == (0, 1)
    assert cosine == pytest.approx(product / lengths[0] / lengths[1], abs=1e-9)
    text = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out")]).stdout
    assert "opposite signs" in text
    assert not (tmp_path / "out").exists()
