"""What people do with a page: read it on paper and on a phone, go through it by keyboard, take its figures away."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Dom, needs_chromium, opened
from report.page.test_page import picture, record

from loraformat.diagnostics import Finding, FindingLocation, Severity
from loraformat.report.cells import Scale, grid_of, scale_of
from loraformat.report.page.html import render_page

NAMES = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(8) for kind in "kqv"]
RECORDS = [record(name, at) for at, name in enumerate(NAMES)]


def written(folder: Path, text: str) -> str:
    (folder / "page.html").write_text(text)
    return f"file://{folder / 'page.html'}"


@needs_chromium
def test_the_filtered_rows_come_as_csv_with_every_digit(tmp_path: Path) -> None:
    names = [*NAMES, '=HYPERLINK("x").weight']
    page = render_page(picture([record(name, at) for at, name in enumerate(names)]))
    with opened(f"{written(tmp_path, page)}#sort=norm", tmp_path) as tab:
        tab.run("document.getElementById('csv').click()")
        while not any(event.get("params", {}).get("state") == "completed" for event in tab.events):
            tab.events.append(tab._next())
        (saved,) = tmp_path.glob("*.csv")
        rows = list(csv.DictReader(saved.read_text().splitlines()))
        assert [row["weight"] for row in rows] == ["'" + names[-1], *reversed(NAMES)]  # largest norm first
        wanted = {name: record(name, at) for at, name in enumerate(names)}
        for row in rows:
            own = wanted[row["weight"].removeprefix("'")]
            assert float(row["norm"]) == pytest.approx(own.norm, rel=1e-4)
            assert (int(row["rank"]), int(row["parameters"])) == (own.rank, own.parameters)
        tab.run("document.getElementById('filter').value = 'layers.3.'")
        tab.run("document.getElementById('filter').dispatchEvent(new Event('input'))")
        tab.run("document.addEventListener('copy', () => { window.taken = document.getSelection().toString(); })")
        tab.run("navigator.clipboard.writeText = async (text) => { window.taken = text; }")
        tab.run("document.getElementById('copy').click()")
        copied = tab.run("window.taken").splitlines()
        assert len(copied) == 1 + 3
        assert all("layers.3." in line for line in copied[1:])
        assert tab.run("document.getElementById('said').textContent") == "copied"


@needs_chromium
def test_cells_are_reached_and_chosen_by_keyboard(tmp_path: Path) -> None:
    focused = "document.activeElement.getAttribute('aria-label')"
    with opened(written(tmp_path, render_page(picture(RECORDS))), tmp_path) as tab:
        assert tab.run("document.querySelectorAll('#heat g.c[tabindex=\"0\"]').length") == 1
        tab.run("document.getElementById('metric').focus()")
        tab.press("Tab")
        assert tab.run(focused).startswith("model.layers.0.self_attn.k_proj.weight, layer 0")
        tab.press("ArrowRight")
        tab.press("ArrowDown")
        assert tab.run(focused).startswith("model.layers.1.self_attn.q_proj.weight, layer 1")
        tab.press("ArrowLeft")
        tab.press("ArrowLeft")  # there is no cell to the left of the first
        assert tab.run(focused).startswith("model.layers.0.self_attn.q_proj.weight, layer 0")
        tab.press("Enter")
        assert NAMES[1] in tab.run("document.getElementById('detail').textContent")
        assert tab.run("document.querySelectorAll('#heat g.chosen').length") == 1


@needs_chromium
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_shows_the_page_without_scrolling_sideways(tmp_path: Path, is_dark: bool) -> None:
    with opened(written(tmp_path, render_page(picture(RECORDS))), tmp_path, width=360, is_dark=is_dark) as tab:
        assert tab.run("document.documentElement.scrollWidth") == 360


@needs_chromium
def test_paper_has_no_buttons_and_no_dark_ground(tmp_path: Path) -> None:
    style = "getComputedStyle(document.body).backgroundColor"
    with opened(written(tmp_path, render_page(picture(RECORDS))), tmp_path, is_dark=True) as tab:
        assert tab.run(style) != "rgb(255, 255, 255)"
        tab.ask("Emulation.setEmulatedMedia", media="print", features=[])
        assert tab.run(style) == "rgb(255, 255, 255)"
        shown = "[...document.querySelectorAll('.tools button, input, select')].filter((e) => e.offsetWidth).length"
        assert tab.run(shown) == 0


@needs_chromium
def test_the_scale_of_another_metric_is_that_of_its_cells(tmp_path: Path) -> None:
    grid = grid_of(RECORDS)
    metric = next(one for one in grid.metrics if one.name == "effective_rank")
    with opened(f"{written(tmp_path, render_page(picture(RECORDS)))}#metric=effective_rank", tmp_path) as tab:
        drawn = tab.run("[...document.querySelectorAll('#heat g.c')].map((e) => e.getAttribute('class').split(' ')[1])")
    scale = grid.scale_of(metric)
    steps = [metric.step(cell.values["effective_rank"], scale.low, scale.high) for cell in grid.cells.values()]
    assert drawn == [f"q{step}" for step in steps]


def test_one_weight_far_from_all_others_leaves_them_their_colors() -> None:
    wild = [*RECORDS[:-1], replace(RECORDS[-1], norm=1e6)]
    for records in (RECORDS, wild):
        grid = grid_of(records)
        metric = next(one for one in grid.metrics if one.name == "norm")
        scale = grid.scale_of(metric)
        assert scale.largest == max(each.norm or 0.0 for each in records)
        used = {metric.step(cell.values["norm"], scale.low, scale.high) for cell in grid.cells.values()}
        assert len(used) >= 9
    page = render_page(picture(wild))
    assert "and more, up to 1e+06" in Dom(page).texts["legend"]


def test_scales_of_few_and_equal_values_keep_their_ends() -> None:
    assert scale_of([], is_log=True) == Scale()
    assert scale_of([2.0], is_log=True) == Scale(2.0, 2.0, 2.0, 2.0)
    assert scale_of([2.0, 2.0, 2.0, 2.0, 50.0], is_log=False) == Scale(2.0, 50.0, 2.0, 50.0)
    assert scale_of([1.0, 1000.0], is_log=True) == Scale(1.0, 1000.0, 1.0, 1000.0)


def test_every_finding_is_in_the_page_those_behind_the_first_hundred_folded() -> None:
    kind = {"code": "LF404", "name": "x", "severity": Severity.WARNING, "location": FindingLocation(tensor="w")}
    found = tuple(Finding(**kind, message=f"m{number}.") for number in range(130))
    shown = picture(RECORDS)
    page = render_page(replace(shown, subjects=(replace(shown.subjects[0], findings=found),)))
    assert all(f"<td>m{n}.</td>" in page for n in range(130))
    assert page.index("<summary>30 more") < page.index("<td>m100.</td>")


def test_the_title_is_the_name_of_the_adapter() -> None:
    shown = picture(RECORDS)
    subject = replace(shown.subjects[0], uri="some/where/my-adapter", label="my-adapter")
    page = render_page(replace(shown, subjects=(subject,)))
    assert "<title>my-adapter · loraformat</title>" in page
    assert "<h1>my-adapter</h1>" in page
    assert "<p>some/where/my-adapter, peft" in page
    assert json.dumps("some/where/my-adapter") in page
