"""The table of runtimes: its form, its versions, and its lines about PEFT against PEFT itself."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from loraformat.diagnostics import Severity
from loraformat.jobs.validate import validate
from loraformat.rules import RULES
from loraformat.rules.targets import Target, key_of, names, parse

GOOD = Path(__file__).parents[3] / "fixtures" / "good" / "peft" / "tiny-llama"
BY_CODE = {rule.code: rule for rule in RULES}


@pytest.mark.parametrize("name", names())
def test_every_line_has_a_rule_a_verdict_a_remedy_and_a_source(name: str) -> None:
    target = parse(name)
    assert target.lines
    for line in target.lines:
        assert BY_CODE[line.rule].needs == "target"
        assert line.verdict in ("refuses", "ignores")
        assert line.message
        assert line.help
        assert line.source
        assert not (line.since and line.before and key_of(line.since) >= key_of(line.before))


@pytest.mark.parametrize("code", [rule.code for rule in RULES if rule.needs == "target"])
def test_every_rule_about_runtimes_is_about_one(code: str) -> None:
    by_spelling = code in ("LF622", "LF623", "LF624", "LF625", "LF626")
    assert any(
        (parse(name).spellings is not None) if by_spelling else any(line.rule == code for line in parse(name).lines)
        for name in names()
    )


@pytest.mark.parametrize("text", ["", "nothing", "vllm=1", "vllm==", "peft==x\n", "vllm;rm"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        parse(text)


def test_versions_choose_lines() -> None:
    old, new = parse("peft==0.10"), parse("peft>=0.20")
    assert [line.verdict for line in old.lines_for("LF615")] == ["refuses"]
    assert [line.verdict for line in new.lines_for("LF615")] == ["ignores"]
    assert old.lacks("0.14")
    assert not new.lacks("0.14")
    assert not old.lacks("")


def test_what_a_runtime_does_with_several_things_is_said_of_them() -> None:
    found = validate(GOOD.with_name("patterns"), target=["sglang", "llama.cpp"]).findings
    said = [one.message for one in found if one.code in ("LF607", "LF608")]
    assert len(said) == 3
    assert all("ignores them: " in each or "refuses them: " in each for each in said)


def test_a_plain_adapter_loads_in_every_runtime_that_reads_its_format() -> None:
    for name in names():
        if "peft" in parse(name).reads:
            report = validate(str(GOOD.parent / "bin"), target=[name], ignore=["LF610"])
            assert not [finding for finding in report.findings if finding.code.startswith("LF6")], name


def test_a_limit_that_the_caller_gives_takes_the_place_of_the_default(tmp_path: Path) -> None:
    folder = Path(__file__).parents[3] / "fixtures" / "bad" / "LF601-rank-above-default" / "adapter"
    (told,) = validate(str(folder), target=["vllm"]).findings
    assert "rank 20 needs --max-lora-rank 32" in told.message  # vLLM takes some values only
    assert [f.code for f in validate(str(folder), target=["vllm"], max_lora_rank=32).findings] == []
    (found,) = validate(str(folder), target=["vllm"], max_lora_rank=8).findings
    assert (found.code, found.severity) == ("LF620", Severity.ERROR)


@pytest.fixture(scope="module")
def installed() -> Target:
    import peft

    found = parse(f"peft=={'.'.join(map(str, key_of(peft.__version__)))}")
    if key_of(peft.__version__)[:2] > key_of(parse("peft").version)[:2]:
        pytest.skip(f"PEFT {peft.__version__} is newer than the table")
    return found


def test_the_table_knows_every_setting_of_the_installed_peft(installed: Target) -> None:
    from peft import LoraConfig

    assert installed.settings is not None
    known = {name for name, since in installed.settings.items() if not installed.lacks(since)}
    assert known == {field.name for field in dataclasses.fields(LoraConfig)}


def test_the_table_knows_every_kind_of_the_installed_peft(installed: Target) -> None:
    from peft import PeftType

    assert installed.kinds is not None
    assert {name for name, since in installed.kinds.items() if not installed.lacks(since)} >= {
        kind.value for kind in PeftType
    }


def test_peft_does_with_a_setting_that_it_does_not_know_what_the_table_says(installed: Target, tmp_path: Path) -> None:
    from peft import PeftConfig

    config = {"peft_type": "LORA", "r": 2, "setting_of_the_future": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (line,) = installed.lines_for("LF615")
    assert line.verdict == "ignores"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftConfig.from_pretrained(str(tmp_path))
    assert any("setting_of_the_future" in str(warning.message) for warning in caught)


def test_peft_refuses_a_kind_that_it_does_not_know(installed: Target, tmp_path: Path) -> None:
    from peft import PeftConfig

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "KIND_OF_THE_FUTURE"}))
    (line,) = installed.lines_for("LF613")
    assert line.verdict == "refuses"
    with pytest.raises(KeyError):
        PeftConfig.from_pretrained(str(tmp_path))


def test_peft_refuses_a_folder_of_another_format(installed: Target, tmp_path: Path) -> None:
    from peft import PeftConfig

    (tmp_path / "lora_config.json").write_text("{}")
    with pytest.raises(ValueError, match="find"):
        PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("code", ["LF107", "LF108"])
def test_peft_refuses_what_these_rules_find(code: str) -> None:
    from peft import PeftConfig

    (folder,) = (GOOD.parent.parent.parent / "bad").glob(f"{code}-*")
    with pytest.raises(ValueError, match=r"Invalid task type|cannot be used when"):
        PeftConfig.from_pretrained(str(folder / "adapter"))
