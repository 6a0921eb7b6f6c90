"""Tables of weights at every width, the heat rows, and outliers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from loraformat.cli.commands.inspect import SORT_KEYS as OFFERED
from loraformat.jobs.measure.figures import SORT_KEYS, sorted_by
from loraformat.model.results.verbs import InspectResult
from loraformat.model.results.weight_figures import WeightRecord
from loraformat.report.cells import NO_LAYER, grid_of
from loraformat.report.lines import Page, columns_of
from loraformat.report.weights import RAMP, say_heat, say_weights


def records(layers: int = 4, **more: object) -> tuple[WeightRecord, ...]:
    return tuple(
        WeightRecord(
            weight=f"model.layers.{layer}.self_attn.{kind}_proj.weight",
            kind="low-rank",
            shape=(4096, 4096),
            rank=16,
            scale=2.0,
            parameters=131_072,
            dtype="BF16",
            **{"norm": 2.0 ** (layer - (kind == "v")), **more},
        )
        for layer in range(layers)
        for kind in "qv"
    )


FULL = {
    "spectral_norm": 1.0,
    "stable_rank": 2.0,
    "effective_rank": 11.5,
    "relative_norm": 0.02,
    "retained_bf16": 0.93,
    "retained_fp16": 1.0,
}


def said(result: InspectResult, width: int | None = None) -> list[str]:
    page = Page(width)
    say_weights(page, result)
    return ["".join(piece.text for piece in line) for line in page.lines]


def result(weights: tuple[WeightRecord, ...], **more: object) -> InspectResult:
    return InspectResult(weights=weights, layer_norms={}, **more)


@pytest.mark.parametrize("group", ["module", "layer", "none"])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_every_table_fits_the_terminal_and_names_what_it_leaves_out(group: str, width: int) -> None:
    lines = said(result(records(40, **FULL), grouping=group, has_heat=True), width)
    assert all(columns_of(line) <= width for line in lines), [line for line in lines if columns_of(line) > width]
    whole = said(result(records(40, **FULL), grouping=group))
    missing = set(whole[0].split()) - set(lines[0].split())
    at = next((number for number, line in enumerate(lines) if "not shown for lack of width" in line), None)
    told = "" if at is None else " ".join(lines[at : at + 2])
    assert all(name in told for name in missing)
    assert bool(missing) == bool(told)


@pytest.mark.parametrize("width", [64, 80, 200])
def test_names_that_are_cut_can_still_be_told_apart(width: int) -> None:
    lines = said(result(records(12, **FULL), grouping="none"), width)
    names = [line.split()[0] for line in lines[1:25]]
    assert len(set(names)) == 24


def test_a_fact_is_broken_between_words_under_itself() -> None:
    page = Page(40)
    words = [f"word{number}" for number in range(12)]
    page.fact("targets", ", ".join(words))
    lines = ["".join(piece.text for piece in line) for line in page.lines]
    assert all(columns_of(line) <= 40 and line == line.rstrip() for line in lines)
    assert [line[:13] for line in lines] == ["  targets    ", *[" " * 13] * (len(lines) - 1)]
    assert " ".join(line[13:] for line in lines) == ", ".join(words)


def test_weights_are_grouped_by_module_where_they_are_many() -> None:
    few, many = (said(result(records(layers))) for layers in (4, 40))
    assert len(few) == 9
    assert [line.split()[0] for line in many] == ["module", "q_proj", "v_proj"]
    assert "0-39" in many[1]
    assert many[1].split()[-2:] == [f"{2.0**39:.4g}", "(39)"]


def test_layers_are_summed_up_in_order() -> None:
    lines = said(result(records(12), grouping="layer"))
    assert [line.split()[0] for line in lines] == ["layer", *map(str, range(12))]


UNET = {
    "te1 0": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight",
    "IN04": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "MID": "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "OUT05": "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q.weight",
    "": "unet.conv_in.weight",
}


def of_unet(**more: object) -> tuple[WeightRecord, ...]:
    first = records(1, **more)[0]
    return tuple(
        replace(first, weight=weight, block=block, norm=2.0**at) for at, (block, weight) in enumerate(UNET.items())
    )


def test_blocks_of_an_image_model_are_lines_and_columns_in_the_order_of_the_model() -> None:
    lines = [line.strip() for line in said(result(of_unet()[::-1], grouping="block", has_heat=True))]
    assert [line[: line.index("  ")] for line in lines[1:6]] == ["te1 0", "IN04", "MID", "OUT05", "none"]
    head = next(line for line in lines if line.startswith("block") and "weights" not in line)
    assert head.split() == ["block", "te1", "0", "IN04", "MID", "OUT05"]
    to_q = next(line for line in lines if line.startswith("to_q"))
    assert to_q[head.index("te1")] == " "  # the text encoder has none
    signs = [RAMP.index(to_q[head.index(block)]) for block in ("IN04", "MID", "OUT05")]
    assert len(to_q.split("to_q")[1].split()) == 3
    assert signs == sorted(signs)


def test_blocks_of_another_model_are_its_layers() -> None:
    lines = said(result(records(12), grouping="block"))
    assert [line.split()[0] for line in lines] == ["block", *map(str, range(12))]


def test_the_grid_of_an_image_model_has_its_blocks_as_columns() -> None:
    grid = grid_of(of_unet()[::-1])
    assert grid.columns == ("te1 0", "IN04", "MID", "OUT05", NO_LAYER)
    assert grid.word == "block"
    assert {grid.columns[column] for row, column in grid.cells if grid.rows[row] == "to_q"} == {"IN04", "MID", "OUT05"}
    assert grid_of(records(3)).word == "layer"


def test_an_outlier_is_marked_without_color_and_explained() -> None:
    lines = said(result(records(6, is_outlier=True)))
    assert all(" !" in line for line in lines[1:13])
    assert "outlier" in lines[-1]


def test_heat_rises_with_the_norm_and_shows_gaps() -> None:
    page = Page(None)
    odd = [record for record in records(9) if "layers.4" not in record.weight or "v_proj" in record.weight]
    say_heat(page, odd)
    lines = ["".join(piece.text for piece in line) for line in page.lines]
    q_row = next(line for line in lines if "q_proj" in line)[-9:]
    assert q_row[4] == " "
    signs = [RAMP.index(sign) for sign in q_row if sign != " "]
    assert signs == sorted(signs)
    assert q_row[-1] == RAMP[-1]
    assert f" {RAMP} " in lines[-1]  # every sign, in order
    assert "log scale" in lines[-1]


def test_heat_of_more_layers_than_columns_takes_the_largest_of_each_bin() -> None:
    page = Page(40)
    say_heat(page, records(126))
    lines = ["".join(piece.text for piece in line) for line in page.lines]
    assert all(columns_of(line) <= 40 for line in lines)
    assert "layers per character" in " ".join(lines)


def test_heat_tells_the_untrained_the_unknown_and_the_absent_apart() -> None:
    changes = {1: {"norm": 0.0}, 2: {"norm": None}}
    some = [
        replace(record, **changes.get(layer, {}) if "q_proj" in record.weight else {})
        for record in records(5)
        for layer in [int(record.weight.split(".")[2])]
        if layer != 3 or "v_proj" in record.weight
    ]
    page = Page(None)
    say_heat(page, some)
    lines = ["".join(piece.text for piece in line) for line in page.lines]
    q_row = next(line for line in lines if "q_proj" in line)[-5:]
    assert q_row[1:4] == "0? "
    assert q_row[0] in RAMP
    assert q_row[4] in RAMP
    assert "0 untrained   ? unknown" in lines[-1]


def test_heat_of_an_adapter_that_was_never_trained_is_no_heat() -> None:
    page = Page(None)
    say_heat(page, records(3, norm=0.0))
    lines = ["".join(piece.text for piece in line) for line in page.lines]
    assert [line.split()[-1] for line in lines if "_proj" in line] == ["000", "000"]
    assert "0 untrained" in lines[-1]
    assert not set(RAMP[1:]) & set(lines[-1].replace("log scale", ""))


def test_heat_without_norms_says_so() -> None:
    page = Page(None)
    say_heat(page, records(2, norm=None))
    assert "no heat" in page.lines[0][0].text


def test_orders_put_what_matters_first_and_the_unknown_last() -> None:
    some = (*records(3), *records(1, norm=None), *records(1, norm=math.nan))
    norms = [record.norm for record in sorted_by(some[:-2], "norm")]
    assert norms == [*sorted((n for n in norms if n is not None), reverse=True), None, None]
    assert sorted_by(some, "weight") == some
    kept = tuple(records(1, retained_bf16=share)[0] for share in (0.9, 0.5, None, 0.7))
    assert [record.retained_bf16 for record in sorted_by(kept, "retained_bf16")] == [0.5, 0.7, 0.9, None]


def test_the_orders_offered_are_those_there_are() -> None:
    assert OFFERED == SORT_KEYS
