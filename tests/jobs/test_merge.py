"""Folders as people have them: what a merge takes from a base that holds more than a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

import loraformat

pytest.importorskip("transformers")
pytest.importorskip("peft")


def test_a_base_that_holds_an_adapter_too_gives_a_model(tmp_path: Path) -> None:
    both = tiny.adapted(tiny.llama(), tmp_path, target_modules=["q_proj"])
    for file in (tmp_path / "adapter").glob("adapter_*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    report = loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("adapter_*"))
    assert "LF817" in {finding.code for finding in report.findings}
    tiny.check_merged(tmp_path / "out", "LlamaForCausalLM", both)
