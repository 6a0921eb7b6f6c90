"""`convert --base-model`: the name of the base, written where nobody stated it or somebody stated another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from loraformat import convert, load_adapter, validate
from loraformat.cli import main
from loraformat.errors import UsageError
from loraformat.formats import FORMATS

ROOT = Path(__file__).parent.parent.parent
MINIGPT = ROOT / "fixtures" / "minigpt" / "lora_adapter"
IMAGE = ROOT / "fixtures" / "good" / "kohya" / "tiny-flux"
NAMELESS = ROOT / "fixtures" / "bad" / "LF105-missing-base-model" / "adapter"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", ["owner/name@v2", "hf://owner/name@v2"])
def test_peft_gets_the_name_and_the_revision(text: str, tmp_path: Path) -> None:
    told = run("convert", MINIGPT, "--to", "peft", "--alpha", 1, "--base-model", text, "-o", tmp_path / "out")
    assert told.exit_code == 0, told.output
    config = config_of(tmp_path / "out")
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v2")
    assert "LF105" not in [finding.code for finding in validate(tmp_path / "out").findings]


def _llama(folder: Path) -> Path:
    """A base for the adapter without a name."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2}
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 12, "vocab_size": 20}
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    shapes = {weight: chain[0].shape for weight, chain in load_adapter(NAMELESS).updates.items()}
    save_file({weight: torch.zeros(*shape) for weight, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("to", [each.NAME for each in FORMATS if each.WRITES])
def test_every_format_that_has_a_place_for_the_name_gets_it(to: str, tmp_path: Path) -> None:
    is_image = to in ("diffusers", "kohya", "comfy", "lycoris")
    # GGUF has the names of the base's architecture, LitGPT its settings.
    base = str(_llama(tmp_path / "base")) if to in ("gguf", "litgpt") else None
    report = convert(IMAGE if is_image else NAMELESS, tmp_path / "out", to=to, base=base, base_model="owner/name")
    is_lost = any(found.code == "LF703" and "base_model" in found.message for found in report.findings)
    read = load_adapter(tmp_path / "out").config
    assert read.base_model == (None if is_lost else "owner/name")
    assert is_lost is (is_image or to == "loralib")


def test_a_name_that_is_given_is_no_longer_missing(tmp_path: Path) -> None:
    plain = run("convert", NAMELESS, "--to", "peft", "-o", tmp_path / "plain")
    assert "warning[LF105]" in plain.stderr
    named = run("convert", NAMELESS, "--to", "peft", "--base-model", "owner/name", "-o", tmp_path / "named")
    assert (named.exit_code, "warning[" in named.stderr) == (0, False)


def test_a_name_that_is_replaced_is_reported(tmp_path: Path) -> None:
    convert(NAMELESS, tmp_path / "one", to="peft", base_model="owner/one@v1")
    report = convert(tmp_path / "one", tmp_path / "two", to="peft", base_model="owner/two")
    assert ["owner/one@v1" in found.message for found in report.findings if found.code == "LF703"] == [True]
    config = config_of(tmp_path / "two")
    assert config["base_model_name_or_path"] == "owner/two"
    assert config.get("revision") is None


@pytest.mark.parametrize("text", ["", " ", "@v1", "owner/name@", "owner/\x1bname"])
def test_what_names_nothing_is_a_mistake_of_usage(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="NAME@REVISION"):
        convert(NAMELESS, tmp_path / "out", to="peft", base_model=text)
    assert not (tmp_path / "out").exists()


def test_there_is_no_warning_on_the_golden_path(tmp_path: Path) -> None:
    """What the first page shows, and what the demo shows, is what a newcomer does: it must work without complaint."""
    told = run("demo", "-o", tmp_path / "demo")
    assert told.exit_code == 0
    assert "warning[" not in told.output
    assert "warning[" not in (ROOT / "README.md").read_text(encoding="utf-8")
