"""Blocks in the words of those who train and weigh them, in the order in which an image passes them."""

from __future__ import annotations

import itertools

import pytest

from loraformat.naming.families import DIFFUSERS, ORIGINAL, block_of, block_order, denoisers, family_named

UNETS = {
    "sd": (
        [f"IN{number:02}" for number in range(12)],
        [f"OUT{number:02}" for number in range(12)],
    ),
    "sdxl": ([f"IN{number:02}" for number in range(9)], [f"OUT{number:02}" for number in range(9)]),
}


@pytest.mark.parametrize("family", UNETS)
def test_a_unet_has_the_blocks_of_its_original(family: str) -> None:
    """Counts: 4 and 3 levels of 2 resnets and a downsampler, and of 3 on the way up."""
    found = {
        block_of("unet", name.format(*itertools.repeat("0", 9)), family_named(family), DIFFUSERS)
        for module in family_named(family).modules
        for name in module.diffusers
    }
    inside, outside = UNETS[family]
    assert sorted(found - {""}, key=block_order) == [*inside, "MID", *outside]


@pytest.mark.parametrize("family", [each.name for each in denoisers()])
def test_a_module_has_the_same_block_under_both_names(family: str) -> None:
    table = family_named(family)
    for module in table.modules:
        numbers = ["3"] * module.original.count("{}")
        original = block_of(table.component, module.original.format(*numbers), table, ORIGINAL)
        for name in module.diffusers:
            assert block_of(table.component, name.format(*numbers), table, DIFFUSERS) == original, name
        assert bool(original) or not numbers, module.original


@pytest.mark.parametrize(
    ("component", "module", "label"),
    [
        ("text_encoder", "text_model.encoder.layers.11.self_attn.q_proj", "te1 11"),
        ("text_encoder_2", "transformer.resblocks.4.attn", "te2 4"),
        ("text_encoder_3", "encoder.block.7.layer.0.SelfAttention.q", "te3 7"),
        ("text_encoder", "text_model.final_layer_norm", ""),
        ("transformer_2", "blocks.5.attn1.to_q", "transformer_2 block 5"),
        ("transformer", "something.5.to_q", ""),
        ("transformer", "transformer_blocks.5.to_q", "block 5"),
    ],
)
def test_encoders_experts_and_models_that_no_table_has(component: str, module: str, label: str) -> None:
    family = family_named("wan") if component == "transformer_2" else None
    assert block_of(component, module, family, DIFFUSERS) == label


def test_blocks_are_in_the_order_of_the_model() -> None:
    wanted = ["te1 2", "te1 10", "te2 0", "IN02", "IN10", "MID", "OUT00", "double 2", "double 10", "single 0"]
    wanted += ["block 3", "noise 0", "context 1", "layer 2", "transformer_2 block 0", "transformer_2 block 11"]
    shuffled = wanted[1::2] + wanted[::2]
    assert sorted(shuffled, key=block_order) == wanted
