"""Pages of adapters that resize, combine or extract wrote: their errors, and the reports that are refused."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import Dom
from jobs.test_plot import SHAPES, column, embedded, names_of, run
from merger.checkpoints import adapter_folder, config, save_base, weights
from safetensors.numpy import load_file

import loraformat
from loraformat.report.json import render

FIXTURES = Path(__file__).parents[3] / "fixtures"


def saved(report: loraformat.Report, path: Path) -> Path:
    path.write_text(render(report))
    return path


def text_of(page: str) -> str:
    """What a reader sees of a page."""
    body = re.sub(r"(?s)<(script|style).*?</\1>", " ", page)
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


def product(folder: Path, module: str) -> np.ndarray:
    """s·BA of a PEFT folder in float64."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    up, down = (tensors[f"base_model.model.{module}.lora_{half}.weight"].astype(np.float64) for half in "BA")
    pattern = settings.get("alpha_pattern", {})
    alpha = next((value for key, value in pattern.items() if module.endswith(key)), settings["lora_alpha"])
    return alpha / len(down) * (up @ down)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_folder(tmp_path / "adapter", SHAPES)


@pytest.fixture
def small(adapter: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(a resized adapter, its report)."""
    report = loraformat.resize(adapter, tmp_path / "small", rank=1)
    return tmp_path / "small", saved(report, tmp_path / "report.json")


def test_the_error_of_each_weight_is_that_of_the_factors(adapter: Path, small: tuple[Path, Path]) -> None:
    page = small[0].parent / "page.html"
    done = run(small[0], "--made-by", small[1], "-o", page)
    assert done.exit_code == 0, done.output
    data = embedded(page.read_text())
    errors = dict(zip(names_of(data), column(data, "error"), strict=True))
    assert errors.keys() == SHAPES.keys()
    total = wanted = 0.0
    for weight, error in errors.items():
        module = weight.removesuffix(".weight")
        before, after = product(adapter, module), product(small[0], module)
        distance = np.linalg.norm(before - after)
        assert error == pytest.approx(distance / np.linalg.norm(before), rel=1e-4)
        total, wanted = total + distance**2, wanted + np.linalg.norm(before) ** 2
    assert data["subjects"][0]["made"]["error"] == pytest.approx((total / wanted) ** 0.5, rel=1e-4)
    assert "error" in [metric["name"] for metric in data["cells"]["metrics"]]
    shown = text_of(page.read_text())
    assert "How it was made" in shown
    assert "of ‖ΔW‖ lost by resize (rank 1)" in shown


def test_pages_without_a_report_have_no_columns_of_one(adapter: Path, tmp_path: Path) -> None:
    assert run(adapter, "-o", tmp_path / "page.html").exit_code == 0
    data = embedded((tmp_path / "page.html").read_text())
    assert data["subjects"][0]["made"] is None
    assert "error" not in data["columns"]


def test_combined_adapters_show_how_they_agree(adapter: Path, tmp_path: Path) -> None:
    other = adapter_folder(tmp_path / "other", SHAPES, seed=7)
    report = loraformat.combine([adapter, other], tmp_path / "both", rank=2)
    path = saved(report, tmp_path / "report.json")
    loraformat.plot([tmp_path / "both"], tmp_path / "page.html", made_by=[path])
    page = (tmp_path / "page.html").read_text()
    ((first, second, cosine),) = embedded(page)["subjects"][0]["made"]["cosines"]
    one, two = (
        np.concatenate([product(folder, name.removesuffix(".weight")).ravel() for name in sorted(SHAPES)])
        for folder in (adapter, other)
    )
    assert (first, second) == (0, 1)
    assert cosine == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-4)
    shown = text_of(page)
    assert Dom(page).tables["cosines"][1][1:] == ["+1.0000", f"{cosine:+.4f}"]
    assert str(other) in shown


def test_an_extracted_adapter_shows_its_noise(adapter: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    loraformat.merge(base, [adapter], tmp_path / "tuned")
    report = loraformat.extract(base, tmp_path / "tuned", tmp_path / "extracted", rank=2)
    path = saved(report, tmp_path / "report.json")
    loraformat.plot([tmp_path / "extracted"], tmp_path / "page.html", made_by=[path])
    page = (tmp_path / "page.html").read_text()
    assert embedded(page)["subjects"][0]["made"]["floor"] == pytest.approx(report.data.floor, rel=1e-4)
    assert "is rounding of the tuned model" in text_of(page)


def test_several_resizes_of_one_adapter_are_drawn_whole(adapter: Path, tmp_path: Path) -> None:
    """Names that end in numbers are not the steps of a run here."""
    folders = [tmp_path / f"rank-{rank}" for rank in (1, 2)]
    reports = [
        saved(loraformat.resize(adapter, folder, rank=rank), tmp_path / f"{rank}.json")
        for rank, folder in enumerate(folders, 1)
    ]
    loraformat.plot(folders, tmp_path / "page.html", made_by=reports)
    data = embedded((tmp_path / "page.html").read_text())
    assert not data["is_run"]
    assert [subject["made"]["method"] for subject in data["subjects"]] == ["rank 1", "rank 2"]
    assert len(data["others"]) == 1


def test_what_is_not_the_report_of_this_adapter_is_refused(
    adapter: Path, small: tuple[Path, Path], tmp_path: Path
) -> None:
    fewer = saved(loraformat.pick(adapter, tmp_path / "fewer", select=["*q_proj*"]), tmp_path / "fewer.json")
    larger = saved(loraformat.resize(adapter, tmp_path / "larger", rank=2), tmp_path / "larger.json")
    dry = saved(loraformat.resize(adapter, tmp_path / "none", rank=1, dry_run=True), tmp_path / "dry.json")
    looked = saved(loraformat.inspect(adapter), tmp_path / "inspect.json")
    (tmp_path / "cut.json").write_bytes(small[1].read_bytes()[:500])
    (tmp_path / "list.json").write_text("[]")
    wrong = json.loads(small[1].read_text())
    wrong["data"]["weights"][0]["rank"] = "1"
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    for report, text in {
        fewer: "about which the report says nothing",
        larger: "of rank 2 in the report and 1 in the adapter",
        dry: "a dry run",
        looked: "`inspect`, which did not write an adapter",
        tmp_path / "cut.json": "line",
        tmp_path / "list.json": "expected a JSON object",
        tmp_path / "wrong.json": "not a report of loraformat",
        tmp_path / "missing.json": "missing.json",
        small[0]: "expected one JSON file, found a folder",
    }.items():
        done = run(small[0], "--made-by", report, "-o", tmp_path / "page.html")
        assert done.exit_code in (2, 3), (report, done.output)
        assert text in done.output, done.output
        assert not (tmp_path / "page.html").exists()
    done = run(small[0], "--made-by", small[1], "--made-by", small[1], "-o", tmp_path / "page.html")
    assert "1 adapter and 2 reports: expected one --made-by for each adapter" in done.output


@pytest.mark.parametrize("name", ["kohya", "comfy"])
def test_weights_that_a_format_fuses_keep_their_errors(name: str, tmp_path: Path) -> None:
    """The ranks of q, k and v add up in the file."""
    source = FIXTURES / "good" / name / "tiny-flux" / "lora.safetensors"
    report = loraformat.resize(source, tmp_path / "out", rank=1)
    out = next((tmp_path / "out").glob("*.safetensors")) if (tmp_path / "out").is_dir() else tmp_path / "out"
    loraformat.plot([out], tmp_path / "page.html", made_by=[saved(report, tmp_path / "report.json")])
    data = embedded((tmp_path / "page.html").read_text())
    shown = [pair for pair in zip(names_of(data), column(data, "error"), strict=True) if pair[1] is not None]
    wanted = [(each.weight, pytest.approx(each.error, rel=1e-3, abs=1e-6)) for each in report.data.weights]
    assert sorted(shown) == sorted(wanted, key=lambda pair: pair[0])


def test_a_replaced_table_has_no_error_of_the_factors_beside_it(tmp_path: Path) -> None:
    source = FIXTURES / "good" / "peft" / "embedding"
    report = loraformat.resize(source, tmp_path / "out", rank=1)
    loraformat.plot([tmp_path / "out"], tmp_path / "page.html", made_by=[saved(report, tmp_path / "report.json")])
    data = embedded((tmp_path / "page.html").read_text())
    rows = zip(column(data, "rank"), column(data, "error"), column(data, "rank_before"), strict=True)
    for rank, error, before in rows:
        assert (error is None) is (rank is None)
        assert (before is None) is (rank is None)


def test_an_error_that_is_not_finite_is_not_shown_as_none(small: tuple[Path, Path], tmp_path: Path) -> None:
    value = json.loads(small[1].read_text())
    value["data"]["error"] = None
    value["data"]["weights"][0]["error"] = None
    (tmp_path / "unknown.json").write_text(json.dumps(value))
    loraformat.plot([small[0]], tmp_path / "page.html", made_by=[tmp_path / "unknown.json"])
    page = (tmp_path / "page.html").read_text()
    assert "not a finite number" in text_of(page)
    assert "lost by" not in text_of(page)
    assert column(embedded(page), "error").count(None) == 1


def test_figures_refuse_a_report(small: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(small[0], "--made-by", small[1], "-o", tmp_path / "figure.svg")
    assert (done.exit_code, (tmp_path / "figure.svg").exists()) == (2, False)
    assert "--made-by is drawn on pages" in done.output


def test_hostile_text_of_a_report_stays_text(small: tuple[Path, Path], tmp_path: Path) -> None:
    value = json.loads(small[1].read_text())
    nasty = "</script><script>alert(1)</script>{{7*7}}\x1b]0;"
    value["data"]["method"] = nasty
    value["data"]["adapters"] = [[nasty, 1.0]]
    (tmp_path / "nasty.json").write_text(json.dumps(value))
    assert run(small[0], "--made-by", tmp_path / "nasty.json", "-o", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "49" not in text_of(page).split("How it was made")[1][:200]


def test_components_have_a_row_each(tmp_path: Path) -> None:
    source = next(path for path in sorted((FIXTURES / "good" / "kohya").rglob("*.safetensors")))
    loraformat.plot([source], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    rows = {row["component"]: row for row in embedded(page)["subjects"][0]["components"]}
    counts = loraformat.inspect(source).summary.components
    assert {name: row["weights"] for name, row in rows.items()} == dict(counts)
    assert sum(row["parameters"] for row in rows.values()) == loraformat.inspect(source).summary.parameters
    assert [row[:2] for row in Dom(page).tables["components"][1:]] == [
        [name, str(rows[name]["weights"])] for name in rows
    ]
