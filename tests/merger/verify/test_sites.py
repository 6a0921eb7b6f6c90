"""Where the second opinion finds the weights of a loaded model in the files of a base: answers known by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from merger.checkpoints import adapter, low_rank

from loraformat.merger.verify.reference import sites as module
from loraformat.merger.verify.reference.sites import (
    NotFollowed,
    Renaming,
    Run,
    Site,
    Sites,
    fits,
    is_transposed,
    may_be_absent,
    renaming_of,
)
from loraformat.merger.verify.reference.ties import Table
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType, LazyTensor, Span
from loraformat.model.updates import Dense, LowRank, Replace, Rotated, Rows, Scaled, Update

KINDS = ("weight", "bias")
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
DINO = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
DISK, MEMORY = "model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"


def zeros(*shape: int) -> LazyTensor:
    return LazyTensor.of(torch.zeros(*shape))


def stack(experts: int, rows: int, cols: int) -> LowRank:
    return LowRank(zeros(experts, rows, 2), zeros(experts, 2, cols), 1.0)


def sites(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None, tables: Sequence[Table] = ()
) -> Sites:
    tensors = {
        name: StoredTensor("model.safetensors", DType.F32, shape, Span(0, 4 * math.prod(shape)))
        for name, shape in shapes.items()
    }
    return Sites(tensors, config or {}, tables)


def experts(count: int = 2, **other: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {"w1": (4, 6), "w3": (4, 6), "w2": (6, 4), **other}
    return {f"{DISK}.{number}.{name}.weight": shape for number in range(count) for name, shape in shapes.items()}


def test_a_stored_name_is_found_as_it_is_under_a_table_and_below_an_adapter() -> None:
    table = Table(("embed.weight", "head.weight"), "embed.weight")
    found = sites({"embed.weight": (9, 4), "a.base_layer.weight": (3, 4)}, tables=[table])
    assert found.find("embed.weight") == Site((9, 4), tensor="embed.weight")
    assert found.find("head.weight") == Site((9, 4), tensor="head.weight")
    assert found.find("a.weight") == Site((3, 4), tensor="a.base_layer.weight")
    assert found.find("b.weight") is None


def test_matrices_of_experts_are_the_rows_of_a_stack() -> None:
    found = sites(experts(), MIXTRAL)
    gate_up, down = found.find(f"{MEMORY}.gate_up_proj"), found.find(f"{MEMORY}.down_proj")
    assert gate_up == Site(
        (2, 8, 6),
        (
            Run(f"{DISK}.0.w1.weight", 4, first=0, expert=0),
            Run(f"{DISK}.0.w3.weight", 4, first=4, expert=0),
            Run(f"{DISK}.1.w1.weight", 4, first=0, expert=1),
            Run(f"{DISK}.1.w3.weight", 4, first=4, expert=1),
        ),
    )
    runs = (Run(f"{DISK}.0.w2.weight", 6, expert=0), Run(f"{DISK}.1.w2.weight", 6, expert=1))
    assert down == Site((2, 6, 4), runs)


def test_parts_of_other_heights_are_one_below_the_other() -> None:
    found = sites(experts(w3=(5, 6)), MIXTRAL).find(f"{MEMORY}.gate_up_proj")
    assert found is not None
    assert found.shape == (2, 9, 6)
    assert [(run.first, run.count) for run in found.runs] == [(0, 4), (4, 5), (0, 4), (4, 5)]


@pytest.mark.parametrize(
    "change",
    [
        {f"{DISK}.1.w3.weight": None},
        {f"{DISK}.0.w1.weight": None, f"{DISK}.0.w3.weight": None},
        {f"{DISK}.0.w1.weight": None, f"{DISK}.1.w3.weight": None},
        {f"{DISK}.1.w3.weight": (4, 5)},
        {f"{DISK}.1.w3.weight": (3, 6)},
        {f"{MEMORY}.1.w3.weight": (4, 6)},
        {f"{DISK}.{number}.{name}.weight": () for number in (0, 1) for name in ("w1", "w3")},
        {f"{DISK}.{number}.{name}.weight": (0, 6) for number in (0, 1) for name in ("w1", "w3")},
    ],
    ids=["half", "expert", "halves", "columns", "rows", "twice", "scalars", "empty"],
)
def test_experts_that_make_no_stack_are_none(change: dict[str, tuple[int, ...] | None]) -> None:
    shapes = {name: shape for name, shape in {**experts(), **change}.items() if shape is not None}
    found = sites(shapes, MIXTRAL)
    assert found.find(f"{MEMORY}.gate_up_proj") is None
    assert found.find(f"{MEMORY}.down_proj") is not None


def test_tensors_that_are_joined_without_experts_are_one_weight() -> None:
    prefix = "model.layers.0.linear_attn"
    shapes = {f"{prefix}.{name}_conv1d.weight": (rows, 1, 3) for name, rows in {"v": 8, "q": 4, "k": 5}.items()}
    config = {"model_type": "olmo_hybrid"}
    assert sites(shapes, config).find(f"{prefix}.conv1d.weight") == Site(
        (17, 1, 3),
        (
            Run(f"{prefix}.q_conv1d.weight", 4, first=0),
            Run(f"{prefix}.k_conv1d.weight", 5, first=4),
            Run(f"{prefix}.v_conv1d.weight", 8, first=9),
        ),
    )
    del shapes[f"{prefix}.k_conv1d.weight"]
    assert sites(shapes, config).find(f"{prefix}.conv1d.weight") is None


def test_a_tensor_that_is_cut_is_several_weights() -> None:
    found = sites({"mlp.weights_in.weight": (8, 6), "mlp.weights_in.bias": (8,)}, DINO)
    assert found.find("mlp.gate_proj.weight") == Site((4, 6), (Run("mlp.weights_in.weight", 4, at=0),))
    assert found.find("mlp.up_proj.weight") == Site((4, 6), (Run("mlp.weights_in.weight", 4, at=4),))
    assert found.find("mlp.up_proj.bias") == Site((4,), (Run("mlp.weights_in.bias", 4, at=4),))
    assert set(found.names) == {f"mlp.{n}.{kind}" for n in ("weights_in", "gate_proj", "up_proj") for kind in KINDS}


@pytest.mark.parametrize("shape", [(9, 6), (0, 6), ()])
def test_a_tensor_that_cannot_be_cut_is_none(shape: tuple[int, ...]) -> None:
    assert sites({"mlp.weights_in.weight": shape}, DINO).find("mlp.gate_proj.weight") is None


def test_each_third_of_three_has_its_rows() -> None:
    name = "layers.0.attn.Wqkv.weight"
    found = sites({name: (12, 6)}, {"model_type": "nomic_bert"})
    for number, letter in enumerate("qkv"):
        weight = f"layers.0.self_attn.{letter}_proj.weight"
        assert found.find(weight) == Site((4, 6), (Run(name, 4, at=4 * number),))


def test_a_tensor_that_is_renamed_or_transposed_is_whole() -> None:
    found = sites({"layer.0.attention.attention.query.weight": (4, 6)}, DINO)
    assert found.find("layer.0.attention.q_proj.weight") == Site(
        (4, 6), tensor="layer.0.attention.attention.query.weight"
    )
    stored = "mlp.weights_out.weight"
    assert sites({stored: (4, 6)}, DINO).find("mlp.down_proj.weight") == Site((4, 6), tensor=stored)


def test_a_tensor_that_is_loaded_as_its_transpose_is_told() -> None:
    stored, weight = "model.layers.0.mlp.gate.weight", "model.language_model.layers.0.mlp.text_moe.gate.weight"
    config = {"model_type": "ernie4_5_vl_moe"}
    assert sites({stored: (6, 4)}, config).find(weight) == Site((6, 4), tensor=stored, is_transposed=True)


def test_two_tensors_that_would_have_one_name_are_none() -> None:
    weight, names = (
        "model.language_model.q.weight",
        ("model.language_model.model.q.weight", "language_model.model.model.q.weight"),
    )
    assert sites({names[1]: (4, 6)}, LLAVA).find(weight) == Site((4, 6), tensor=names[1])
    assert sites(dict.fromkeys(names, (4, 6)), LLAVA).find(weight) is None


def test_a_weight_is_found_under_its_older_name() -> None:
    weight = "layer.0.attention.attention.query.weight"
    found = sites({"layer.0.attention.q_proj.weight": (4, 6)}, DINO)
    assert found.find(weight) == Site((4, 6), tensor="layer.0.attention.q_proj.weight")
    assert found.find("layer.0.attention.attention.key.weight") is None


def test_an_older_name_of_what_is_stored_in_parts_is_none() -> None:
    for name in ("gate_up_proj", "down_proj"):
        assert sites(experts(), MIXTRAL).find(f"{DISK}.{name}") is None
    one = Site((1, 6, 4), (Run(f"{DISK}.0.w2.weight", 6, expert=0),))
    assert sites(experts(1), MIXTRAL).find(f"{DISK}.down_proj") == one


def test_a_matrix_of_an_expert_is_rows_of_a_stack() -> None:
    found = sites({f"{MEMORY}.gate_up_proj": (3, 8, 6), f"{MEMORY}.down_proj": (3, 6, 4)}, MIXTRAL)
    for number in range(3):
        for half, name in enumerate(("w1", "w3")):
            run = Run(f"{MEMORY}.gate_up_proj", 4, at=8 * number + 4 * half)
            assert found.find(f"{DISK}.{number}.{name}.weight") == Site((4, 6), (run,))
        run = Run(f"{MEMORY}.down_proj", 6, at=6 * number)
        assert found.find(f"{DISK}.{number}.w2.weight") == Site((6, 4), (run,))
    assert found.find(f"{DISK}.3.w1.weight") is None
    assert found.find(f"{DISK}.4.w1.weight") is None
    assert found.find(f"{DISK}.3.w2.weight") is None


@pytest.mark.parametrize("shape", [(3, 9, 6), (24, 6), (3, 8, 2, 3)])
def test_a_matrix_of_what_is_no_stack_of_halves_is_none(shape: tuple[int, ...]) -> None:
    assert sites({f"{MEMORY}.gate_up_proj": shape}, MIXTRAL).find(f"{DISK}.1.w1.weight") is None


def test_a_weight_that_is_stored_apart_now_is_all_of_its_parts() -> None:
    found = sites({"mlp.gate_proj.weight": (4, 6), "mlp.up_proj.weight": (4, 6)}, DINO)
    runs = (Run("mlp.gate_proj.weight", 4, first=0), Run("mlp.up_proj.weight", 4, first=4))
    assert found.find("mlp.weights_in.weight") == Site((8, 6), runs)


@pytest.mark.parametrize(
    ("gate", "up"), [((4, 6), (3, 6)), ((3, 6), (4, 6)), ((4, 6), (4, 5)), ((4, 5), (4, 6)), ((4, 6), None)]
)
def test_parts_that_differ_are_no_weight(gate: tuple[int, ...], up: tuple[int, ...] | None) -> None:
    shapes = {"mlp.gate_proj.weight": gate, **({} if up is None else {"mlp.up_proj.weight": up})}
    assert sites(shapes, DINO).find("mlp.weights_in.weight") is None


def test_a_head_is_found_by_the_end_of_its_name_in_a_table() -> None:
    names = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    shapes, table = {names[0]: (9, 4)}, Table(names, names[0])
    assert sites(shapes, LLAVA, [table]).find("lm_head.weight") == Site((9, 4), tensor=names[1])
    assert sites(shapes, {}, [table]).find("lm_head.weight") is None
    several = Table((*names, "other.lm_head.weight"), names[0])
    assert sites(shapes, LLAVA, [several]).find("lm_head.weight") is None


def test_the_bare_model_is_found_below_the_prefix_of_its_class() -> None:
    stored = "language_model.model.layers.0.q_proj.weight"
    found = sites({stored: (4, 6)}, LLAVA)
    for weight in ("model.language_model.layers.0.q_proj.weight", "language_model.layers.0.q_proj.weight"):
        assert found.find(weight) == Site((4, 6), tensor=stored)
    assert found.find("language_model.layers.1.q_proj.weight") is None


def renamed(
    weights: Mapping[str, tuple[int, int]] | str,
    shapes: Mapping[str, tuple[int, ...]] | Sequence[str],
    config: Mapping[str, Any] | None = None,
    tables: Sequence[Table] = (),
) -> Renaming:
    wanted = {weights: (4, 6)} if isinstance(weights, str) else weights
    stored = shapes if isinstance(shapes, Mapping) else dict.fromkeys(shapes, (4, 6))
    change = adapter({name: low_rank(*shape) for name, shape in wanted.items()})
    return renaming_of(change, sites(stored, config, tables))


@pytest.mark.parametrize(
    ("weight", "stored", "config", "expected"),
    [
        ("a.q.weight", "a.q.weight", {}, Renaming()),
        ("q.weight", "a.q.weight", {}, Renaming("", "a.")),
        ("q.weight", "a.b.q.weight", {}, Renaming("", "a.b.")),
        ("a.q.weight", "q.weight", {}, Renaming("a.", "")),
        ("a.b.q.weight", "q.weight", {}, Renaming("a.b.", "")),
        ("a.q.weight", "b.q.weight", {}, Renaming("a.", "b.")),
        ("h.0.q.weight", "layers.0.q.weight", {}, Renaming("h.", "layers.")),
        ("encoder.h.0.q.weight", "encoder.l.0.q.weight", {}, Renaming("encoder.h.", "encoder.l.")),
        (
            "model.language_model.layers.0.q.weight",
            "language_model.model.layers.0.q.weight",
            GPT2,
            Renaming("model.language_model.", "language_model.model."),
        ),
        ("a.text_model.q.weight", "a.language_model.q.weight", GPT2, Renaming("a.text_model.", "a.language_model.")),
    ],
)
def test_one_prefix_leads_from_the_adapter_to_the_base(
    weight: str, stored: str, config: dict[str, Any], expected: Renaming
) -> None:
    assert renamed(weight, [stored, "other.norm.weight"], config) == expected
    assert expected(weight) == stored
    assert expected("0" + weight) == (None if expected.here else f"{expected.there}0{weight}")


@pytest.mark.parametrize(
    ("weight", "stored", "config"),
    [
        ("a.q.weight", {"b.k.weight": (4, 6)}, {}),
        ("q.weight", {"k.weight": (4, 6)}, {}),
        ("a.q.weight", {"b.xq.weight": (4, 6)}, {}),
        ("a.q.weight", {"b.q.weight": (4, 6)}, GPT2),
        ("a.q.weight", {"b.q.weight": (5, 6)}, {}),
        ("a.q.weight", {"b.q.weight": (4, 6), "a.k.weight": (4, 6)}, {}),
        ("h.1.q.weight", {"l.0.q.weight": (4, 6)}, {}),
        ("encoder.q.weight", {"decoder.q.weight": (4, 6)}, {}),
        ("text.q.weight", {"vision.q.weight": (4, 6)}, {}),
        ("a.text_model.q.weight", {"a.language_model.q.weight": (5, 6)}, GPT2),
        ("weight", {"a.weight": (4, 6)}, {}),
    ],
    ids=[
        *("another layer", "no prefix", "end of a word", "known class", "shape", "both prefixes there"),
        *("number", "side", "sight", "shape around", "one part"),
    ],
)
def test_prefixes_that_may_be_another_model_are_not_followed(
    weight: str, stored: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    with pytest.raises(NotFollowed, match=r"^0 prefixes lead from "):
        renamed(weight, stored, config)


def test_prefixes_that_lead_to_different_tensors_are_not_followed() -> None:
    with pytest.raises(NotFollowed, match=r"^2 prefixes lead from q\.weight to"):
        renamed("q.weight", ["a.q.weight", "b.q.weight"])


def test_all_weights_must_be_found_under_the_prefix() -> None:
    weights = {"q.weight": (4, 6), "k.weight": (4, 6)}
    assert renamed(weights, ["a.q.weight", "a.k.weight", "b.q.weight"]) == Renaming("", "a.")
    with pytest.raises(NotFollowed, match=r"^0 prefixes"):
        renamed(weights, ["a.q.weight", "b.k.weight"])
    with pytest.raises(NotFollowed, match=r"^0 prefixes"):
        renamed({"x.q.weight": (4, 6), "y.k.weight": (4, 6)}, ["q.weight", "k.weight"])
    with pytest.raises(NotFollowed, match=r"^0 prefixes"):  # of all, not only the first, the shapes must fit
        renamed({"a.k.weight": (4, 6), "a.q.weight": (4, 6)}, {"b.k.weight": (4, 6), "b.q.weight": (9, 6)})
    around = {"text_model.k.weight": (4, 6), "text_model.q.weight": (4, 6)}
    with pytest.raises(NotFollowed, match=r"^0 prefixes"):
        renamed(around, {"language_model.k.weight": (4, 6), "language_model.q.weight": (9, 6)}, GPT2)


def test_less_of_a_prefix_is_taken_before_another_one() -> None:
    assert renamed("x.a.q.weight", ["a.q.weight", "b.q.weight"]) == Renaming("x.", "")


def test_a_head_that_is_not_stored_is_found_below_a_prefix() -> None:
    table = Table(("embed.weight", "lm_head.weight"), "embed.weight")
    assert renamed("x.lm_head.weight", ["embed.weight"], tables=[table]) == Renaming("x.", "")


def test_what_a_layer_may_lack_leads_nowhere() -> None:
    bias = {"b.q.bias": Scaled(zeros(4), is_bias=True)}
    found = sites({"a.q.weight": (4, 6), "b.q.bias": (4,)})
    assert renaming_of(adapter({**bias, "q.weight": low_rank(4, 6)}), found) == Renaming("", "a.")
    assert renaming_of(adapter(bias), found) == Renaming()


def test_the_search_for_a_prefix_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{letter}.q.weight" for letter in "abcdef"]
    monkeypatch.setattr(module, "_MOST_LOOKUPS", 7)  # each name, and no prefix
    with pytest.raises(NotFollowed, match=r"^6 prefixes"):
        renamed("q.weight", names)
    monkeypatch.setattr(module, "_MOST_LOOKUPS", 6)
    with pytest.raises(NotFollowed, match=r"too many prefixes may lead from q\.weight"):
        renamed("q.weight", names)


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ((Scaled(zeros(4), is_bias=True),), True),
        ((Rotated(zeros(2, 2, 2), "left", is_bias=True),), True),
        ((Scaled(zeros(4), is_bias=True), Rotated(zeros(2, 2, 2), "left", is_bias=True)), True),
        ((Scaled(zeros(4)),), False),
        ((Rotated(zeros(2, 2, 2), "left"),), False),
        ((Dense(zeros(4)),), False),
        ((Scaled(zeros(4), is_bias=True), Dense(zeros(4))), False),
    ],
)
def test_only_biases_that_follow_their_outputs_may_be_absent(chain: tuple[Update, ...], expected: bool) -> None:
    assert may_be_absent(chain) is expected


@pytest.mark.parametrize(
    ("update", "shape", "expected"),
    [
        (low_rank(4, 6), (4, 6), True),
        (low_rank(4, 6), (6, 4), False),
        (low_rank(4, 6), (4, 7), False),
        (low_rank(4, 6), (5, 6), False),
        (low_rank(4, 18), (4, 2, 3, 3), True),
        (low_rank(4, 18), (4, 2, 3, 4), False),
        (low_rank(4, 6), (1, 4, 6), True),
        (low_rank(4, 6), (2, 4, 6), False),
        (low_rank(4, 6), (1, 6, 4), False),
        (low_rank(1, 24), (1, 4, 6), True),
        (low_rank(4, 6), (), False),
        (low_rank(4, 6), (24,), False),
        (stack(2, 4, 6), (2, 4, 6), True),
        (stack(2, 4, 6), (3, 4, 6), False),
        (stack(2, 4, 6), (8, 6), False),
        (Scaled(zeros(4)), (4, 6), True),
        (Scaled(zeros(4)), (5, 6), False),
        (Scaled(None, zeros(6)), (4, 6), True),
        (Scaled(None, zeros(6)), (6, 4), False),
        (Dense(zeros(4)), (4,), True),
        (Dense(zeros(4)), (4, 1), False),
        (Dense(zeros(4)), (1, 4), False),
    ],
)
def test_an_update_fits_its_own_shape_flattened_or_with_a_size_left_open(
    update: Update, shape: tuple[int, ...], expected: bool
) -> None:
    assert fits(update, shape) is expected


def turned(
    update: Update | Sequence[Update],
    site: Site,
    config: Mapping[str, Any] | None = None,
    weight: str = "h.0.attn.c_attn.weight",
    **settings: Any,
) -> bool:
    change: Adapter = adapter({weight: update}, **settings)
    return is_transposed(weight, change.updates[weight], site, config or {}, change)


@pytest.mark.parametrize(
    "update", [low_rank(4, 6), stack(2, 4, 6), (Replace(zeros(4, 6)), low_rank(4, 6)), Scaled(zeros(4))]
)
def test_shapes_tell_the_orientation_before_all_else(update: Update | Sequence[Update]) -> None:
    first = update[-1] if isinstance(update, Sequence) else update
    shape = (2, 4, 6) if isinstance(first, LowRank) and first.is_stack else (4, 6)
    crossed = (*shape[:-2], shape[-1], shape[-2])
    for config in (GPT2, {"model_type": "gpt_oss"}, {}):
        for claim in (None, True, False):
            assert not turned(update, Site(shape, tensor="t"), config, fan_in_fan_out=claim)
            assert not turned(update, Site(shape, tensor="t", is_transposed=True), config, fan_in_fan_out=claim)
            assert turned(update, Site(crossed, tensor="t"), config, fan_in_fan_out=claim)


@pytest.mark.parametrize("is_stored_so", [True, False])
@pytest.mark.parametrize(
    ("update", "shape"),
    [
        (Replace(zeros(6, 4)), (4, 6)),
        (Rows((0,), zeros(1, 6)), (4, 6)),
        (LowRank(zeros(4, 2), zeros(2, 6), 1.0, is_embedding=True), (6, 4)),
        (Dense(zeros(4)), (4,)),
        (low_rank(4, 4), (4,)),
        (Dense(zeros(4)), (4, 4)),
        (LowRank(zeros(4, 2), zeros(2, 18), 1.0, kernel=(3,)), (6, 4, 3)),
    ],
    ids=["replaced", "rows", "embedding", "bias", "vector", "flat", "convolution"],
)
def test_what_has_no_orientation_is_as_the_files_have_it(
    update: Update, shape: tuple[int, ...], is_stored_so: bool
) -> None:
    assert turned(update, Site(shape, tensor="t", is_transposed=is_stored_so), GPT2) is is_stored_so


@pytest.mark.parametrize(
    ("config", "weight", "claim", "expected"),
    [
        (GPT2, "h.0.attn.c_attn.weight", False, True),
        (GPT2, "h.0.crossattention.q_attn.weight", None, True),
        (GPT2, "h.0.mlp.c_fc.weight", None, True),
        (GPT2, "h.0.mlp.c_proj.weight", None, True),
        (GPT2, "h.0.mlp.other.weight", True, False),
        ({"model_type": "openai-gpt"}, "h.0.attn.c_attn.weight", None, True),
        ({"model_type": "openai-gpt"}, "h.0.attn.q_attn.weight", None, False),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "h.0.c_attn.weight", True, False),
        ({"model_type": "llama"}, "h.0.c_attn.weight", True, False),
        ({"model_type": "of nobody"}, "h.0.c_attn.weight", True, True),
        ({"model_type": "of nobody"}, "h.0.c_attn.weight", False, False),
        ({"model_type": "of nobody"}, "h.0.c_attn.weight", None, False),
        ({}, "h.0.c_attn.weight", True, True),
        ({"architectures": ["LlamaForCausalLM"]}, "h.0.c_attn.weight", True, True),
    ],
)
def test_the_model_tells_the_orientation_of_a_square_matrix(
    config: dict[str, Any], weight: str, claim: bool | None, expected: bool
) -> None:
    square = low_rank(4, 4)
    assert turned(square, Site((4, 4), tensor="t"), config, weight, fan_in_fan_out=claim) is expected
    assert turned(square, Site((4, 4), tensor="t", is_transposed=True), config, weight, fan_in_fan_out=claim)


def test_a_claim_about_some_modules_is_one_about_them() -> None:
    square, site = low_rank(4, 4), Site((4, 4), tensor="t")
    assert turned(square, site, {}, "a.q.weight", transposed=("a.q",))
    assert not turned(square, site, {}, "a.k.weight", transposed=("a.q",))


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("gpt_oss", {}, True),
        ("mixtral", {}, False),
        ("gpt_oss", {"transposes_square_experts": False}, False),
        ("mixtral", {"transposes_square_experts": True}, True),
        ("mixtral", {"raw": {"target_parameters": ["w"], "peft_version": "0.17.1"}}, True),
        ("mixtral", {"raw": {"target_parameters": ["w"], "peft_version": "0.18.0.dev0"}}, True),
        ("mixtral", {"raw": {"target_parameters": ["w"], "peft_version": "0.19.0"}}, False),
        ("mixtral", {"raw": {"target_parameters": ["w"], "peft_version": "1.17.0"}}, False),
        ("mixtral", {"raw": {"target_parameters": ["w"]}}, False),
        ("gpt_oss", {"raw": {"target_parameters": ["w"], "peft_version": "0.19.0"}}, True),
        ("gpt_oss", {"raw": {"target_parameters": ["w"]}, "transposes_square_experts": False}, True),
        ("mixtral", {"raw": {"peft_version": "0.17.1"}}, False),
    ],
)
def test_model_and_version_tell_the_orientation_of_square_experts(
    model_type: str, settings: dict[str, Any], expected: bool
) -> None:
    update, config = stack(3, 4, 4), {"model_type": model_type}
    assert turned(update, Site((3, 4, 4), tensor="t"), config, "e.w", **settings) is expected
    assert turned(update, Site((3, 4, 4), tensor="t", is_transposed=True), config, "e.w", **settings)
