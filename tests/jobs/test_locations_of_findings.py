"""Which file, value, tensor and line a finding is about, whatever the names in the adapter look like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraformat import validate
from loraformat.report import render_all

DISGUISED = "adapter_config.json: r"


def adapter(folder: Path, module: str = "q_proj", **config: object) -> str:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    pair = {"lora_A": np.zeros((2, 4), np.float32), "lora_B": np.ones((4, 2), np.float32)}
    named = {f"base_model.model.m.{module}.{part}.weight": value for part, value in pair.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return str(folder)


def test_a_value_of_the_config_has_a_file_a_pointer_and_a_line(tmp_path: Path) -> None:
    uri = adapter(tmp_path, rank_pattern={"a/b": -1})
    (found,) = [each for each in validate(uri).findings if each.code == "LF103"]
    lines = (tmp_path / "adapter_config.json").read_text(encoding="utf-8").splitlines()
    record = found.record()
    assert (record["file"], record["pointer"]) == ("adapter_config.json", "/rank_pattern/a~1b")
    assert '"rank_pattern"' in lines[found.location.line - 1]


def test_a_fault_of_syntax_has_its_line(tmp_path: Path) -> None:
    uri = adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{\n  "r": 2,\n  "lora_alpha"\n}\n', encoding="utf-8")
    (found,) = [each for each in validate(uri).findings if each.code == "LF005"]
    assert (found.location.file, found.location.line) == ("adapter_config.json", 4)


def test_a_tensor_is_not_taken_for_a_file_that_its_name_spells(tmp_path: Path) -> None:
    uri = adapter(tmp_path, DISGUISED, target_modules=[DISGUISED])
    report = validate(uri, deep=True, select=["LF401"])
    (found,) = report.findings
    assert (found.location.file, found.location.tensor, found.location.line) == ("", f"m.{DISGUISED}.weight", 0)
    (issue,) = json.loads(render_all([report], "gitlab"))
    assert issue["location"] == {"path": f"{uri}/adapter_model.safetensors", "lines": {"begin": 1}}


@pytest.mark.parametrize("name", ["notes: old.json", "training run.py"])
def test_a_file_is_found_whatever_its_name_is(tmp_path: Path, name: str) -> None:
    uri = adapter(tmp_path)
    (tmp_path / name).write_bytes(b"")
    report = validate(uri, select=["LF030"])
    assert [each.location.file for each in report.findings] == [name]
    (issue,) = json.loads(render_all([report], "gitlab"))
    assert issue["location"]["path"] == f"{uri}/{name}"
