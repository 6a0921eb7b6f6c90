"""The two experts of Wan 2.2: a file for each, by their names, by a folder of both, or by what the caller says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from oracle import dense
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.cli import main
from loraformat.errors import AssumptionContradicted, FormatError, UnknownFormat

MODULES = ("blocks.0.self_attn.q", "blocks.0.ffn.0")
NAMES = ("blocks.0.attn1.to_q", "blocks.0.ffn.net.0.proj")


def expert(path: Path, seed: float, prefix: str = "diffusion_model.") -> Path:
    """A file for one expert; nothing in it says for which."""
    tensors = {}
    for module in MODULES:
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.full((2, 8), seed)
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.ones(8, 2)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    expert(tmp_path / "pair" / "style_high_noise.safetensors", 1.0)
    expert(tmp_path / "pair" / "style_low_noise.safetensors", 3.0)
    return tmp_path / "pair"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    index: dict[str, object] = {"_class_name": "WanPipeline"}
    for component in ("transformer", "transformer_2"):
        (folder / component).mkdir(parents=True)
        tensors = {f"{name}.weight": torch.randn(8, 8) for name in NAMES}
        save_file(tensors, folder / component / "diffusion_pytorch_model.safetensors")
        (folder / component / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
        index[component] = ["diffusers", "WanTransformer3DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def changes(base: Path, out: Path) -> dict[str, float]:
    """Component → what each of its values was changed by."""
    found = {}
    for component in ("transformer", "transformer_2"):
        name = f"{component}/diffusion_pytorch_model.safetensors"
        before, after = load_file(base / name), load_file(out / name)
        deltas = torch.cat([(after[key] - before[key]).flatten() for key in before])
        torch.testing.assert_close(deltas, deltas[0].expand_as(deltas), rtol=1e-5, atol=1e-5)
        found[component] = round(float(deltas[0]), 3)
    return found


def test_a_folder_with_both_files_goes_to_both(pair: Path, base: Path, tmp_path: Path) -> None:
    found = loraformat.load_adapter(pair)
    assert {name.partition(".")[0]: float(dense(chain[0])[0, 0]) for name, chain in found.updates.items()} == {
        "transformer": 2.0,
        "transformer_2": 6.0,
    }
    report = loraformat.merge(base, [pair], tmp_path / "out", verify="full")
    assert changes(base, tmp_path / "out") == {"transformer": 2.0, "transformer_2": 6.0}
    assert report.data.tensors_touched == 4
    assert not [finding for finding in report.findings if finding.code == "LF222"]
    loraformat.convert(pair, tmp_path / "diffusers", to="diffusers")
    assert set(loraformat.load_adapter(tmp_path / "diffusers").updates) == set(found.updates)


def test_the_name_of_a_file_tells(pair: Path, base: Path, tmp_path: Path) -> None:
    loraformat.merge(base, [pair / "style_low_noise.safetensors"], tmp_path / "low")
    assert changes(base, tmp_path / "low") == {"transformer": 0.0, "transformer_2": 6.0}
    both = [pair / "style_high_noise.safetensors", f"{pair / 'style_low_noise.safetensors'}=0.5"]
    loraformat.merge(base, both, tmp_path / "out")
    assert changes(base, tmp_path / "out") == {"transformer": 2.0, "transformer_2": 3.0}


def test_where_no_name_tells_the_caller_must(base: Path, tmp_path: Path) -> None:
    file = expert(tmp_path / "style.safetensors", 1.0)
    with pytest.raises(FormatError, match="which one this is for") as refused:
        loraformat.merge(base, [file], tmp_path / "out")
    assert "--component" in refused.value.hint
    arguments = ["merge", str(base), str(file), "-o", str(tmp_path / "out"), "--component", "transformer_2"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert changes(base, tmp_path / "out") == {"transformer": 0.0, "transformer_2": 2.0}
    twice = CliRunner().invoke(main, [*arguments, "--assume", "component=transformer"])
    assert twice.exit_code == 2
    assert "twice" in twice.output
    assert CliRunner().invoke(main, [*arguments[:-1], "nonsense"]).exit_code == 2


def test_a_file_beside_one_that_tells_takes_what_is_assumed(pair: Path, base: Path, tmp_path: Path) -> None:
    file = expert(tmp_path / "style.safetensors", 1.0)
    said = loraformat.Assumptions(component="transformer_2")
    loraformat.merge(base, [pair / "style_high_noise.safetensors", file], tmp_path / "out", assumptions=said)
    assert changes(base, tmp_path / "out") == {"transformer": 2.0, "transformer_2": 2.0}


def test_what_contradicts_the_name_is_refused(pair: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(AssumptionContradicted, match="the file is named like"):
        loraformat.merge(
            base,
            [pair / "style_high_noise.safetensors"],
            tmp_path / "out",
            assumptions=loraformat.Assumptions(component="transformer_2"),
        )


def test_a_pair_is_not_for_one_transformer(pair: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="one file for each of two transformers"):
        loraformat.merge(base / "transformer", [pair], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["style_high.safetensors", "other.safetensors"])
def test_two_files_that_are_no_pair_are_refused(pair: Path, name: str) -> None:
    (pair / "style_low_noise.safetensors").rename(pair / name)
    with pytest.raises(UnknownFormat):
        loraformat.load_adapter(pair)


def test_a_pair_with_a_damaged_file_is_refused(pair: Path) -> None:
    tensors = load_file(pair / "style_low_noise.safetensors")
    del tensors["diffusion_model.blocks.0.ffn.0.lora_B.weight"]
    save_file(tensors, pair / "style_low_noise.safetensors")
    with pytest.raises(FormatError, match="lora_up is missing"):
        loraformat.load_adapter(pair)
