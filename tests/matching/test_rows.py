"""Weights that a checkpoint stores in parts, joined or transposed: a map of rows of one update."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from loraformat.matching import RowMap, match, replicated
from loraformat.matching.rows import StoredRows, StoredWeight, place_of_older_name, places_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.checkpoint import Checkpoint, StoredTensor
from loraformat.model.tensors import DType, LazyTensor, Span
from loraformat.model.updates import LowRank, Update
from loraformat.naming import spelling_of

MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
DISK, MEMORY = "model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"


def base(shapes: Mapping[str, tuple[int, ...]], **config: object) -> Checkpoint:
    tensors = {name: StoredTensor("f", DType.F32, shape, Span(0, 0)) for name, shape in shapes.items()}
    return Checkpoint("base", {}, tensors, config=config)


def adapter(updates: Mapping[str, Update], **config: object) -> Adapter:
    return Adapter(config=AdapterConfig(**config), updates={name: (update,) for name, update in updates.items()})


def stack(*shape: int) -> LowRank:
    *experts, rows, cols = shape
    up, down = (LazyTensor.of(torch.zeros(*experts, *size)) for size in ((rows, 2), (2, cols)))
    return LowRank(up, down, 1.0)


def mixtral(experts: int = 2) -> dict[str, tuple[int, ...]]:
    shapes = {"w1": (6, 4), "w2": (4, 6), "w3": (6, 4)}
    return {f"{DISK}.{n}.{name}.weight": shape for n in range(experts) for name, shape in shapes.items()}


def test_a_stack_lands_on_single_experts() -> None:
    found = match(adapter({f"{MEMORY}.gate_up_proj": stack(2, 12, 4)}), base(mixtral(), **MIXTRAL))
    assert not found.misfits
    assert {landing.tensor: landing.part for landing in found.landings[f"{MEMORY}.gate_up_proj"]} == {
        f"{DISK}.{n}.{name}.weight": RowMap(n, rows) for n in (0, 1) for name, rows in (("w1", (0, 6)), ("w3", (6, 12)))
    }


def test_a_stack_of_other_size_is_a_misfit() -> None:
    found = match(adapter({f"{MEMORY}.gate_up_proj": stack(3, 12, 4)}), base(mixtral(), **MIXTRAL))
    assert [misfit.stored_shape for misfit in found.misfits] == [(2, 12, 4)]


def test_a_stack_that_lacks_an_expert_or_a_part_is_no_home() -> None:
    for missing in (f"{DISK}.0.w3.weight", f"{DISK}.0.w1.weight"):
        shapes = {name: shape for name, shape in mixtral().items() if name != missing}
        found = match(adapter({f"{MEMORY}.gate_up_proj": stack(2, 12, 4)}), base(shapes, **MIXTRAL))
        assert list(found.unmatched) == [f"{MEMORY}.gate_up_proj"]


def test_single_experts_land_on_a_stack() -> None:
    shapes = {f"{MEMORY}.gate_up_proj": (2, 12, 4), f"{MEMORY}.down_proj": (2, 4, 6)}
    updates = {f"{DISK}.1.w3.weight": stack(6, 4), f"{DISK}.1.w2.weight": stack(4, 6)}
    found = match(adapter(updates), base(shapes, **MIXTRAL))
    assert [(landing.tensor, landing.part) for (landing,) in found.landings.values()] == [
        (f"{MEMORY}.gate_up_proj", RowMap(rows=(0, 6), at=18)),
        (f"{MEMORY}.down_proj", RowMap(rows=(0, 4), at=4)),
    ]
    assert not found.misfits
    outside = match(adapter({f"{DISK}.2.w3.weight": stack(6, 4)}), base(shapes, **MIXTRAL))
    assert list(outside.unmatched) == [f"{DISK}.2.w3.weight"]


@pytest.mark.parametrize(
    ("shape", "model_type", "claim", "transposed"),
    [
        ((2, 6, 4), "gpt_oss", None, False),
        ((2, 4, 6), "gpt_oss", None, True),
        ((2, 6, 6), "gpt_oss", None, True),
        ((2, 6, 6), "qwen3_moe", None, False),
        ((2, 6, 6), "qwen3_moe", True, True),
    ],
)
def test_who_decides_the_orientation_of_experts(
    shape: tuple[int, ...], model_type: str, claim: bool | None, transposed: bool
) -> None:
    update = stack(2, 6, 6 if shape[1] == shape[2] else 4)
    found = match(
        adapter({"e.w": update}, transposes_square_experts=claim), base({"e.w": shape}, model_type=model_type)
    )
    assert (found.landings["e.w"][0].transposed, found.misfits) == (transposed, ())


def test_a_few_bytes_of_config_do_not_make_millions_of_names() -> None:
    shapes = {f"model.layers.0.mlp.experts.{n}.w1": (4, 4) for n in range(200)}
    assert len(replicated(base(shapes), (0,) * 1000).tensors) == 200_000
    assert len(replicated(base(shapes), (0,) * 10_000).tensors) == 200


def test_repeated_layers_are_copies_under_new_numbers() -> None:
    shapes = {f"model.layers.{n}.q.weight": (4, 4 + n) for n in range(3)} | {"lm_head.weight": (9, 4)}
    found = replicated(base(shapes), (0, 2, 2))
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        "model.layers.0.q.weight": (4, 4),
        "model.layers.1.q.weight": (4, 6),
        "model.layers.2.q.weight": (4, 6),
        "lm_head.weight": (9, 4),
    }
    assert replicated(found, (0,)) is found
    assert replicated(base(shapes), (0, 7)).layers == ()


CUT = "encoder.layer.0.mlp.weights_in.weight"
HALVES = ["encoder.layer.0.mlp.gate_proj.weight", "encoder.layer.0.mlp.up_proj.weight"]
DINO = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}


def test_a_stored_tensor_that_the_loaded_model_cuts_in_two() -> None:
    found = places_of(base({CUT: (12, 4)}, **DINO))
    assert [found[name] for name in HALVES] == [
        StoredWeight((6, 4), (StoredRows(CUT, RowMap(rows=(0, 6), at=at)),)) for at in (0, 6)
    ]


@pytest.mark.parametrize("shape", [(0, 4), (11, 4), ()])
def test_a_tensor_that_cannot_be_cut_in_two_is_no_home(shape: tuple[int, ...]) -> None:
    assert not places_of(base({CUT: shape}, **DINO)).keys() & set(HALVES)


def test_one_row_for_each_half_is_enough() -> None:
    assert [places_of(base({CUT: (2, 4)}, **DINO))[name].shape for name in HALVES] == [(1, 4)] * 2


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((2, 12, 4), (6, 4)),
        ((2, 11, 4), None),  # no two halves
        ((1, 12, 4), None),  # there is no second expert
        ((2, 12, 4, 1), None),
        ((12, 4), None),
    ],
)
def test_an_older_name_of_one_expert_is_a_part_of_its_stack(
    shape: tuple[int, ...], rows: tuple[int, int] | None
) -> None:
    plain = base({f"{MEMORY}.gate_up_proj": shape}, **MIXTRAL)
    found = place_of_older_name(f"{DISK}.1.w3.weight", spelling_of(plain.config), places_of(plain))
    part = StoredRows(f"{MEMORY}.gate_up_proj", RowMap(rows=(0, 6), at=18))
    assert found == (None if rows is None else StoredWeight(rows, (part,)))
    absent = place_of_older_name("model.nothing.weight", spelling_of(plain.config), places_of(plain))
    assert absent is None


def test_the_places_of_a_base_are_its_own() -> None:
    """Answers are kept for bases, not for what is equal to them; without a table each tensor is its own place."""
    shapes = [{"a.weight": (number, 4)} for number in range(1, 6)]
    bases = [base(each) for each in shapes]
    for _ in range(2):
        for plain, wanted in zip(bases, shapes, strict=True):
            assert {name: place.shape for name, place in places_of(plain).items()} == wanted
    assert places_of(bases[0])["a.weight"] == StoredWeight((1, 4), (StoredRows("a.weight"),))
