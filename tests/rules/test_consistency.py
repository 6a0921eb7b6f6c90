"""Rules that hold the config against the tensors."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from rules.subjects import hits, pair, zeros
from safetensors.torch import load_file, save_file

from loraformat.diagnostics import Severity
from loraformat.jobs.validate import validate
from loraformat.model.updates import Hadamard, Replace
from loraformat.rules import consistency

TWO = {"model.layers.0.attn.q_proj.weight": pair(), "model.layers.0.attn.v_proj.weight": pair()}


@pytest.mark.parametrize(("declared", "told"), [(2, []), (3, ["found 2"]), (None, [])])
def test_a_rank_that_is_not_the_declared_one(declared: int | None, told: list[str]) -> None:
    ranks = {} if declared is None else {"a.weight": declared}
    found = hits(consistency.rank_against_config, {"a.weight": pair(9, 9)}, declared_ranks=ranks)
    assert [hit.message.rpartition(", ")[2] for hit in found] == told
    assert [hit.where for hit in found] == ["a.weight"] * len(told)


def test_a_rank_is_told_of_each_weight() -> None:
    ranks = {"a.weight": 3, "b.weight": 3}
    found = hits(consistency.rank_against_config, {name: pair(9, 9) for name in ranks}, declared_ranks=ranks)
    assert [hit.where for hit in found] == ["a.weight", "b.weight"]


def test_a_scale_that_nobody_states() -> None:
    product = Hadamard(zeros(4, 2), zeros(2, 4), zeros(4, 2), zeros(2, 4), None)
    updates = {"a.weight": pair(scale=None), "b.weight": product, "c.weight": pair(), "d.weight": Replace(zeros(4, 4))}
    (found,) = hits(consistency.missing_scale, updates)
    assert found.message == "alpha is not stated, so the scale is unknown: 2 weights, first a.weight"
    assert found.hint == "pass it with --alpha A"
    assert hits(consistency.missing_scale, {"c.weight": pair(), "d.weight": Replace(zeros(4, 4))}) == []


@pytest.mark.parametrize(
    ("targets", "missed"),
    [
        (("q_proj", "v_proj"), []),
        (("q_proj", "k_proj", "k_proj"), ["k_proj"]),
        (("attn.q_proj", "0.attn.v_proj"), []),
        (("model.layers.0.attn.q_proj",), []),
        (("1.attn.q_proj", "q_proj"), ["1.attn.q_proj"]),
        (("proj",), ["proj"]),  # a name, not the end of one
        (("attn",), ["attn"]),
        (("all-linear",), []),
        (("All-Linear",), []),
        ("k_proj", []),  # a pattern
        (None, []),
    ],
)
def test_targets_without_tensors(targets: Any, missed: list[str]) -> None:
    found = hits(consistency.target_without_tensors, dict(TWO), targets=targets)
    assert [hit.message for hit in found] == [f'no tensor adapts "{name}"' for name in missed]
    assert hits(consistency.target_without_tensors, {}, targets=targets) == []


@pytest.mark.parametrize(
    ("targets", "raw", "outside"),
    [
        (("q_proj", "v_proj"), {}, None),
        (("q_proj",), {}, "model.layers.0.attn.v_proj.weight"),
        (("attn.q_proj", "attn.v_proj"), {}, None),
        (("model.layers.0.attn.q_proj", "v_proj"), {}, None),
        (("proj",), {}, "2 weights, first model.layers.0.attn.q_proj.weight"),
        ((), {}, "2 weights, first model.layers.0.attn.q_proj.weight"),
        (("all-linear",), {}, None),
        ("all-linear", {}, None),
        (r".*\.(q|v)_proj", {}, None),
        (r".*\.q_proj", {}, "model.layers.0.attn.v_proj.weight"),
        (None, {}, None),
        (("q_proj",), {"target_parameters": ["attn.v_proj.weight"]}, None),
        (("q_proj",), {"target_parameters": ["attn.v_proj"]}, None),
        (("q_proj",), {"target_parameters": ["attn.k_proj.weight"]}, "model.layers.0.attn.v_proj.weight"),
    ],
)
def test_tensors_outside_the_targets(targets: Any, raw: dict[str, Any], outside: str | None) -> None:
    whole = Replace(zeros(4, 4))  # a weight outside the target modules is not missed
    found = hits(consistency.tensor_outside_targets, {**TWO, "model.norm.weight": whole}, targets=targets, raw=raw)
    assert [hit.message for hit in found] == ([f"target_modules does not cover {outside}"] if outside else [])


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_keys_of_patterns_that_match_no_module(field: str) -> None:
    patterns = {"attn.q_proj": 4, "k_proj": 4, r"^model\.layers\.0\.attn\.v_proj": 4, "(?=x)y": 4}
    found = hits(consistency.pattern_without_match, dict(TWO), raw={field: patterns})
    assert [(str(hit.location), hit.message) for hit in found] == [
        (f'adapter_config.json: {field}["k_proj"]', "matches no module")
    ]


@pytest.mark.parametrize(
    ("scale", "is_told"),
    [(0.0, True), (-1.0, True), (math.inf, True), (math.nan, True), (1e-9, False), (2.0, False), (None, False)],
)
def test_a_scale_that_is_hardly_meant(scale: float | None, is_told: bool) -> None:
    found = hits(consistency.unusual_scale, {"b.weight": pair(scale=scale), "a.weight": pair(), "c.weight": pair()})
    told = f"expected a positive scale, found {scale:g} for b.weight" if is_told else ""
    assert [hit.message for hit in found] == ([told] if is_told else [])


@pytest.mark.parametrize(
    ("targets", "raw", "unread"),
    [
        (r"(.*)\1_proj", {}, [r"(.*)\1_proj"]),
        (r".*_proj", {}, []),
        (("(?=x)",), {}, []),  # a list holds names
        ("all-linear", {}, []),
        (None, {"rank_pattern": {"(?=x)y": 1, "q": 2}, "alpha_pattern": {"(?!x)y": 1}}, ["(?=x)y", "(?!x)y"]),
    ],
)
def test_patterns_that_are_not_evaluated(targets: Any, raw: dict[str, Any], unread: list[str]) -> None:
    found = hits(consistency.pattern_not_evaluated, dict(TWO), targets=targets, raw=raw)
    assert [hit.message for hit in found] == [f'pattern not evaluated: "{pattern}"' for pattern in unread]


def test_names_are_the_ends_of_paths_from_a_dot_on() -> None:
    path = "model.layers.0.q_proj"
    for name in ("q_proj", "0.q_proj", path):
        assert consistency.is_one_of(path, {name})
    for name in ("proj", "layers.0", "", "k_proj", "xmodel.layers.0.q_proj"):
        assert not consistency.is_one_of(path, {name})


def test_a_factor_without_its_partner_is_not_reported_twice(tmp_path: Path) -> None:
    """LF201 says what is wrong with it; LF210 remains for the others of the same module."""
    source = Path(__file__).parents[2] / "fixtures" / "bad" / "LF201-unpaired-factor" / "adapter"
    folder = shutil.copytree(source, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    half = next(name for name in tensors if "q_proj.lora_A" in name)
    assert codes_of(folder) == {"LF201": "lora_A is present, but lora_B is missing"}
    for name in (half.replace("lora_A", "lora_mystery"), half.replace("q_proj", "up_proj").replace("_A", "_extra")):
        save_file({**tensors, name: tensors[half].clone()}, weights)
        found = codes_of(folder)
        assert found.keys() == {"LF201", "LF210"}
        assert found["LF210"] == f"not part of any update: {name}; that training would be lost"


def codes_of(folder: Path) -> dict[str, str]:
    return {each.code: each.message for each in validate(folder).findings if each.severity is Severity.ERROR}
