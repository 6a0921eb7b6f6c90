"""loraformat.toml and [tool.loraformat]: what they may say, where they are found, and what they change."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraformat.errors import ConfigError
from loraformat.jobs.settings import Settings, find_settings, folders_of, read_settings
from loraformat.jobs.validate import validate

BAD = Path(__file__).parent.parent.parent / "fixtures" / "bad"
TEXT = """
[validate]
target = ["vllm"]
fail-on = "warning"
ignore = ["LF5"]
max-lora-rank = 32

[[validate.per-path]]
path = "legacy/**"
ignore = { LF105 = "the base is private" }
"""


def test_the_nearest_folder_upward_decides(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "loraformat.toml").write_text(TEXT)
    found = find_settings(str(inner))
    assert (found.target, found.fail_on, found.ignore, found.max_lora_rank) == (("vllm",), "warning", ("LF5",), 32)
    (tmp_path / "a" / "pyproject.toml").write_text('[tool.loraformat.validate]\nselect = ["LF2"]\n')
    assert find_settings(str(inner)).select == ("LF2",)


def test_a_pyproject_without_our_table_does_not_end_the_search(tmp_path: Path) -> None:
    (tmp_path / "loraformat.toml").write_text(TEXT)
    inner = tmp_path / "a"
    inner.mkdir()
    (inner / "pyproject.toml").write_text('[project]\nname = "loraformat-user"\n')
    assert find_settings(str(inner)).target == ("vllm",)


def test_without_a_file_there_are_defaults(tmp_path: Path) -> None:
    assert find_settings(str(tmp_path)) == Settings()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[validate", "no TOML"),
        ("[validat]\n", "unknown key"),
        ("[validate]\nignor = []\n", "unknown key"),
        ('[validate]\nignore = "LF5"\n', "expected a list"),
        ('[validate]\nignore = ["E501"]\n', "expected a code"),
        ('[validate]\nfail-on = "info"\n', "fail-on"),
        ("[validate]\nmax-lora-rank = true\n", "positive integer"),
        ('[[validate.per-path]]\npath = "a"\nignore = { LF105 = "" }\n', "reason"),
        ('[[validate.per-path]]\npath = "a"\nignore = ["LF105"]\n', "ignore"),
        ("validate = 3\n", "expected a table"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "loraformat.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_settings(str(path))


def test_ignores_of_a_path_hold_there_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "loraformat.toml"
    path.write_text(TEXT)
    settings = read_settings(str(path))
    inside = settings.reasons_for(str(tmp_path / "legacy" / "deep" / "adapter"))
    assert inside == {"LF105": "the base is private"}
    assert settings.reasons_for(str(tmp_path / "legacy")) == inside
    assert settings.reasons_for(str(tmp_path / "legacy2" / "adapter")) == {}


def test_what_is_ignored_for_a_reason_is_listed_with_it() -> None:
    folder = str(BAD / "LF105-missing-base-model" / "adapter")
    report = validate(folder, reasons={"LF105": "the base is private"})
    assert report.findings == ()
    (ignored,) = report.data.ignored
    assert (ignored.code, ignored.reason) == ("LF105", "the base is private")


def test_an_adapter_that_cannot_be_read_is_never_ignored() -> None:
    report = validate(str(BAD / "LF005-invalid-json" / "adapter"), ignore=["LF0"], reasons={"LF": "no"})
    assert [finding.code for finding in report.findings] == ["LF005"]


def test_files_stand_for_their_folder_once(tmp_path: Path) -> None:
    folder = BAD / "LF105-missing-base-model" / "adapter"
    config, weights = str(folder / "adapter_config.json"), str(folder / "adapter_model.safetensors")
    assert folders_of([weights, config, str(folder)]) == (str(folder),)
    alone = tmp_path / "adapter_model.safetensors"
    alone.write_bytes(b"")
    assert folders_of([str(alone)]) == (str(alone),)
    assert folders_of(["nothing/adapter_config.json"]) == ("nothing/adapter_config.json",)
