"""Pages and figures of adapters: what is in them, that nothing else is, and what a browser makes of them."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
from browser import Dom, needs_chromium, visit
from click.testing import CliRunner, Result
from merger.checkpoints import adapter_folder, config, save_base, weights
from safetensors.torch import load_file, save_file

from loraformat.cli import main
from loraformat.errors import StorageError, UsageError
from loraformat.jobs.inspect import inspect
from loraformat.jobs.plot import plot
from loraformat.schema import check

FIXTURES = Path(__file__).parents[2] / "fixtures"
SHAPES = {
    f"model.layers.{layer}.{name}.weight": shape
    for layer in range(2)
    for name, shape in {"q_proj": (24, 24), "up_proj": (130, 24), "down_proj": (24, 130)}.items()
}
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}\x1b]0;"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plot", *map(str, arguments)])


def embedded(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="loraformat-data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(found[1])
    assert list(check("plot-data", data)) == []
    return data


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_folder(tmp_path / "adapter", SHAPES)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", weights(), config())


def names_of(data: dict) -> list[str]:
    numbers = [row[1].split(".") if row[1] else [] for row in data["weights"]]
    return [data["names"][row[0]].format(*own) for row, own in zip(data["weights"], numbers, strict=True)]


def column(data: dict, name: str) -> list:
    """The values of a column, those that are the same everywhere included."""
    if name in data["constants"]:
        return [data["constants"][name]] * len(data["weights"])
    at = 2 + [each for each in data["columns"] if each not in data["constants"]].index(name)
    return [row[at] for row in data["weights"]]


def test_the_data_in_the_page_are_those_of_inspect(adapter: Path, base: Path, tmp_path: Path) -> None:
    plot([str(adapter)], str(tmp_path / "a.html"), base=str(base))
    data = embedded((tmp_path / "a.html").read_text())
    records = inspect(str(adapter), base=str(base), spectrum=True).data.weights
    assert names_of(data) == [record.weight for record in records]
    for name in ("norm", "spectral_norm", "effective_rank", "relative_norm", "retained_bf16", "parameters"):
        expected = [getattr(record, name) for record in records]
        assert column(data, name) == pytest.approx(expected, rel=1e-4)
    assert data["spectra"][0] == pytest.approx(records[0].singular_values, rel=1e-4)
    assert sum(data["base_bins"]) == sum(data["update_bins"]) > 0


def test_the_page_has_a_cell_for_each_module_and_layer_and_names_its_policy(adapter: Path, tmp_path: Path) -> None:
    plot([str(adapter)], str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text()
    assert len(Dom(page).cells) == 6
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert not re.search(
        r"""(src|href|action|url)\s*[=(]|style=|\bon\w+=|@import""",
        re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL),
    )


def test_the_same_input_gives_the_same_bytes(adapter: Path, base: Path, tmp_path: Path) -> None:
    pages = []
    for jobs in (1, 3):
        plot([str(adapter)], str(tmp_path / f"{jobs}.html"), base=str(base), jobs=jobs)
        pages.append((tmp_path / f"{jobs}.html").read_bytes())
    assert pages[0] == pages[1]


def checkpoints(folder: Path, *, state: bool) -> list[Path]:
    """Three checkpoints, given out of order, whose update doubles with each."""
    made = []
    for step in (300, 100, 200):
        path = adapter_folder(folder / (f"part-{'abc'[step // 100 - 1]}" if state else f"checkpoint-{step}"), SHAPES)
        tensors = load_file(path / "adapter_model.safetensors")
        for name in tensors:
            if "lora_B" in name:
                tensors[name] *= 2.0 ** (step // 100)
        save_file(tensors, path / "adapter_model.safetensors")
        if state:
            (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
        made.append(path)
    return made


@pytest.mark.parametrize("state", [True, False])
def test_checkpoints_of_a_run_are_drawn_by_step(tmp_path: Path, state: bool) -> None:
    paths = checkpoints(tmp_path, state=state)
    report = plot([str(path) for path in paths], str(tmp_path / "run.html"))
    assert report.data.steps == (100, 200, 300)
    data = embedded((tmp_path / "run.html").read_text())
    assert data["is_run"]
    norms = [subject["norm"] for subject in data["subjects"]]
    assert norms == pytest.approx([norms[0], 2 * norms[0], 4 * norms[0]], rel=1e-3)
    assert [subject["cosine_to_last"] for subject in data["subjects"]] == pytest.approx([1, 1, 1])
    cells = Dom((tmp_path / "run.html").read_text()).cells
    assert len(cells) == 6 + 3 * 2


def test_adapters_of_other_weights_are_no_run(tmp_path: Path) -> None:
    one = adapter_folder(tmp_path / "checkpoint-1", SHAPES)
    two = adapter_folder(tmp_path / "checkpoint-2", {"model.layers.0.q_proj.weight": (24, 24)})
    report = plot([str(one), str(two)], str(tmp_path / "a.html"))
    assert report.data.steps == ()
    assert not embedded((tmp_path / "a.html").read_text())["is_run"]


def trained(folder: Path, *, without: str = "", untrained: str = "") -> Path:
    """An adapter of two layers, without one of its modules, and with one whose lora_B is zero."""
    path = adapter_folder(folder, {name: shape for name, shape in SHAPES.items() if not without or without not in name})
    tensors = load_file(path / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if untrained and untrained in name and "lora_B" in name:
            tensors[name] = tensor * 0
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def test_two_adapters_keep_the_findings_tables_and_spectra_of_each(tmp_path: Path, base: Path) -> None:
    one = trained(tmp_path / "one", untrained="layers.1.q_proj")
    two = trained(tmp_path / "two", without="layers.0.up_proj")
    report = plot([str(one), str(two)], str(tmp_path / "a.html"), base=str(base))
    page = (tmp_path / "a.html").read_text()
    data = embedded(page)
    (other,) = data["others"]
    for view, path in ((other, one), (data, two)):
        alone = inspect(str(path), base=str(base), spectrum=True)
        assert names_of(view) == [record.weight for record in alone.data.weights]
        assert column(view, "norm") == pytest.approx([record.norm for record in alone.data.weights], rel=1e-4)
        relative = [record.relative_norm for record in alone.data.weights]
        assert column(view, "relative_norm") == pytest.approx(relative, rel=1e-4)
        values = [record.singular_values for record in alone.data.weights]
        assert view["spectra"] == [pytest.approx(each, rel=1e-4) for each in values]
        assert sum(view["base_bins"]) > 0
        told = {(f"{path}: {each.where}", each.code) for each in alone.findings}
        assert told <= {(each.where, each.code) for each in report.findings}
        assert len(told) > 0
    dom = Dom(page)
    assert [row[0] for row in dom.tables["findings"][1:]].count("one") > 0
    assert [row[0] for row in dom.tables["findings"][1:]].count("two") > 0
    assert {"modules", "modules-1", "weights", "weights-1"} <= dom.tables.keys()
    assert page.count('id="spectra') == page.count('id="heat') == 2


def test_the_findings_about_every_checkpoint_of_a_run_are_told(tmp_path: Path) -> None:
    paths = [trained(tmp_path / f"checkpoint-{step}", untrained="layers.0.q_proj" * (step == 1)) for step in (1, 2)]
    report = plot([str(path) for path in paths], str(tmp_path / "run.html"))
    assert report.data.steps == (1, 2)
    assert [each.where for each in report.findings if each.code == "LF401"] == [
        f"{paths[0]}: model.layers.0.q_proj.weight"
    ]
    assert "LF401" in (tmp_path / "run.html").read_text()


def test_steps_of_adapters_that_are_no_run_are_drawn_whole(tmp_path: Path) -> None:
    paths = [trained(tmp_path / "checkpoint-1"), trained(tmp_path / "checkpoint-2", without="layers.0.up_proj")]
    plot([str(path) for path in paths], str(tmp_path / "a.html"))
    (other,) = embedded((tmp_path / "a.html").read_text())["others"]
    assert len(other["weights"]) == len(other["spectra"]) == 6


def test_an_untrained_weight_looks_different_from_an_absent_one_in_the_page(tmp_path: Path) -> None:
    path = trained(tmp_path / "a", without="layers.0.up_proj", untrained="layers.1.q_proj")
    plot([str(path)], str(tmp_path / "a.html"))
    dom = Dom((tmp_path / "a.html").read_text())
    assert len(dom.cells) == 5
    assert [cell["class"] for cell in dom.cells].count("c zero") == 1
    assert "untrained: the update is zero" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize("form", ["svg", "png", "pdf"])
def test_an_untrained_weight_looks_different_from_an_absent_one_in_a_figure(tmp_path: Path, form: str) -> None:
    made = []
    for number, given in enumerate(({"untrained": "layers.1.q_proj"}, {"without": "layers.1.q_proj"})):
        (tmp_path / str(number)).mkdir()
        path = trained(tmp_path / str(number) / "a", **given)
        out = tmp_path / f"{number}.{form}"
        report = plot([str(path)], str(out))
        assert report.data.form == form
        made.append(out.read_bytes())
    assert ["∅".encode() in data for data in made] == ([True, False] if form == "svg" else [False, False])
    if form == "png":
        # The cell in the middle row and right column: hatched on grey, or the white of the paper.
        from matplotlib.image import imread

        pictures = [imread(tmp_path / f"{number}.png") for number in range(2)]
        greys = [int(((abs(each[..., :3] - 0.96) < 0.01).all(axis=2)).sum()) for each in pictures]
        assert greys[0] > 1000 > greys[1]


@pytest.mark.parametrize("form", ["svg", "png", "pdf"])
def test_a_figure_of_two_adapters_draws_both(tmp_path: Path, form: str) -> None:
    one, two = (
        trained(tmp_path / "first", untrained="layers.1.q_proj"),
        trained(tmp_path / "second", untrained="layers"),
    )
    plot([str(one), str(two)], str(tmp_path / f"a.{form}"))
    plot([str(two)], str(tmp_path / f"b.{form}"))
    both, alone = ((tmp_path / f"{name}.{form}").read_bytes() for name in "ab")
    assert len(both) > 1.3 * len(alone)
    if form == "svg":
        text = both.decode()
        assert "first" in text
        assert "second" in text
        assert "1 warning: LF401" in text
        assert "6 warnings: LF401" in text
        assert "all singular values are zero" in text


@pytest.mark.filterwarnings("error")
def test_a_figure_shows_names_that_its_font_or_matplotlib_would_leave_out(tmp_path: Path) -> None:
    names = ("_hidden", "\u6a21", "$x^2$", "$\\frac{$y$")
    path = adapter_folder(tmp_path / "a", {f"model.layers.0.{name}.weight": (24, 24) for name in names})
    plot([str(path)], str(tmp_path / "a.svg"))
    text = (tmp_path / "a.svg").read_text()
    for shown in ("_hidden", "\\u6a21", "$x^2$", "$\\frac{$y$"):
        assert text.count(f">{shown}<") + text.count(f"> {shown}<") == 2, shown  # beside the map, and in the legend


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_margin_of_the_heat_map_has_the_median_of_the_table(tmp_path: Path, count: int) -> None:
    """Of an even number the mean of both in the middle, untrained weights included, as in every other place."""
    shapes = {f"model.layers.{layer}.q_proj.weight": (24, 24) for layer in range(count)}
    path = adapter_folder(tmp_path / "a", shapes)
    plot([str(path)], str(tmp_path / "a.html"))
    norms = sorted(record.norm for record in inspect(str(path), norms=True).data.weights)
    median = (norms[(count - 1) // 2] + norms[count // 2]) / 2
    page = (tmp_path / "a.html").read_text()
    head, row = Dom(page).tables["modules"]
    assert row[head.index("‖ΔW‖ median")] == f"{median:.4g}"
    margin = f"{median:.4g} · {norms[-1]:.4g}"
    assert re.findall(r'<text class="margin"[^>]*>([^<]*)<', page) == [margin]
    assert embedded(page)["cells"]["margins"]["norm"] == [margin]


@needs_chromium
def test_a_browser_draws_every_adapter_and_the_margins_of_the_tables(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", without="layers.0.up_proj", untrained="layers.1.q_proj")
    two = trained(tmp_path / "two", untrained="layers")
    plot([str(one), str(two)], str(tmp_path / "a.html"))
    before = (tmp_path / "a.html").read_text()
    seen = visit(f"file://{tmp_path / 'a.html'}", tmp_path)
    dom = Dom(seen.dom)
    assert seen.console == []
    assert len(dom.tables["weights"]) == 1 + 6
    assert len(dom.tables["weights-1"]) == 1 + 5
    shown = [cell["class"] for cell in dom.cells]
    assert shown == [cell["class"] for cell in Dom(before).cells]
    assert shown.count("c zero") == 1 + 6 + 2
    margins = re.compile(r'<text class="margin"[^>]*>([^<]*)<')
    assert margins.findall(seen.dom) == margins.findall(before)


def test_hostile_text_is_shown_and_not_run(tmp_path: Path, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": NASTY, "task_type": NASTY}))
    plot([str(adapter)], str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text()
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "49" not in re.findall(r"onerror=alert\(1\)&gt;(.{0,10})", page)
    assert "\x1b" not in page
    assert "{{7*7}}" in page


def many_experts(folder: Path, layers: int, experts: int) -> Path:
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": (6, 6)
        for layer in range(layers)
        for expert in range(experts)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return adapter_folder(folder, shapes, rank=1)


def test_experts_by_the_hundred_are_folded(tmp_path: Path) -> None:
    plot([str(many_experts(tmp_path / "moe", 3, 40))], str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text()
    data = embedded(page)
    assert len(Dom(page).cells) == 9
    assert len(data["weights"]) == 9
    assert set(column(data, "weights")) == {40}
    records = inspect(str(tmp_path / "moe"), norms=True).data.weights
    largest = max(r.norm for r in records if re.match(r"model\.layers\.0\..*\.down_proj", r.weight))
    at = names_of(data).index("model.layers.0.mlp.experts.*.down_proj.weight")
    assert column(data, "norm")[at] == pytest.approx(largest, rel=1e-4)


@needs_chromium
def test_a_browser_runs_the_page_without_an_error_and_asks_for_nothing(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    plot([str(adapter)], str(tmp_path / "a.html"), base=str(base))
    seen = visit(f"file://{tmp_path / 'a.html'}#sort=norm&metric=effective_rank&cell=2", tmp_path)
    dom = Dom(seen.dom)
    assert seen.console == []
    assert seen.requests == []
    assert dom.root["data-ok"] == str(len(dom.cells)) == "6"
    head, *rows = dom.tables["weights"]
    assert dom.sorted_by == "norm descending"
    norms = [float(row[head.index("‖ΔW‖")]) for row in rows]
    assert norms == sorted(norms, reverse=True)
    assert len(rows) == 6
    expected = {record.weight: record.norm for record in inspect(str(adapter), norms=True).data.weights}
    assert dict(zip([row[0] for row in rows], norms, strict=True)) == pytest.approx(expected, rel=1e-3)
    assert "linear scale" in dom.texts["legend"]
    assert sum("chosen" in cell["class"] for cell in dom.cells) == 1


@needs_chromium
def test_a_browser_refuses_what_the_policy_forbids(tmp_path: Path, adapter: Path) -> None:
    """The policy is at work: a script and an image that are put in afterwards neither run nor load."""
    plot([str(adapter)], str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text()
    evil = '<script>document.documentElement.dataset.evil="1"</script><img src="https://example.com/x.png">'
    (tmp_path / "evil.html").write_text(page.replace("</main>", f"{evil}</main>"))
    seen = visit(f"file://{tmp_path / 'evil.html'}", tmp_path)
    assert "data-evil" not in Dom(seen.dom).root
    assert seen.requests == []
    assert any("Content Security Policy" in line for line in seen.console)


@pytest.mark.parametrize("form", ["svg", "png", "pdf"])
def test_figures_for_papers_are_the_same_bytes_every_time(tmp_path: Path, adapter: Path, form: str) -> None:
    heads = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
    made = []
    for number in range(2):
        out = tmp_path / f"{number}.{form}"
        plot([str(adapter)], str(out))
        made.append(out.read_bytes())
    assert made[0] == made[1]
    assert made[0].startswith(heads[form])


def test_without_a_scale_the_page_says_what_is_missing(tmp_path: Path) -> None:
    plot([str(FIXTURES / "minigpt" / "lora_adapter")], str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text()
    assert "LF206" in page
    assert not Dom(page).cells


def test_existing_files_are_kept_and_the_ending_tells_the_form(tmp_path: Path, adapter: Path) -> None:
    out = tmp_path / "a.html"
    out.write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        plot([str(adapter)], str(out))
    assert out.read_text() == "mine"
    plot([str(adapter)], str(out), overwrite=True)
    assert out.read_text().startswith("<!doctype html>")
    with pytest.raises(UsageError, match=r"\.html"):
        plot([str(adapter)], str(tmp_path / "a.docx"))


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    result = run(tmp_path / "nothing", "-o", tmp_path / "a.html")
    assert result.exit_code == 3
    assert list(tmp_path.iterdir()) == []
    assert run(FIXTURES / "minigpt" / "fact_all", "-o", tmp_path / "no" / "a.html").exit_code == 3


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_command_tells_what_it_wrote(tmp_path: Path, adapter: Path, form: str) -> None:
    result = run(adapter, "-o", tmp_path / "a.html", "--format", form)
    assert result.exit_code == 0
    if form == "json":
        report = json.loads(result.stdout)
        assert list(check("report", report)) == []
        assert report["data"]["nbytes"] == (tmp_path / "a.html").stat().st_size
    else:
        assert "self-contained" in result.stdout


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_picture_is_as_private_as_its_adapter(adapter: Path, tmp_path: Path, mode: int) -> None:
    for file in adapter.iterdir():
        file.chmod(mode)
    adapter.chmod(0o755)
    before = os.umask(0o022)
    try:
        plot([str(adapter)], str(tmp_path / "out.html"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.html").stat().st_mode) == mode
