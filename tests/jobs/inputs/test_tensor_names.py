"""Names that nobody knows: mapped by the caller's expressions, and maps that shapes leave no choice about."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraformat
from loraformat.cli import main
from loraformat.errors import FormatError, UsageError

SIZES = {"wq": (8, 8), "wv": (4, 8), "ff_in": (12, 8), "ff_out": (8, 12)}
NAMES = {"self_attn.q_proj": (8, 8), "self_attn.v_proj": (4, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}
MAPS = [
    (r"^net\.h\.", "model.layers."),
    (r"\.wq\.", ".self_attn.q_proj."),
    (r"\.wv\.", ".self_attn.v_proj."),
    (r"\.ff_in\.", ".mlp.up_proj."),
    (r"\.ff_out\.", ".mlp.down_proj."),
]


def factors(*, transposed: bool = False) -> dict[str, Tensor]:
    found = {}
    for layer in range(3):
        for name, (rows, cols) in SIZES.items():
            down, up = torch.randn(2, cols), torch.randn(rows, 2)
            found[f"net.h.{layer}.{name}.lora_down.weight"] = down.T.contiguous() if transposed else down
            found[f"net.h.{layer}.{name}.lora_up.weight"] = up.T.contiguous() if transposed else up
    return found


def adapter(folder: Path, tensors: dict[str, Tensor]) -> str:
    path = folder / "mine.safetensors"
    save_file(tensors, path)
    return str(path)


def base(folder: Path, names: dict[str, tuple[int, int]] = NAMES) -> str:
    tensors = {
        f"model.layers.{layer}.{n}.weight": torch.zeros(shape) for layer in range(4) for n, shape in names.items()
    }
    path = folder / "base"
    path.mkdir()
    save_file({**tensors, "model.norm.weight": torch.zeros(8)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(path)


def test_maps_apply_one_after_the_other(tmp_path: Path) -> None:
    tensors = factors()
    report = loraformat.convert(adapter(tmp_path, tensors), tmp_path / "out", to="peft", alpha=4, maps=MAPS)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(written) == len(report.data.renamed) == len(tensors)
    for each in report.data.renamed:
        path = each.after.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        assert torch.equal(written[f"base_model.model.{path}"], tensors[each.before])


def test_a_dry_run_shows_the_table_and_what_matches_nothing(tmp_path: Path) -> None:
    source = adapter(tmp_path, factors())
    found = loraformat.convert(source, tmp_path / "out", to="peft", alpha=4, maps=[*MAPS, ("x+", "y")], dry_run=True)
    assert found.data.idle_maps == ("x+",)
    assert len(found.data.renamed) == 24
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=re.escape("no tensor name matches x+")):
        loraformat.convert(source, tmp_path / "out", to="peft", alpha=4, maps=[*MAPS, ("x+", "y")])


@pytest.mark.parametrize("fault", ["no format", "no scale"])
def test_a_dry_run_of_an_adapter_that_is_refused_lists_the_names(fault: str, tmp_path: Path) -> None:
    tensors = factors() if fault == "no scale" else {f"{name}.x": value for name, value in factors().items()}
    maps = [part for rule in MAPS for part in ("--map", *rule)]
    arguments = ["convert", adapter(tmp_path, tensors), "--to", "peft", "-o", str(tmp_path / "out"), *maps, "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0
    ending = "" if fault == "no scale" else ".x"
    before, after = "net.h.1.wq.lora_up.weight", "model.layers.1.self_attn.q_proj.lora_up.weight"
    assert f"renamed {before}{ending} → {after}{ending}\n" in result.output
    assert result.output.count("renamed ") == 24
    assert "error[" in result.output


@pytest.mark.parametrize(
    ("maps", "error", "said"),
    [
        ([(r"net\.h\.\d", "m")], FormatError, "two tensors the name"),
        ([("(net", "m")], UsageError, "not a regular expression"),
        ([("net", r"\7")], UsageError, "not a replacement"),
        ([(".*", "")], FormatError, "a name of 0 characters"),
        ([(".", "x" * 100)], FormatError, "a name of .* characters"),
    ],
)
def test_maps_that_cannot_be_used_are_refused(
    tmp_path: Path, maps: list[tuple[str, str]], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        loraformat.convert(adapter(tmp_path, factors()), tmp_path / "out", to="peft", alpha=4, maps=maps)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_too_long_is_not_searched(tmp_path: Path) -> None:
    source = adapter(tmp_path, {f"{'a' * 5000}.lora_{n}.weight": torch.zeros(2, 2) for n in ("down", "up")})
    with pytest.raises(FormatError, match="at most 1000"):
        loraformat.convert(source, tmp_path / "out", to="peft", alpha=4, maps=[("(a|a)*b", "c")])


@pytest.mark.parametrize("transposed", [False, True])
def test_proposed_maps_give_the_names_of_the_base(tmp_path: Path, transposed: bool) -> None:
    source, model = adapter(tmp_path, factors(transposed=transposed)), base(tmp_path)
    report = loraformat.propose_map(source, model)
    assert not report.written
    maps = [(each.before, each.after) for each in report.data.proposed]
    assert len(maps) == 4
    assert all(after for _, after in maps)
    loraformat.convert(source, tmp_path / "out", to="peft", base=model, alpha=4, maps=maps)
    modules = {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    assert modules == {f"base_model.model.model.layers.{n}.{name}" for n in range(3) for name in NAMES}


def test_what_shapes_leave_open_is_not_proposed(tmp_path: Path) -> None:
    names = {**NAMES, "self_attn.o_proj": (8, 8)}
    found = {
        e.before: e for e in loraformat.propose_map(adapter(tmp_path, factors()), base(tmp_path, names)).data.proposed
    }
    (open_,) = [each for each in found.values() if not each.after]
    assert "wq" in open_.before
    assert open_.candidates == ("model.layers.N.self_attn.o_proj", "model.layers.N.self_attn.q_proj")


def test_two_families_of_one_shape_are_not_both_given_the_same_name(tmp_path: Path) -> None:
    tensors = factors()
    tensors |= {name.replace(".wv.", ".wk."): value.clone() for name, value in tensors.items() if ".wv." in name}
    found = loraformat.propose_map(adapter(tmp_path, tensors), base(tmp_path)).data.proposed
    assert sorted(bool(each.after) for each in found) == [False, False, True, True, True]


def test_without_factors_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no factor pairs"):
        loraformat.propose_map(adapter(tmp_path, {"a": torch.zeros(2, 2)}), base(tmp_path))


def test_a_base_that_stores_transposes_is_matched(tmp_path: Path) -> None:
    names = {name: (cols, rows) for name, (rows, cols) in NAMES.items() if rows != cols and "mlp" not in name}
    tensors = {name: value for name, value in factors().items() if ".wv." in name}
    (found,) = loraformat.propose_map(adapter(tmp_path, tensors), base(tmp_path, names)).data.proposed
    assert found.after == r"model.layers.\g<1>.self_attn.v_proj"
