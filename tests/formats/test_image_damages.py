"""Half, mixed and damaged files of image models: read as they stand, or refused by name; never a part in silence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import bundle, loaded, tensors
from image_models import FAMILIES, KINDS, adapter_of
from torch import Tensor

from loraformat import formats
from loraformat.diagnostics import Severity
from loraformat.errors import ConfigError, FormatError, LoraFormatError
from loraformat.formats.kit.base import Hints
from loraformat.model.adapter import Adapter
from loraformat.naming.families import family_named

GOOD = Path(__file__).parents[2] / "fixtures" / "good"
HELD = {
    "kohya": ("linear", "convolution", "dora by output", "dora by input"),
    "comfy": KINDS,
    "lycoris": ("linear", "LoHa", "LoKr", "dense"),
    "diffusers": ("linear", "mixed scales", "dora by output", "bias"),
}
SCANNED = [
    (target, kind, FAMILIES[(n * 5 + m) % len(FAMILIES)])
    for n, (target, kinds) in enumerate(HELD.items())
    for m, kind in enumerate(kinds)
]


def read(content: dict[str, Tensor], metadata: dict[str, str] | None = None, **hints: Any) -> Adapter:
    from dataclasses import replace

    found = bundle({"x.safetensors": replace(tensors(content), metadata=metadata or {})}, single=True)
    return formats.detect(found)[0].read(found, hints=Hints(**hints))


def pair(
    module: str, rows: int = 8, cols: int = 8, rank: int = 2, ends: tuple[str, str] = ("down", "up")
) -> dict[str, Tensor]:
    return {
        f"{module}.lora_{ends[0]}.weight": torch.ones(rank, cols),
        f"{module}.lora_{ends[1]}.weight": torch.ones(rows, rank),
    }


def one(name: str) -> dict[str, Tensor]:
    return {name: torch.ones(2, 2)}


def is_noticed(content: dict[str, Any], whole: Adapter) -> bool:
    """Whether a file cannot be read, is warned of, or lacks a weight that the whole one has."""
    try:
        [found] = [formats.detect(bundle(content))[0].read(bundle(content))]
    except LoraFormatError:
        return True
    noticed = any(note.severity >= Severity.WARNING for note in found.notes)
    return noticed or bool(found.unclaimed) or found.updates.keys() != whole.updates.keys()


@pytest.mark.parametrize(("target", "kind", "family"), SCANNED)
def test_a_tensor_that_is_dropped_or_renamed_is_noticed(target: str, kind: str, family: str) -> None:
    each, chance = formats.get(target), random.Random(f"{target}{kind}{family}")
    good = loaded(each.write(adapter_of(family_named(family), kind)))
    whole = each.read(bundle(good))
    [(file, found)] = good.items()
    entries = dict(found.entries) if hasattr(found, "entries") else dict(found)
    for name in chance.sample(sorted(entries), 12):
        rest = {other: tensor for other, tensor in entries.items() if other != name}
        renamed = rest | {name.replace(".", "x.", 1) if chance.random() < 0.5 else f"{name}2": entries[name]}
        for damaged in (rest, renamed):
            content = found if not hasattr(found, "entries") else type(found)(found.container, damaged, found.metadata)
            assert is_noticed({file: content if hasattr(found, "entries") else damaged}, whole), name


FLUX = pair("lora_unet_double_blocks_0_img_mod_lin", 48) | pair("lora_unet_double_blocks_0_txt_mod_lin", 48)
LINEAR2, FC1 = "lora_unet_single_blocks_0_linear2", "text_model_encoder_layers_0_mlp_fc1"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pair(QKV, 25), "25 rows cannot be those of to_q, to_k, to_v"),
        (pair(QKV, 24) | pair("lora_unet_double_blocks_0_img_attn_gate"), "img_attn_gate"),
        (FLUX | one(f"{LINEAR2}.lora_down.weight"), "linear2: lora_up is missing"),
        (pair(QKV, 24) | {f"{QKV}.lora_A.weight": torch.ones(2, 8)}, "are the same tensor of one module"),
        (FLUX | pair("transformer.transformer_blocks.0.attn.to_out.0"), "it has the diffusers name"),
        (pair(QKV, 24) | {f"{QKV}.oft_blocks": torch.ones(2, 2, 2)}, "updates of OFT are not supported"),
        (pair(QKV, 24) | {f"{QKV}.alpha": torch.tensor(float("nan"))}, "alpha: expected a finite number"),
        (pair(QKV, 24) | {f"{QKV}.alpha": torch.tensor(0.0)}, "alpha is 0"),
        (pair(QKV, 24) | {f"{QKV}.alpha": torch.ones(2)}, "expected one number"),
        (pair(QKV, 24) | {f"{QKV}.dora_scale": torch.ones(1, 8)}, "cannot be split"),
        (pair(QKV, 24) | {"logit_scale": torch.ones(1)}, "logit_scale"),
        (pair(f"lora_te_{FC1}") | pair(f"lora_te1_{FC1}"), "one is a leftover"),
        (pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q"), "pass the base with --base"),
        (pair("lora_unet_double_blocks_0_img_mlp_0", 40), "mean different weights"),
        (one("lora_unet_conv_in.hada_w1_a") | one("lora_unet_conv_in.lora_down.weight"), "LoRA and of LoHa"),
        (one("lora_unet_conv_in.lokr_w1"), "lokr_w2 is missing"),
    ],
)
def test_what_is_half_or_damaged_is_refused_by_name(content: dict[str, Tensor], said: str) -> None:
    with pytest.raises(LoraFormatError, match=said):
        read(content)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ('{"unet.r": 2,', "lora_adapter_metadata is not valid JSON"),
        ("[]", "expected an object"),
        ('{"r": 2}', "expected names such as"),
        ('{"unet.r": 4, "unet.lora_alpha": 4}', "states rank 4 for unet.conv_in, its tensors have 2"),
        ('{"unet.r": 2, "unet.lora_alpha": "x"}', "expected a number"),
        ('{"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"(conv_i)n(?=x)": 1}}', "could take forever"),
        ('{"unet.r": 2, "unet.lora_alpha": 4, "unet.use_rslora": 1}', "expected true or false"),
    ],
)
def test_a_header_that_states_a_scale_is_believed_or_refused(stated: str, said: str) -> None:
    content = pair("unet.conv_in", ends=("A", "B"))
    with pytest.raises(ConfigError, match=said):
        read(content, {"lora_adapter_metadata": stated})


def scale(content: dict[str, Tensor], metadata: dict[str, str] | None = None, **hints: Any) -> float | None:
    [[update]] = read(content, metadata, **hints).updates.values()
    return update.scale


def test_where_the_scale_stands() -> None:
    content, alpha = pair("unet.conv_in", ends=("A", "B")), {"unet.conv_in.alpha": torch.tensor(3.0)}
    stated = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"^conv_in": 5}}
    assert scale(content) == 1.0
    assert scale(content | alpha) == 1.5
    assert scale(content, {"ss_network_alpha": "8", "ss_network_dim": "2"}) == 1.0, "history, not a scale"
    assert scale(content, {"lora_adapter_metadata": json.dumps(stated)}) == 2.5
    assert scale(content, {"lora_adapter_metadata": json.dumps(stated | {"unet.use_rslora": True})}) == 5 / 2**0.5
    with pytest.raises(ConfigError, match=r"alpha 3 gives a scale of 1\.5, but lora_adapter_metadata states 2\.5"):
        scale(content | alpha, {"lora_adapter_metadata": json.dumps(stated)})
    assert scale(content, alpha=4.0) == 2.0
    with pytest.raises(LoraFormatError, match="was given"):
        scale(content | alpha, alpha=4.0)


@pytest.mark.parametrize(
    ("module", "component"),
    [
        ("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "unet"),
        ("double_blocks_0_img_mod_lin", "transformer"),
    ],
)
def test_an_unknown_module_does_not_move_the_others_to_another_component(module: str, component: str) -> None:
    known = pair(f"lora_unet_{module}", 48)
    half = read(known | pair("lora_unet_no_such_thing"), is_partial=True)
    assert half.config.pipeline is not None
    assert half.config.pipeline.components == (component,)
    assert half.updates.keys() == read(known).updates.keys()


def test_the_remedy_for_unknown_modules_names_the_verb_that_has_the_option() -> None:
    with pytest.raises(FormatError) as refused:
        read(pair(QKV, 24) | pair("lora_unet_no_such_thing"))
    assert refused.value.hint.startswith("use convert --partial ")


def test_partial_reads_the_rest_and_names_every_tensor_that_it_leaves_out() -> None:
    strange = pair("lora_unet_double_blocks_0_img_attn_gate") | {"logit_scale": torch.ones(1)}
    found = read(pair(QKV, 24) | pair("lora_unet_double_blocks_0_img_mod_lin", 48) | strange, is_partial=True)
    assert sorted(weight.rpartition(".")[0].rpartition(".")[2] for weight in found.updates) == [
        "linear",
        "to_k",
        "to_q",
        "to_v",
    ]
    said = " ".join(note.message for note in found.notes if note.code == "LF249")
    assert all(name in said for name in strange)


def test_trained_embeddings_beside_an_adapter_are_reported_and_kept() -> None:
    content = pair("lora_unet_conv_in") | {"bundle_emb.token.clip_l": torch.ones(2, 8)}
    found = read(content)
    assert list(found.unclaimed) == ["bundle_emb.token.clip_l"]
    assert [note.code for note in found.notes] == ["LF249"]
    assert not read(content, is_partial=True).unclaimed


def test_a_header_about_another_component_is_an_error() -> None:
    said = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})}
    notes = read(pair("unet.conv_in", ends=("A", "B")), said).notes
    assert [(note.code, note.severity) for note in notes] == [("LF225", Severity.ERROR)]


def test_two_namings_in_one_file_are_named_as_that() -> None:
    original = pair("lora_unet_input_blocks_1_0_in_layers_2") | pair("lora_unet_input_blocks_2_0_in_layers_2")
    with pytest.raises(FormatError, match="it has the diffusers name, but the other modules of the file have original"):
        read(original | pair("lora_unet_down_blocks_1_resnets_0_conv1"))


def test_bookkeeping_of_sliders_is_named_and_changes_nothing() -> None:
    found = read(pair(QKV, 24) | {"_aux.step": torch.ones(1)})
    assert len(found.updates) == 3
    assert ["_aux.step" in note.message for note in found.notes] == [True]


def test_shapes_tell_flux_1_from_flux_2() -> None:
    name = "lora_unet_double_blocks_0_img_mlp_0"
    assert list(read(pair(name, 32)).updates) == ["transformer.transformer_blocks.0.ff.net.0.proj.weight"]
    assert list(read(pair(name, 48)).updates) == ["transformer.transformer_blocks.0.ff.linear_in.weight"]
    stated = {"ss_base_model_version": "flux2"}
    assert list(read(pair(name, 40), stated).updates) == ["transformer.transformer_blocks.0.ff.linear_in.weight"]


def test_a_base_of_an_unknown_model_tells_by_exact_and_by_flattened_names() -> None:
    weights = {f"transformer.novel.{n}.cross_block.to_x.weight": (8, 8) for n in range(2)}
    hints: dict[str, Any] = {"weights": weights, "components": ("transformer",)}
    assert list(read(pair("lora_unet_novel_1_cross_block_to_x"), **hints).updates) == [
        "transformer.novel.1.cross_block.to_x.weight"
    ]
    assert list(read(pair("diffusion_model.novel.0.cross_block.to_x"), **hints).updates) == [
        "transformer.novel.0.cross_block.to_x.weight"
    ]
    twins = {"transformer.a.b_c.weight": (8, 8), "transformer.a_b.c.weight": (8, 8)}
    with pytest.raises(FormatError, match="a_b_c"):
        read(pair("lora_unet_a_b_c"), weights=twins, components=("transformer",))


def test_parts_have_the_rows_of_the_base() -> None:
    """Grouped queries: 2 of 6 heads for keys and values."""
    sizes = dict(zip("qkv", (12, 4, 4), strict=True))
    weights = {f"transformer.layers.0.attention.to_{part}.weight": (rows, 12) for part, rows in sizes.items()}
    found = read(pair("diffusion_model.layers.0.attention.qkv", 20, 12), weights=weights, components=("transformer",))
    assert {weight: chain[0].shape for weight, chain in found.updates.items()} == weights


def test_wan_s_experts_are_told_by_the_file_s_name_or_asked_for() -> None:
    names = [f"{part}.blocks.0.attn1.to_q.weight" for part in ("transformer", "transformer_2")]
    base: dict[str, Any] = {"weights": dict.fromkeys(names, (8, 8)), "components": ("transformer", "transformer_2")}
    content = pair("diffusion_model.blocks.0.self_attn.q")
    for file, wanted in (("x_high_noise.safetensors", names[0]), ("Wan-LOW.safetensors", names[1])):
        found = bundle({file: content}, single=True)
        assert list(formats.detect(found)[0].read(found, hints=Hints(**base)).updates) == [wanted]
    with pytest.raises(FormatError, match="--component transformer_2"):
        read(content, **base)
    assert list(read(content, **base, component="transformer_2").updates) == [names[1]]
