"""Pages of very many weights: small, and opened by a browser; grids and rows that fold what is too much to draw."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import Dom, needs_chromium, visit

from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.results.plot_data import Picture, Subject
from loraformat.model.results.verbs import InspectResult
from loraformat.model.results.weight_figures import WeightRecord
from loraformat.model.summary import summarize
from loraformat.report.cells import MOST_COLUMNS, Band, grid_of, rows_of
from loraformat.report.page.html import render_page
from loraformat.report.page.svg import spectra


def record(name: str, at: int, **more: object) -> WeightRecord:
    values = tuple((1.2345678 + at % 97) / 1.37**k for k in range(8))
    fields = {
        "kind": "low-rank",
        "shape": (1024 + at % 5, 512),
        "rank": 8 + at % 3,
        "scale": 2.0,
        "parameters": 8 * 1536 + at,
        "dtype": "BF16",
        "norm": 0.123456789 + at / 1000,
        "spectral_norm": values[0],
        "stable_rank": 1.2345 + at % 7 / 10,
        "effective_rank": 5.4321 + at % 11 / 10,
        "rank_90": 5 + at % 3,
        "singular_values": values,
        "base_norm": 12.3456 + at,
        "relative_norm": 0.0123456 + at / 1e6,
        "retained_bf16": 0.98765 - at / 1e6,
        "retained_fp16": 0.99987,
    }
    return WeightRecord(weight=name, **{**fields, **more})


def picture(records: list[WeightRecord]) -> Picture:
    summary = summarize(Adapter(config=AdapterConfig(), updates={}))
    result = InspectResult(weights=tuple(records), layer_norms={0: 1.0}, total_norm=2.0)
    subject = Subject(uri="adapter", label="adapter", step=None, format="peft", summary=summary, result=result)
    return Picture(version="0", base=None, subjects=(subject,))


DENSE = [
    record(f"model.layers.{layer}.self_attn.{kind}_proj.weight", layer * 8 + at)
    for layer in range(2500)
    for at, kind in enumerate("qkvogudx")
]
EXPERTS = [
    record(f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight", expert)
    for layer in range(52)
    for expert in range(129)
    for kind in ("gate", "up", "down")
]


@needs_chromium
@pytest.mark.parametrize(("records", "cells"), [(DENSE, 157 * 8), (EXPERTS, 52 * 3), (DENSE[:448], 56 * 8)])
def test_a_page_stays_below_2_mb_and_opens(tmp_path: Path, records: list[WeightRecord], cells: int) -> None:
    page = render_page(picture(records))
    assert len(page.encode()) < 2_000_000
    (tmp_path / "page.html").write_text(page)
    seen = visit(f"file://{tmp_path / 'page.html'}", tmp_path)
    assert (seen.console, seen.requests) == ([], [])
    assert Dom(seen.dom).root["data-ok"] == str(cells)


def test_twenty_thousand_weights_stay_below_2_mb_each_with_its_figures() -> None:
    page = render_page(picture(DENSE))
    assert len(DENSE) == 20_000
    assert len(page.encode()) < 2_000_000
    assert len(Dom(page).cells) == 157 * 8


def test_long_stacks_are_drawn_in_bins_that_hold_every_layer() -> None:
    grid = grid_of(DENSE)
    assert len(grid.columns) <= MOST_COLUMNS
    assert sorted(number for cell in grid.cells.values() for number in cell.records) == list(range(len(DENSE)))
    assert (grid.columns[0], grid.columns[-1]) == ("0-15", "2496-2499")
    norm = next(metric for metric in grid.metrics if metric.name == "norm")
    assert grid.scale_of(norm).high == max(each.norm for each in DENSE)


def test_a_spectrum_of_one_value_can_be_seen() -> None:
    """At rank 1 a line through the places has no length."""
    (drawn,) = spectra([Band("q_proj", 3, ((1.0, 2.0, 5.0),))])
    (dot,) = re.findall(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    (low, high) = re.findall(r'<path class="line" d="M([\d.]+ [\d.]+)L([\d.]+ [\d.]+)"', drawn)[0]
    assert low != high
    assert float(high.split()[1]) < float(dot[1]) < float(low.split()[1])


def test_folded_experts_keep_the_extremes_and_the_sum() -> None:
    rows = rows_of(EXPERTS)
    assert len(rows) == 52 * 3
    first = [each for each in EXPERTS if ".layers.0." in each.weight and "gate" in each.weight]
    assert (rows[0].record.weight, rows[0].weights) == ("model.layers.0.mlp.experts.*.gate_proj.weight", 129)
    assert rows[0].record.norm == max(each.norm for each in first)
    assert rows[0].record.retained_bf16 == min(each.retained_bf16 for each in first)
    assert rows[0].record.parameters == sum(each.parameters for each in first)


def test_few_experts_stay_single() -> None:
    few = [each for each in EXPERTS if ".experts.3." in each.weight]
    assert [row.record for row in rows_of(few)] == few
