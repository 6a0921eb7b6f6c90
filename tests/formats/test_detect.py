"""Which format a bundle is, and what is said where that is not clear."""

from __future__ import annotations

import pytest
import torch
from bundles import bundle

from loraformat import formats
from loraformat.errors import AmbiguousFormat, InvalidJson, NotATensorFile, UnknownFormat, UsageError
from loraformat.formats import dump, litgpt, loralib, minimind, minlora, mlx, native, peft, raschka
from loraformat.model.bundle import Bundle, JsonFile, TensorFile

PAIR = {"q.lora_A": torch.ones(2, 5), "q.lora_B": torch.ones(7, 2)}


def test_formats_are_got_by_name() -> None:
    assert [formats.get(each.NAME) for each in formats.FORMATS] == list(formats.FORMATS)
    with pytest.raises(
        UsageError, match=r"no format \"kohia\".*did you mean kohya.*native, peft, mlx, tinker, gguf, loralib"
    ):
        formats.get("kohia")


@pytest.mark.parametrize(
    ("files", "single", "wanted"),
    [
        ({"lora_config.json": {}}, False, native),
        ({"lora_weights.pt": PAIR}, False, native),
        ({"lora_weights.pt": PAIR}, True, loralib),
        ({"adapter_config.json": {"peft_type": "IA3"}}, False, peft),
        ({"adapter_config.json": {"peft_type": "LORA"}, "renamed.pt": PAIR}, False, peft),
        ({"adapter_model.bin": {}}, False, peft),
        ({"adapter_model.safetensors": PAIR}, True, peft),
        ({"anything.pth": PAIR, "notes.txt": b""}, False, loralib),
        ({"anything.pth": {name: value.T for name, value in PAIR.items()}}, False, dump),
        ({"a.pt": {"q.lora.A": torch.ones(5, 2), "q.lora.B": torch.ones(2, 7)}}, True, raschka),
        ({"a.pt": {"q.lora.A": torch.ones(2, 5), "q.lora.B": torch.ones(7, 2)}}, True, dump),
        ({"a.pt": {"q.lora.A.weight": torch.ones(2, 5), "q.lora.B.weight": torch.ones(5, 2)}}, True, minimind),
        ({"a.pt": {"q.lora.A.weight": torch.ones(2, 5), "q.lora.B.weight": torch.ones(7, 2)}}, True, dump),
        ({"a.pt": {f"q.parametrizations.weight.0.lora_{x}": torch.ones(2, 2) for x in "AB"}}, True, minlora),
        ({"lit_model.pth.lora": PAIR, "hyperparameters.yaml": {}}, False, litgpt),
        ({"adapters.npz": PAIR}, False, mlx),
        ({"adapters.safetensors": PAIR, "adapter_config.json": {"lora_parameters": {}}}, False, mlx),
        ({"x.safetensors": PAIR, "adapter_config.json": {"rank": 2, "alpha": 1, "dropout": 0}}, False, mlx),
    ],
)
def test_detection(files: dict[str, object], single: bool, wanted: object) -> None:
    found, match = formats.detect(bundle(files, single=single))
    assert found is wanted
    assert match.reason


def test_a_folder_of_two_formats_is_ambiguous() -> None:
    with pytest.raises(AmbiguousFormat, match=r"native \(lora_config.*peft \(adapter_model.*--from"):
        formats.detect(bundle({"lora_config.json": {}, "adapter_model.safetensors": PAIR}))


def test_two_configs_are_ambiguous_whatever_weights_lie_beside_them() -> None:
    with pytest.raises(AmbiguousFormat, match=r"native \(lora_config.*peft \(adapter_config\.json has peft_type"):
        formats.detect(bundle({"lora_config.json": {}, "adapter_config.json": {"peft_type": "LORA"}, "x.pt": PAIR}))


def test_an_unknown_folder_says_what_was_looked_for_and_seen() -> None:
    files = {"notes.json": {}, "net.safetensors": {"q.weight": torch.ones(2, 2)}, ".hidden": b""}
    seen = r"found net\.safetensors, notes\.json; net\.safetensors holds q\.weight \(docs/formats"
    with pytest.raises(UnknownFormat, match=rf"looked for lora_config\.json.*{seen}"):
        formats.detect(bundle(files))
    with pytest.raises(UnknownFormat, match="the folder is empty"):
        formats.detect(bundle({}))
    with pytest.raises(UnknownFormat, match="and 4 more"):
        formats.detect(bundle({f"{number}.txt": b"" for number in range(12)}))


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "kohya"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "kohya"),
        ("lycoris_transformer_blocks_0_attn_to_q", "lycoris"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "comfy"),
        ("double_blocks.0.img_attn.qkv", "comfy"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "comfy"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "diffusers"),
        ("transformer_blocks.0.attn.to_q", "diffusers"),
        ("base_model.model.transformer_blocks.0.attn.to_q", "diffusers"),
        ("unet.conv_in", "diffusers"),
        ("blocks.0.attn1.to_q", "diffusers"),
    ],
)
def test_a_file_of_an_image_model_is_told_by_its_names(name: str, format_name: str) -> None:
    content = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    assert format_name == formats.detect(bundle({"x.safetensors": content}, single=True))[0].NAME


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("model.language_model.encoder.layers.0.self_attention", "NeMo"),
        ("blk.0.attn_q", "llama.cpp"),
    ],
)
def test_a_single_file_of_another_dialect_is_refused_by_what_it_looks_like(name: str, dialect: str) -> None:
    """With --alpha it would become a folder of PEFT's under names that no base has."""
    content = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    found = bundle({"x.safetensors": content}, single=True)
    with pytest.raises(UnknownFormat, match=f"looks like.*{dialect}"):
        formats.detect(found)


@pytest.mark.parametrize("name", ["blocks.0.attn.q_proj", "layers.0.attn.wq", "transformer.h.0.attn.c_attn"])
def test_names_of_hand_written_code_are_nobody_s_dialect(name: str) -> None:
    content = {f"{name}.lora_A": torch.ones(2, 4), f"{name}.lora_B": torch.ones(4, 2)}
    found, _ = formats.detect(bundle({"x.pt": content}, single=True))
    assert found.NAME in ("dump", "loralib")


def test_what_is_wrong_with_the_only_weight_file_comes_through() -> None:
    def fail() -> None:
        raise NotATensorFile("this is a Git-LFS pointer", where="x.pt")

    with pytest.raises(NotATensorFile, match="Git-LFS"):
        formats.detect(Bundle("", {"x.pt": TensorFile("x.pt", 130, fail)}, is_single_file=True))


def test_a_config_that_is_no_json_is_no_reason() -> None:
    def fail() -> None:
        raise InvalidJson("line 1", where="adapter_config.json")

    broken = JsonFile("adapter_config.json", 1, lambda: b"{", fail)
    assert peft.sniff(Bundle("", {"adapter_config.json": broken})) is None
