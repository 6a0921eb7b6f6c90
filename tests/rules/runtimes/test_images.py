"""Verdicts on spellings, without the programs: what they say, and where they say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraformat.diagnostics import Finding
from loraformat.jobs.explain import explain_target
from loraformat.jobs.validate import validate
from loraformat.rules.targets import parse

FIXTURES = Path(__file__).parents[3] / "fixtures" / "good"
WAN = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v")
WHOLE = (*WAN, "cross_attn.o", "ffn.0", "ffn.2")


def wan(path: Path, blocks: dict[int, tuple[str, ...]], prefix: str = "lora_unet_") -> Path:
    """A file of musubi-tuner."""
    tensors = {}
    for number, modules in blocks.items():
        for module in modules:
            stem = f"{prefix}blocks_{number}_{module.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = torch.ones(2, 8)
            tensors[f"{stem}.lora_up.weight"] = torch.ones(8, 2)
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


def found(path: Path, target: str) -> list[Finding]:
    return [one for one in validate(path, target=[target]).findings if one.code.startswith("LF6")]


def test_blocks_that_lack_a_module_are_refused_by_a_reader_that_counts_on_all(tmp_path: Path) -> None:
    assert not found(wan(tmp_path / "whole.safetensors", {0: WHOLE, 1: WHOLE}), "diffusers")
    for name, blocks, lacking in (
        ("lacking", {0: WHOLE, 1: WHOLE[:-1]}, "blocks.1.ffn.2 missing"),
        ("gap", {0: WHOLE, 2: WHOLE}, "block 1 missing"),
        ("attention", {0: WAN, 1: WAN}, "blocks.0.cross_attn.o missing"),
    ):
        (one,) = found(wan(tmp_path / f"{name}.safetensors", blocks), "diffusers")
        assert one.code == "LF622"
        assert lacking in one.message
        assert "convert ADAPTER --to diffusers" in one.hint
    assert not found(tmp_path / "attention.safetensors", "comfyui")


@pytest.mark.parametrize("target", ["diffusers==0.30", "diffusers>=9.9", "comfyui==0.1"])
def test_of_another_version_nothing_is_claimed(target: str, tmp_path: Path) -> None:
    (one,) = found(wan(tmp_path / "lora.safetensors", {1: WAN}), target)
    assert one.code == "LF625"
    assert "is unknown" in one.message
    assert parse(target).version in one.message


def test_each_spelling_of_a_text_encoder_in_the_table_is_read_and_no_other() -> None:
    spellings = parse("diffusers").spellings
    assert spellings is not None
    assert spellings.encoders is not None
    rows = [
        (family, component, row)
        for family, encoders in spellings.encoders.items()
        for component, several in encoders.items()
        for row in several
    ]
    assert len({family for family, _, _ in rows}) >= 5
    for family, component, row in rows:
        encoder, _, denoiser = row.split(" ", 2)
        assert spellings.of(family, denoiser) is not None, row
        assert spellings.reads_encoder(family, component, [encoder], [denoiser]), row
        assert not spellings.reads_encoder(family, component, ["lora_te9_"], [denoiser]), row


def test_a_text_encoder_without_out_proj_next_to_a_denoiser_is_refused() -> None:
    (one,) = found(FIXTURES / "kohya" / "tiny-flux" / "lora.safetensors", "diffusers")
    assert one.code == "LF622"
    assert "text_encoder has kohya's names but no out_proj module, by which diffusers" in one.message
    assert '; it refuses the file: "ValueError' in one.message
    assert "convert ADAPTER --to diffusers" in one.hint


def test_two_spellings_in_one_file_are_not_judged(tmp_path: Path) -> None:
    wan(tmp_path / "one.safetensors", {0: WHOLE})
    tensors = {f"diffusion_model.blocks.1.self_attn.q.lora_{side}.weight": torch.ones(8, 8) for side in "AB"}
    from safetensors.torch import load_file

    save_file(load_file(tmp_path / "one.safetensors") | tensors, tmp_path / "two.safetensors")
    (one,) = found(tmp_path / "two.safetensors", "diffusers")
    assert one.code == "LF625"
    assert "diffusion_model.… (original module names; lora_A" in one.message
    assert "lora_unet_… (original module names; lora_down" in one.message


def test_the_page_of_a_program_lists_what_it_reads() -> None:
    page = explain_target("diffusers")
    assert page is not None
    row = next(line for line in page.splitlines() if line.startswith("| sd3 |"))
    assert "`transformer. diffusers lora_A`" in row
    assert "lora_transformer_" not in row
    assert "| sd3 |" in (explain_target("comfyui") or "")
    assert "spelled" not in (explain_target("vllm") or "")
