"""LF038: names that are not what they look like."""

from __future__ import annotations

import os
from pathlib import Path

import hostile
import pytest

from loraformat.jobs.validate import validate


def hits(folder: Path, base: str) -> list[tuple[str, str]]:
    hostile.peft(folder, config={"base_model_name_or_path": base})
    found = validate(str(folder), select=["LF038"]).findings
    return [(finding.where, finding.message) for finding in found]


@pytest.mark.parametrize("character", ["\x1b", "\x9b", "\u202e", "\u200b", "\r", "\x7f"])
def test_a_base_named_with_a_character_that_is_not_seen(character: str, tmp_path: Path) -> None:
    ((where, message),) = hits(tmp_path, f"org/mo{character}del")
    assert where == "adapter_config.json: base_model_name_or_path"
    assert message.endswith(f"U+{ord(character):04X}")


@pytest.mark.parametrize("base", ["meta-llama/Llama-3.1-8B", "D:/模型/qwen", "/home/jürgen/модель", "", "a b/c"])
def test_a_path_in_any_alphabet_is_no_fault(base: str, tmp_path: Path) -> None:
    assert hits(tmp_path, base) == []


def test_a_file_name_that_is_not_utf_8_is_told_by_its_byte(tmp_path: Path) -> None:
    hostile.peft(tmp_path)
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"))).touch()
    (finding,) = validate(str(tmp_path), select=["LF038"]).findings
    assert finding.message == "not UTF-8, the byte 0xE9"
