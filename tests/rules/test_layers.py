"""Rules that compare the layers of an adapter: each at the boundary of what it tells."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from rules.subjects import hits, pair

from loraformat.model.adapter import Pipeline
from loraformat.model.tensors import DType
from loraformat.model.updates import LowRank, Update
from loraformat.rules import layers


def in_layers(numbers: Iterable[int], name: str = "q_proj", update: LowRank | None = None) -> dict[str, LowRank]:
    return {f"model.layers.{number}.{name}.weight": update or pair() for number in numbers}


@pytest.mark.parametrize(
    ("up", "down", "told"),
    [
        (DType.F32, DType.BF16, "lora_B is F32, but lora_A is BF16"),
        (DType.F16, DType.F32, "lora_B is F16, but lora_A is F32"),
        (DType.BF16, DType.BF16, None),
        (DType.F32, DType.I32, None),
        (DType.I32, DType.F32, None),
    ],
)
def test_two_floating_types_in_one_update_are_told(up: DType, down: DType, told: str | None) -> None:
    mixed = {"b.weight": pair(dtypes=(up, down)), "a.weight": pair(dtypes=(up, down)), "c.weight": pair()}
    found = hits(layers.mixed_dtypes, mixed)
    assert [hit.message for hit in found] == ([told] if told else [])
    assert [(hit.location.tensor, hit.location.more) for hit in found] == ([("a.weight", 1)] if told else [])


@pytest.mark.parametrize(
    ("present", "everywhere", "absent"),
    [
        ([0, 1, 3, 4], range(5), "2"),
        ([0, 1, 3], range(4), None),  # three layers say nothing
        ([0, 1, 2, 3], range(4), None),
        ([1, 2, 3, 4], range(7), None),  # only what lies in between is missed
        ([0, 2, 4, 6], [0, 2, 4, 6], None),  # nor what no kind has
        ([n for n in range(17) if n not in (3, 9)], range(17), None),  # 2 of 15 are more than an eighth
        ([n for n in range(18) if n not in (3, 9)], range(18), "3, 9"),  # 2 of 16 are an eighth
        ([n for n in range(54) if not 10 <= n < 16], range(54), "10, 11, 12, 13, 14"),
    ],
)
def test_a_layer_that_is_missing_in_between(present: list[int], everywhere: list[int], absent: str | None) -> None:
    updates = in_layers(present) | in_layers(everywhere, "v_proj")
    found = hits(layers.missing_layer, updates)
    told = f"adapted in {len(present)} layers, but not in {absent}"
    assert [(hit.where, hit.message) for hit in found] == ([("model.layers.*.q_proj", told)] if absent else [])
    for field in ("layers_to_transform", "exclude_modules"):
        assert hits(layers.missing_layer, updates, raw={field: [1]}) == []


@pytest.mark.parametrize("stack", ["layers", "h", "blocks", "layer", "block"])
def test_stacks_of_layers_by_their_names(stack: str) -> None:
    updates = {f"{stack}.{n}.k.weight": pair() for n in (0, 1, 3, 4)} | {f"{stack}.2.v.weight": pair()}
    assert [hit.where for hit in hits(layers.missing_layer, updates)] == [f"{stack}.*.k"]
    others = {name.replace(stack, "experts"): update for name, update in updates.items()}
    assert hits(layers.missing_layer, others) == []


@pytest.mark.parametrize(("count", "odd", "is_told"), [(3, 1, False), (4, 1, True), (5, 1, True), (5, 2, False)])
def test_one_layer_of_another_shape(count: int, odd: int, is_told: bool) -> None:
    updates = in_layers(range(count - odd)) | in_layers(range(count - odd, count), update=pair(4, 6))
    found = hits(layers.odd_shape, updates)
    told = [f"shape (4, 6), but (4, 4) in the other {count - 1} layers"] if is_told else []
    assert [hit.message for hit in found] == told
    assert [hit.where for hit in found] == ([f"model.layers.{count - 1}.q_proj.weight"] if is_told else [])


def test_layers_of_three_shapes_have_no_odd_one() -> None:
    updates = in_layers(range(4)) | in_layers([4], update=pair(4, 6)) | in_layers([5], update=pair(4, 8))
    assert hits(layers.odd_shape, updates) == []


@pytest.mark.parametrize(
    ("out", "into", "rank", "told"),
    [
        (4, 9, 4, None),
        (9, 4, 4, None),
        (4, 9, 5, "rank 5, but the weight has only 4 outputs"),
        (9, 4, 5, "rank 5, but the weight has only 4 inputs"),
        (1, 9, 2, "rank 2, but the weight has only 1 output"),
        (0, 9, 2, None),  # nor is there a weight
        (4, 4, 9, None),  # the factors look exchanged, and another rule says so
    ],
)
def test_a_rank_above_the_smaller_dimension(out: int, into: int, rank: int, told: str | None) -> None:
    updates = {"b.weight": pair(out, into, rank), "a.weight": pair(out, into, rank), "c.weight": pair()}
    found = hits(layers.rank_above_dimensions, updates, declared_ranks=dict.fromkeys(updates, 4) if not told else {})
    assert [(hit.where, hit.message) for hit in found] == ([("a.weight", told)] if told else [])


@pytest.mark.parametrize(
    ("number", "is_told"), [("9999", False), ("10000", True), ("0000012", False), ("x10000", False)]
)
def test_a_layer_that_no_model_has(number: str, is_told: bool) -> None:
    found = hits(layers.implausible_layer, {f"model.layers.{number}.q_proj.weight": pair()})
    assert [hit.message for hit in found] == (["expected a layer below 10000"] if is_told else [])


@pytest.mark.parametrize(
    ("named", "is_told"), [(9999, False), (10_000, True), ([3, 10_000], True), ([9999, 3], False), (["x"], False)]
)
def test_a_layer_of_the_config_that_no_model_has(named: object, is_told: bool) -> None:
    found = hits(layers.implausible_layer, {"q.weight": pair()}, raw={"layers_to_transform": named})
    assert [hit.message for hit in found] == (["expected layers below 10000, found 10000"] if is_told else [])


@pytest.mark.parametrize(
    ("scale", "is_told"),
    [
        (1e-6, False),
        (0.99e-6, True),
        (-0.99e-6, True),
        (-1e-6, False),
        (1e6, False),
        (1.01e6, True),
        (-1.01e6, True),
        (0.0, False),  # another rule says so
        (math.inf, False),
        (None, False),
    ],
)
def test_a_scale_that_leaves_nothing_or_drowns_all(scale: float | None, is_told: bool) -> None:
    found = hits(layers.vanishing_scale, {"b.weight": pair(scale=scale), "a.weight": pair(scale=scale)})
    assert len(found) == is_told
    if is_told:
        assert found[0].message.startswith(f"expected a scale between 1e-06 and 1e+06, found {scale:g}: ")
        assert "a.weight" in found[0].message


@pytest.mark.parametrize(
    ("format_name", "raw", "is_told"),
    [("peft", {}, True), ("peft", {"use_dora": False}, True), ("peft", {"use_dora": True}, False), ("mlx", {}, False)],
)
def test_magnitudes_that_the_config_does_not_declare(format_name: str, raw: dict[str, object], is_told: bool) -> None:
    updates = {"a.weight": pair(has_magnitude=True), "b.weight": pair(has_magnitude=True), "c.weight": pair()}
    found = hits(layers.undeclared_magnitude, updates, format_name, raw=raw)
    assert [hit.message for hit in found] == (["expected true, because 2 modules have magnitudes"] if is_told else [])
    assert hits(layers.undeclared_magnitude, {"c.weight": pair()}, format_name, raw=raw) == []


@pytest.mark.parametrize(
    ("blocks", "there", "text"),
    [
        ([0], ["to_k"], "to_k has updates, to_q and to_v have none"),
        ([0], ["to_q", "to_v"], "to_q and to_v have updates, to_k has none"),
        ([0, 1], ["to_q", "to_v"], "to_q and to_v have updates, to_k has none; 1 more such module"),
        ([0, 1], ["to_q", "to_k", "to_v"], None),
    ],
)
def test_a_fused_module_with_updates_for_some_parts(blocks: list[int], there: list[str], text: str | None) -> None:
    updates: dict[str, Update] = {
        f"transformer.transformer_blocks.{block}.attn.{name}.weight": pair() for block in blocks for name in there
    }
    pipeline = Pipeline(families=("flux",), components=("transformer",))
    found = hits(layers.half_fused_group, updates, "diffusers", pipeline=pipeline)
    module = "transformer.double_blocks.0.img_attn.qkv is fused in the original model"
    assert [hit.message for hit in found] == ([f"{module}; {text}"] if text else [])
