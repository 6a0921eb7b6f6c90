"""`loraformat convert` and `loraformat formats` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loraformat.cli import main
from loraformat.formats import FORMATS

GOOD = Path(__file__).parents[2] / "fixtures" / "good"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_formats_are_listed_with_what_they_lose() -> None:
    shown = run("formats").stdout
    assert all(each.NAME in shown and each.TITLE.split(":")[0] in shown for each in FORMATS)
    assert max(len(line) for line in shown.splitlines()) <= 100
    said: dict[str, Any] = json.loads(run("formats", "--format", "json").stdout)
    assert [each["name"] for each in said["formats"]] == [each.NAME for each in FORMATS]
    written = [each.NAME for each in FORMATS if each.WRITES]
    assert said["refused"]["raschka"] == {name: [] for name in written}
    models = {each["name"]: each["families"] for each in said["formats"]}
    assert {"FLUX.2", "Wan 2.1 and 2.2", "Z-Image"} < set(models["kohya"])
    assert models["xlabs"] == ["FLUX.1"]
    assert models["peft"] == []
    assert said["refused"]["mlx"]["loralib"] == ["dora"]


def test_what_a_dry_run_would_write_is_told(tmp_path: Path) -> None:
    done = run("convert", GOOD / "peft" / "patterns", "--to", "mlx", "-o", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0
    assert "nothing written (dry run): adapter_config.json, adapters.safetensors" in done.stdout
    assert "LF701" in done.stderr
    assert "LF707" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_was_read_back_is_told(tmp_path: Path) -> None:
    source = GOOD / "peft" / "patterns"
    done = run("convert", source, "--to", "native", "-o", tmp_path / "native", "--check-roundtrip")
    assert "checked 4 weights read back, all bit-identical" in done.stdout
    done = run("convert", source, "--to", "mlx", "-o", tmp_path / "mlx", "--check-roundtrip", "--format", "json")
    found = json.loads(done.stdout)["data"]["roundtrip"]
    assert (found["weights"], found["worst"] <= 1, found["roundoff"] > 0) == (4, True, True)


@pytest.mark.parametrize("said", ["enable_lora=3", "enable_lora=[]", "enable_lora=[1,0]", "enable_lora=[true,"])
def test_an_assumption_of_another_kind_is_a_usage_error(said: str, tmp_path: Path) -> None:
    done = run("convert", GOOD / "loralib" / "tiny-llama", "--to", "peft", "-o", tmp_path / "out", "--assume", said)
    assert done.exit_code == 2
    assert "a list of true and false" in done.stderr


def test_a_repair_is_told_before_the_output(tmp_path: Path) -> None:
    done = run("convert", GOOD / "peft" / "adapter-name", "--to", "peft", "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert "info[LF901] the adapter name default in 8 tensor names" in done.stderr
    again = run("convert", tmp_path / "out", "--to", "peft", "-o", tmp_path / "again")
    assert again.stderr == ""


def test_a_loss_that_stops_a_conversion_is_told_once(tmp_path: Path) -> None:
    done = run("convert", GOOD / "peft" / "tiny-llama", "--to", "gguf", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr.count("an adapter without its base cannot be written") == 1
    assert "error[LF800] convert to gguf: refused because of LF702 above; nothing was written\n" in done.stderr
