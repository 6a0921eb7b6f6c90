"""What tuners compute, on factors so small that the result is written by hand; and the defaults of their settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bundles import bundle

from loraformat.errors import ConfigError
from loraformat.formats import peft
from loraformat.formats.kit.base import Hints
from loraformat.model.updates import Dense, LowRank, Scaled, Update

P = "base_model.model.m.q."
BASE = {"m.q.weight": (2, 4)}


def read(
    peft_type: str, own: dict[str, Any], shared: dict[str, Any] | None = None, weights: Any = BASE, **fields: Any
) -> tuple[Update, ...]:
    """The chain of the one weight; tensors are nested lists."""
    named = {f"{P}{name}": value for name, value in own.items()}
    named |= {f"base_model.{name}": value for name, value in (shared or {}).items()}
    tensors = {name: torch.tensor(value) for name, value in named.items()}
    config = {"peft_type": peft_type, "target_modules": ["q"], **fields}
    folder = bundle({"adapter_config.json": config, "adapter_model.safetensors": tensors})
    return peft.read(folder, hints=Hints(weights=weights)).updates["m.q.weight"]


def product(update: Update) -> np.ndarray:
    assert isinstance(update, LowRank)
    return update.up.load().astype(np.float64) @ update.down.load().astype(np.float64)


A, B = [[1.0, 2.0, 3.0, 4.0]], [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 8 / (12 + 1e-5)),
        ({"init_r": 4}, 8 / (4 + 1e-5)),
        ({"init_r": 4, "lora_alpha": 2}, 2 / (4 + 1e-5)),
        ({"init_r": 4, "lora_alpha": 0}, 4 / (4 + 1e-5)),
        ({"init_r": 4, "lora_alpha": -2}, 4 / (4 + 1e-5)),
        ({"init_r": 4, "lora_alpha": 0.5}, 0.5 / (4 + 1e-5)),
    ],
)
def test_adalora(fields: dict[str, Any], scale: float) -> None:
    (update,) = read("ADALORA", {"lora_A": A, "lora_B": B, "lora_E": [[3.0]]}, **fields)
    assert isinstance(update, LowRank)
    assert update.scale == scale
    assert product(update).tolist() == [[3, 6, 9, 12], [6, 12, 18, 24]]


def test_miss_repeats_its_rows_over_the_inputs() -> None:
    block = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    (update,) = read("MISS", {"miss_block": block})
    assert product(update).tolist() == [[1, 3, 5, 1], [2, 4, 6, 2]]
    (mini,) = read("MISS", {"miss_block": [[1.0], [3.0]]}, init_weights="mini")
    assert product(mini).tolist() == [[1, 3, 1, 3]] * 2


def test_the_base_has_the_transpose_where_the_config_says_so() -> None:
    (update,) = read("MISS", {"miss_block": [[1.0], [3.0]]}, init_weights="mini", fan_in_fan_out=True)
    assert product(update).tolist() == [[1, 3]] * 4


@pytest.mark.parametrize(("fields", "scale"), [({}, 32.0), ({"alpha": 3}, 1.5)])
def test_gralora(fields: dict[str, Any], scale: float) -> None:
    a = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]  # (blocks, inputs of one, rank)
    b = [[[1.0], [10.0]], [[100.0], [1000.0]]]  # (blocks, rank, outputs of one)
    (update,) = read("GRALORA", {"gralora_A": a, "gralora_B": b}, **fields)
    assert isinstance(update, LowRank)
    assert update.scale == scale
    # Block (i, j) takes column i of A's block j and row j of B's block i.
    assert product(update).tolist() == [[1, 3, 50, 70], [200, 400, 6000, 8000]]


def test_the_hybrid_part_of_gralora_shares_its_scale() -> None:
    a, b = [[[1.0], [2.0], [3.0], [4.0]]], [[[1.0, 2.0]]]
    general = {"gralora_A_general.weight": A, "gralora_B_general.weight": B}
    chain = read("GRALORA", {"gralora_A": a, "gralora_B": b, **general}, hybrid_r=1, alpha=3)
    assert [update.scale for update in chain if isinstance(update, LowRank)] == [1.5, 1.5]
    assert [product(update).tolist() for update in chain] == [[[1, 2, 3, 4], [2, 4, 6, 8]]] * 2


def test_c3a_is_circulant() -> None:
    (update,) = read("C3A", {"c3a_kernel": [[[1.0, 2.0], [3.0, 4.0]]]})
    assert isinstance(update, Dense)
    assert update.scale == 1 / 4
    assert update.delta.load().tolist() == [[1, 2, 3, 4], [2, 1, 4, 3]]
    assert update.delta.read(1, 2).tolist() == [[2, 1, 4, 3]]


def test_delora_divides_by_the_lengths_of_its_factors() -> None:
    own = {"delora_A": [[3.0, 4.0, 0.0, 0.0]], "delora_B": [[0.0], [2.0]], "delora_lambda": [5.0]}
    (update,) = read("DELORA", {**own, "delora_w_norm": [1.0, 2.0, 3.0, 4.0]})
    np.testing.assert_allclose(product(update), [[0, 0, 0, 0], [3, 8, 0, 0]], rtol=1e-6)
    tiny = {**own, "delora_A": [[2.0**-20, 0.0, 0.0, 0.0]]}
    (update,) = read("DELORA", {**tiny, "delora_w_norm": [1.0] * 4})
    np.testing.assert_allclose(
        product(update)[1], [5 * 2.0**-20 / 1e-4, 0, 0, 0], rtol=1e-6
    )  # a length is 1e-4 at least


def test_vera_takes_the_start_of_the_shared_factors() -> None:
    own = {"vera_lambda_b": [1.0, 10.0], "vera_lambda_d": [2.0]}
    (update,) = read("VERA", own, {"vera_A": [[1.0, 2.0, 3.0, 4.0, 99.0]], "vera_B": [[1.0], [3.0], [99.0]]})
    assert product(update).tolist() == [[2, 4, 6, 8], [60, 120, 180, 240]]


def test_pvera_takes_the_means_alone() -> None:
    own = {"pvera_lambda_b": [1.0, 10.0], "pvera_lambda_d": [2.0, 99.0]}
    shared = {"pvera_A": [[1.0, 2.0, 3.0, 4.0], [99.0] * 4], "pvera_B": [[1.0], [3.0]]}
    (update,) = read("PVERA", own, shared)
    assert product(update).tolist() == [[2, 4, 6, 8], [60, 120, 180, 240]]


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
@pytest.mark.parametrize(("fields", "scale"), [({}, 640.0), ({"randlora_alpha": 3}, 3.0)])
def test_randlora_scales_shared_bases(shape: tuple[int, int], fields: dict[str, Any], scale: float) -> None:
    """Longer and shorter sides: the short factor gets the trained values, whichever side it is."""
    own = {"randlora_lambda": [[2.0, 5.0]], "randlora_gamma": [[1.0, 10.0], [3.0, 7.0]]}
    a, b = [[[1.0, 2.0, 99.0], [3.0, 4.0, 99.0]]], [[[1.0], [2.0]], [[3.0], [4.0]], [[5.0], [6.0]], [[7.0], [8.0]]]
    (update,) = read("RANDLORA", own, {"randlora_A": a, "randlora_B": b}, weights={"m.q.weight": shape}, **fields)
    assert isinstance(update, LowRank)
    assert update.scale == scale
    short = np.array([[2 * 1 * 1, 2 * 2 * 10], [5 * 3 * 3, 5 * 4 * 7]])
    wanted = np.array([[1, 2], [3, 4], [5, 6], [7, 8]]) @ short
    assert product(update).tolist() == (wanted if shape == (4, 2) else wanted.T).tolist()


def test_unilora_picks_values_by_number() -> None:
    own = {
        "unilora_indices_A": [[0, 2, 1, 0]],
        "unilora_scales_A": [[1.0, 1.0, 2.0, 3.0]],
        "unilora_indices_B": [[1], [2]],
        "unilora_scales_B": [[1.0], [10.0]],
    }
    (update,) = read("UNILORA", own, {"unilora_theta_d": [1.0, 2.0, 3.0]}, save_indices=True)
    assert product(update).tolist() == [[2, 6, 8, 6], [30, 90, 120, 90]]


def test_tinylora_turns_its_fixed_factors() -> None:
    own = {"tinylora_A": A, "tinylora_B": B, "tinylora_P": [[[2.0]], [[3.0]]]}
    (update,) = read("TINYLORA", own, {"tinylora_v.0": [10.0, 1.0]}, weight_tying=1.0)
    assert product(update).tolist() == [[23, 46, 69, 92], [46, 92, 138, 184]]


def test_supertuning_has_places_by_one_number() -> None:
    own = {"supertuning_values": [5.0, 7.0], "supertuning_indices": [6, 1]}
    (update,) = read("SUPERTUNING", own)
    assert isinstance(update, Dense)
    assert update.delta.load().tolist() == [[0, 7, 0, 0], [0, 0, 5, 0]]
    factors = {"supertuning_lora_A.weight": A * 2, "supertuning_lora_B.weight": [[1.0, 0.0], [0.0, 1.0]]}
    for fields, scale in (({}, 0.5), ({"lora_alpha": 6}, 3.0)):
        low_rank, dense = read("SUPERTUNING", {**own, **factors}, r=2, **fields)
        assert isinstance(low_rank, LowRank)
        assert isinstance(dense, Dense)
        assert low_rank.scale == scale


@pytest.mark.parametrize(("fields", "scale"), [({}, 150 / 8), ({"scaling": 4}, 0.5)])
def test_the_scale_of_fourierft(fields: dict[str, Any], scale: float) -> None:
    (update,) = read("FOURIERFT", {"fourierft_spectrum": [1.0]}, **fields)
    assert isinstance(update, LowRank)
    assert (update.scale, update.rank) == (scale, 2)


@pytest.mark.parametrize(("fields", "scale"), [({}, 25.0), ({"scaling": 4}, 4.0)])
def test_waveft_without_its_transform_is_values_at_places(fields: dict[str, Any], scale: float) -> None:
    (update,) = read("WAVEFT", {"waveft_spectrum": [1.0, 2.0, 3.0]}, use_idwt=False, **fields)
    assert isinstance(update, Dense)
    assert update.scale == scale
    assert sorted(update.delta.load().flatten().tolist()) == [0, 0, 0, 0, 0, 1, 2, 3]
    (whole,) = read("WAVEFT", {"waveft_spectrum": [2.0]}, **fields)
    assert isinstance(whole, Dense)
    assert sorted(abs(whole.delta.load()).flatten().tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("fields", "scale"), [({}, 1.0), ({"alpha": 0}, 1.0), ({"alpha": 6}, 3.0)])
def test_the_scale_of_deft(fields: dict[str, Any], scale: float) -> None:
    own = {"deft_P": [[1.0, 0.0], [0.0, 1.0]], "deft_R": A * 2}
    chain = read("DEFT", own, **fields)
    assert isinstance(chain[0], LowRank)
    assert chain[0].scale == scale
    assert len(read("DEFT", own, para=True, **fields)) == 1


@pytest.mark.parametrize(
    ("shape", "fields", "is_input"),
    [
        ((2, 1), {}, False),
        ((2, 1), {"feedforward_modules": ["q"]}, False),  # the shape decides
        ((1, 2), {}, True),
        ((1, 2), {"feedforward_modules": []}, True),
        ((1, 1), {}, False),
        ((1, 1), {"feedforward_modules": ["q"]}, True),
        ((1, 1), {"feedforward_modules": ["m.q"]}, True),
        ((1, 1), {"feedforward_modules": ["k"]}, False),
        ((1, 1), {"feedforward_modules": r".*\.q"}, True),
        ((1, 1), {"feedforward_modules": r".*\.k"}, False),
        ((1, 2, 1, 1), {}, False),
        ((1, 2, 1, 1), {"feedforward_modules": ["q"]}, True),
    ],
)
def test_which_side_ia3_scales(shape: tuple[int, ...], fields: dict[str, Any], is_input: bool) -> None:
    (update,) = read("IA3", {"ia3_l": torch.ones(shape).tolist()}, **fields)
    assert isinstance(update, Scaled)
    assert (update.shape[0] == 0) is is_input


def test_a_pattern_of_ia3_that_is_not_evaluated_is_refused() -> None:
    with pytest.raises(ConfigError, match="feedforward_modules"):
        read("IA3", {"ia3_l": [[1.0]]}, feedforward_modules="(?=x)q")


def test_a_factor_of_glora_says_how_many_outputs_there_are() -> None:
    zeros = {f"glora_{path}.zeros": [[0.0]] for path in "CDE"}
    own = {**zeros, "glora_A.X": [5.0], "glora_B.Xd": B, "glora_B.Xu": A}
    scaled, added = read("GLORA", own, weights=None)
    assert isinstance(scaled, Scaled)
    assert scaled.rows is not None
    assert scaled.rows.load().tolist() == [6, 6]
    assert product(added).tolist() == [[1, 2, 3, 4], [2, 4, 6, 8]]


@pytest.mark.parametrize(
    ("peft_type", "own", "name", "low"),
    [
        ("ADALORA", {"lora_A": A, "lora_B": B, "lora_E": [[3.0]]}, "init_r", 1),
        ("ROAD", {"road_theta": [1.0, 1.0], "road_alpha": [1.0, 1.0]}, "group_size", 1),
        ("FOURIERFT", {"fourierft_spectrum": [1.0]}, "random_loc_seed", 0),
        ("WAVEFT", {"waveft_spectrum": [1.0]}, "random_loc_seed", 0),
    ],
)
def test_a_number_below_its_least_value_is_refused_by_name(
    peft_type: str, own: dict[str, Any], name: str, low: int
) -> None:
    with pytest.raises(ConfigError, match=name):
        read(peft_type, own, **{name: low - 1})
    if peft_type != "ROAD":
        assert read(peft_type, own, **{name: low})
