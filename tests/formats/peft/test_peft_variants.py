"""Forms of LoRA that PEFT stores in another way than one pair of factors for each module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bundles import bundle
from oracle import rounded_exactly

from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats import peft
from loraformat.model.adapter import Adapter
from loraformat.model.updates import LowRank, SubtractedInit

P = "base_model.model."


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(tensors: dict[str, torch.Tensor], **fields: Any) -> Adapter:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}
    named = {f"{P}{name}": value for name, value in tensors.items()}
    return peft.read(bundle({"adapter_config.json": config, "adapter_model.safetensors": named}))


def layer(module: str, out: int, cols: int, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": values(rank, cols), f"{module}.lora_B.weight": values(out, rank, seed=1)}


def only(adapter: Adapter, weight: str) -> LowRank:
    (update,) = adapter.updates[weight]
    assert isinstance(update, LowRank)
    return update


def test_stacked_experts_are_expert_major_in_a_and_rank_major_in_b() -> None:
    adapter = read(layer("m.experts", 5, 7, rank=6), target_parameters=["experts.down_proj"])
    update = only(adapter, "m.experts.down_proj")
    assert (update.shape, update.rank, update.scale) == ((3, 5, 7), 2, 2.0)
    a, b = values(6, 7).reshape(3, 2, 7), values(5, 6, seed=1).reshape(5, 2, 3)
    expected = torch.einsum("ore,eri->eoi", b, a)
    assert torch.allclose(update.up.torch() @ update.down.torch(), expected, atol=1e-6)
    assert np.array_equal(update.up.read(1, 2)[0], update.up.load()[1])


def test_the_innermost_layer_is_the_parameter_that_is_registered_first() -> None:
    tensors = {**layer("m.experts.base_layer", 10, 7, rank=6), **layer("m.experts", 7, 5, rank=6)}
    targets = ["experts.down_proj", "experts.gate_up_proj"]
    adapter = read(tensors, target_parameters=targets)
    assert only(adapter, "m.experts.gate_up_proj").shape == (3, 10, 7)
    assert only(adapter, "m.experts.down_proj").shape == (3, 7, 5)


def test_parameters_have_their_own_place_in_patterns() -> None:
    tensors = {**layer("m.experts.base_layer", 10, 7, rank=6), **layer("m.experts", 7, 5, rank=12)}
    targets = ["experts.down_proj", "experts.gate_up_proj"]
    adapter = read(tensors, target_parameters=targets, rank_pattern={"experts.down_proj": 4})
    assert only(adapter, "m.experts.down_proj").rank == 4
    assert adapter.config.declared_ranks["m.experts.down_proj"] == 4


def test_parameters_of_unknown_order_are_refused() -> None:
    tensors = {**layer("m.e.base_layer", 5, 5, rank=6), **layer("m.e", 5, 5, rank=6)}
    with pytest.raises(UnsupportedUpdate, match="v1, w1"):
        read(tensors, target_parameters=["e.w1", "e.v1"])
    with pytest.raises(ConfigError, match="does not explain"):
        read(tensors, target_parameters=["e.w1"])


@pytest.mark.parametrize(("version", "claim"), [("0.17.1", True), ("0.18.0", True), ("0.21.2", None), (None, None)])
def test_old_versions_turn_square_experts(version: str | None, claim: bool | None) -> None:
    adapter = read(layer("m.e", 5, 5, rank=6), target_parameters=["e.w"], peft_version=version)
    assert adapter.config.transposes_square_experts is claim


def test_square_experts_of_the_version_that_mixed_them_up_are_refused() -> None:
    with pytest.raises(UnsupportedUpdate, match=r"0\.19\.0"):
        read(layer("m.e", 5, 5, rank=6), target_parameters=["e.w"], peft_version="0.19.0")
    assert read(layer("m.e", 5, 7, rank=6), target_parameters=["e.w"], peft_version="0.19.0").updates


def test_attention_in_one_module_adds_its_output_twice() -> None:
    adapter = read({**layer("m.mha", 12, 4), **layer("m.mha.base_layer.out_proj", 4, 4)})
    assert only(adapter, "m.mha.in_proj_weight").scale == 2.0
    assert only(adapter, "m.mha.out_proj.weight").scale == 4.0


@pytest.mark.parametrize(
    ("pairs", "layers"), [([[0, 2], [1, 3]], (0, 1, 1, 2)), ([], None), (None, None), ([[2, 4]], (2, 3))]
)
def test_replicated_layers_are_a_list(pairs: list[list[int]] | None, layers: tuple[int, ...] | None) -> None:
    assert read(layer("m.q", 4, 4), layer_replication=pairs).config.layers == layers


@pytest.mark.parametrize("pairs", [[[0, 10**9]], [[0]], [3], "0-2", [[2, 2]], [[0, 10_000], [0, 1]], [[0, 32]] * 400])
def test_no_list_of_layers_is_refused(pairs: object) -> None:
    with pytest.raises(ConfigError, match="layer_replication"):
        read(layer("m.q", 4, 4), layer_replication=pairs)


@pytest.mark.parametrize(
    ("fields", "recipe"),
    [
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"kasa_config": {}}, "kasa"),
    ],
)
def test_a_changed_base_is_an_update_of_its_own(fields: dict[str, Any], recipe: str) -> None:
    first, second = read(layer("m.q", 4, 6), **fields).updates["m.q.weight"]
    assert first == SubtractedInit(recipe, 2, 2.0, (4, 6))
    assert isinstance(second, LowRank)


def test_kasa_has_a_diagonal_between_the_factors() -> None:
    adapter = read({**layer("m.q", 4, 6), "m.q.lora_diag": torch.tensor([2.0, 3.0])}, kasa_config={})
    _, update = adapter.updates["m.q.weight"]
    assert isinstance(update, LowRank)
    assert torch.equal(update.down.torch(), values(2, 6) * torch.tensor([[2.0], [3.0]]))
    assert adapter.unclaimed == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_diagonal_of_16_bits_is_worked_in_with_one_rounding(dtype: torch.dtype) -> None:
    pair = {name: value.to(dtype) for name, value in layer("m.q", 4, 60).items()}
    diagonal = values(2, seed=3).to(dtype)
    down = read({**pair, "m.q.lora_diag": diagonal}, kasa_config={}).updates["m.q.weight"][1].down
    # exact in float64, which has more than twice the digits
    exact = diagonal.double()[:, None] * pair["m.q.lora_A.weight"].double()
    assert down.torch().flatten().tolist() == [rounded_exactly(value, dtype) for value in exact.flatten().tolist()]


def test_block_diagonal_factors_become_whole() -> None:
    blocks = {"target_modules_bd_a": ["q_"], "target_modules_bd_b": ["o_"], "nblocks": 2}
    tensors = {"m.q_proj.lora_A.weight": values(4, 3), "m.q_proj.lora_B.weight": values(8, 4)}
    tensors |= {"m.o_proj.lora_A.weight": values(4, 3), "m.o_proj.lora_B.weight": values(8, 2)}
    adapter = read(tensors, use_bdlora=blocks, r=4)
    assert torch.equal(only(adapter, "m.q_proj.weight").down.torch(), torch.block_diag(*values(4, 3).chunk(2)))
    assert torch.equal(only(adapter, "m.o_proj.weight").up.torch(), torch.block_diag(*values(8, 2).chunk(2)))
    assert np.array_equal(only(adapter, "m.o_proj.weight").up.read(3, 5), torch.block_diag(*values(8, 2).chunk(2))[3:5])


def test_block_diagonal_factors_of_one_block_are_whole() -> None:
    """One is PEFT's default."""
    parts = {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["k"]}
    adapter = read({**layer("m.q", 4, 6), **layer("m.k", 4, 6)}, use_bdlora=parts)
    for name in ("m.q.weight", "m.k.weight"):
        assert torch.equal(only(adapter, name).down.torch(), values(2, 6))
        assert torch.equal(only(adapter, name).up.torch(), values(4, 2, seed=1))
    with pytest.raises(ConfigError, match="use_bdlora"):
        read(layer("m.q", 4, 6), use_bdlora={**parts, "nblocks": 0})


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True], [True, True], [False, False, True]])
def test_the_parts_of_a_joined_layer_that_are_not_adapted_are_zero(enabled: list[bool]) -> None:
    """A holds the ranks of the adapted parts one after the other, B their rows."""
    count, height = sum(enabled), 3
    a, b = values(2 * count, 5), values(height * count, 2, seed=1)
    tensors = {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b.unsqueeze(-1)}
    update = only(read(tensors, enable_lora=enabled), "m.q.weight")
    products = iter([one @ other for one, other in zip(b.chunk(count), a.chunk(count), strict=True)])
    wanted = torch.cat([next(products) if is_on else torch.zeros(height, 5) for is_on in enabled])
    assert update.shape == (height * len(enabled), 5)
    torch.testing.assert_close(update.up.torch() @ update.down.torch(), wanted)


@pytest.mark.parametrize(("a", "b"), [((4, 5), (6, 2)), ((6, 5), (7, 2)), ((2, 5), (9, 2))])
def test_factors_of_other_parts_than_those_of_a_joined_layer_are_refused(
    a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="the 3 parts that enable_lora names"):
        read({"m.q.lora_A.weight": values(*a), "m.q.lora_B.weight": values(*b, 1)}, enable_lora=[True, True, True])


def test_what_only_training_needs_is_left_out_with_a_note() -> None:
    extra = {"m.q.lora_velora_embed": values(3), "m.q.lora_monteclora_sampler.std": values(3)}
    adapter = read({**layer("m.q", 4, 4), **extra})
    assert [note.code for note in adapter.notes] == ["LF203"]
    assert (list(adapter.updates), adapter.unclaimed) == (["m.q.weight"], {})


def test_too_many_names_of_blocks_are_refused() -> None:
    """Each would be looked for in the name of each module."""
    blocks = {"target_modules_bd_a": [f"x{number}" for number in range(1001)], "nblocks": 1}
    with pytest.raises(ConfigError, match="more than 1000 names"):
        read(layer("m.q", 4, 4), use_bdlora=blocks)
