"""loraformat.toml and [tool.loraformat]: what they may say, where they are found, and what they change."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from loraformat.errors import ConfigError, UsageError
from loraformat.jobs.inputs.discovery import discover
from loraformat.jobs.inputs.settings import Settings, find_settings, read_settings
from loraformat.jobs.validate import validate

BAD = Path(__file__).parents[3] / "fixtures" / "bad"
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


def repository(folder: Path) -> Path:
    """A folder that is the root of a repository."""
    (folder / ".git").mkdir(parents=True)
    return folder


def test_the_nearest_root_upward_with_settings_decides(tmp_path: Path) -> None:
    inner = repository(tmp_path) / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "loraformat.toml").write_text(TEXT)
    found = find_settings(str(inner))
    assert (found.target, found.fail_on, found.ignore, found.max_lora_rank) == (("vllm",), "warning", ("LF5",), 32)
    (tmp_path / "a" / "pyproject.toml").write_text('[tool.loraformat.validate]\nselect = ["LF2"]\n')
    assert find_settings(str(inner)).select == ("LF2",)


def test_a_pyproject_without_our_table_does_not_end_the_search(tmp_path: Path) -> None:
    (repository(tmp_path) / "loraformat.toml").write_text(TEXT)
    inner = tmp_path / "a"
    inner.mkdir()
    (inner / "pyproject.toml").write_text('[project]\nname = "loraformat-user"\n')
    assert find_settings(str(inner)).target == ("vllm",)


def test_a_folder_that_is_no_root_of_a_project_has_no_settings(tmp_path: Path) -> None:
    inner = repository(tmp_path) / "downloads"
    inner.mkdir()
    (inner / "loraformat.toml").write_text(TEXT)
    assert find_settings(str(inner)) == Settings()


def test_nothing_above_the_repository_is_looked_at(tmp_path: Path) -> None:
    (repository(tmp_path) / "loraformat.toml").write_text(TEXT)
    assert find_settings(str(repository(tmp_path / "inner"))) == Settings()


@pytest.mark.parametrize(
    ("judged", "start"),
    [
        *((judged, start) for judged in (".", "../adapter", "sub/..", "sub", "link") for start in (".", "sub")),
        ("adapter_model.safetensors", "."),
        ("linked.bin", "."),
    ],
)
def test_what_is_judged_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: str, start: str) -> None:
    """A cloned adapter has a `.git` and whatever files its author wants; the caller's project is around it."""
    project = repository(tmp_path / "project")
    (project / "loraformat.toml").write_text('[validate]\ntarget = ["vllm"]\n')
    adapter = repository(project / "adapter")
    (adapter / "sub").mkdir()
    (adapter / "link").symlink_to(adapter)
    (adapter / "adapter_model.safetensors").touch()
    (tmp_path / "elsewhere.bin").touch()
    (adapter / "linked.bin").symlink_to(tmp_path / "elsewhere.bin")
    for folder in (adapter, adapter / "sub"):
        (folder / "loraformat.toml").write_text('[validate]\nfail-on = "never"\n')
        (folder / "pyproject.toml").write_text('[tool.loraformat.validate]\nfail-on = "never"\n')
    monkeypatch.chdir(adapter)
    judged_folders = [judged, "."] if judged == "sub" else [judged]
    assert find_settings(start, judged_folders).target == ("vllm",)


def test_a_judged_file_beside_the_project_leaves_its_settings_alone(tmp_path: Path) -> None:
    project = repository(tmp_path / "project")
    (project / "loraformat.toml").write_text(TEXT)
    (tmp_path / "lora.bin").touch()
    assert find_settings(str(project), [str(tmp_path / "lora.bin")]).target == ("vllm",)
    (project / "lora.bin").symlink_to(tmp_path / "lora.bin")
    assert find_settings(str(project), [str(project / "lora.bin")]) == Settings()


def test_settings_that_are_a_link_into_what_is_judged_are_refused(tmp_path: Path) -> None:
    project = repository(tmp_path / "project")
    (project / "adapter").mkdir()
    (project / "adapter" / "mine.toml").write_text(TEXT)
    (project / "loraformat.toml").symlink_to(project / "adapter" / "mine.toml")
    assert find_settings(str(project)).target == ("vllm",)
    with pytest.raises(UsageError, match="a link into the checked adapters"):
        find_settings(str(project), [str(project / "adapter")])


def test_an_address_of_the_hub_lies_in_no_folder(tmp_path: Path) -> None:
    (repository(tmp_path) / "loraformat.toml").write_text(TEXT)
    assert find_settings(str(tmp_path), ["hf://owner/name"]).target == ("vllm",)


@pytest.mark.parametrize("name", ["loraformat.toml", "pyproject.toml"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket", "link to a fifo"])
def test_settings_that_are_no_regular_file_are_refused_without_waiting(tmp_path: Path, name: str, kind: str) -> None:
    path = repository(tmp_path) / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    for reading in (lambda: find_settings(str(tmp_path)), lambda: read_settings(str(path))):
        with pytest.raises(UsageError, match="regular file"):
            reading()


def test_settings_beyond_a_mebibyte_are_refused(tmp_path: Path) -> None:
    path = repository(tmp_path) / "loraformat.toml"
    path.write_text("#" * (1 << 20) + "\n[validate]\n")
    with pytest.raises(UsageError, match="more than 1048576 bytes"):
        find_settings(str(tmp_path))


def test_without_a_file_there_are_defaults(tmp_path: Path) -> None:
    assert find_settings(str(tmp_path)) == Settings()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[validate", "not valid TOML"),
        ("[validate]\nmax-lora-rank = " + "9" * 5000, "not valid TOML"),
        ("a = " + "[" * 100_000, "not valid TOML"),
        ("[validat]\n", "unknown key"),
        ("[validate]\nignor = []\n", "unknown key"),
        ('[validate]\nignore = "LF5"\n', "expected a list"),
        ('[validate]\nignore = ["E501"]\n', "expected a code"),
        ('[validate]\nfail-on = "info"\n', "fail-on"),
        ("[validate]\nmax-lora-rank = true\n", "positive integer"),
        ('[[validate.per-path]]\npath = "a"\nignore = { LF105 = "" }\n', "reason"),
        ('[[validate.per-path]]\npath = "a"\nignore = ["LF105"]\n', "ignore"),
        ("validate = 3\n", "expected a table"),
        ('[[validate.per-path]]\npath = "a"\nignore = { LF1 = "x", lf1 = "y" }\n', "LF1 appears twice"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "loraformat.toml"
    path.write_text(text)
    with pytest.raises(ConfigError if fault == "not valid TOML" else UsageError, match=fault):
        read_settings(str(path))


@pytest.mark.parametrize(("code", "nearest"), [("LF905x", "LF905"), ("LF2066", "LF206"), ("missing-scale", "LF206")])
@pytest.mark.parametrize("place", ["select", "ignore", "per-path"])
def test_an_unknown_code_is_named_with_the_nearest(tmp_path: Path, place: str, code: str, nearest: str) -> None:
    texts = {
        "select": f'[validate]\nselect = ["LF1", "{code}"]\n',
        "ignore": f'[validate]\nignore = ["{code}"]\n',
        "per-path": f'[[validate.per-path]]\npath = "a"\nignore = {{ {code} = "why" }}\n',
    }
    path = tmp_path / "loraformat.toml"
    path.write_text(texts[place])
    with pytest.raises(UsageError) as caught:
        read_settings(str(path))
    assert f'found "{code}"' in caught.value.message
    assert f"did you mean {nearest}" in caught.value.hint


def test_codes_are_the_same_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "loraformat.toml"
    path.write_text(
        '[validate]\nselect = ["lf1"]\nignore = ["Lf105"]\n'
        '[[validate.per-path]]\npath = "**"\nignore = { lf106 = "why" }\n'
    )
    settings = read_settings(str(path))
    assert (settings.select, settings.ignore) == (("LF1",), ("LF105",))
    assert settings.reasons_for(str(tmp_path / "x")) == {"LF106": "why"}


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
    assert discover([weights, config, str(folder)]).adapters == (str(folder),)
    alone = tmp_path / "adapter_model.safetensors"
    alone.write_bytes(b"")
    assert discover([str(alone)]).adapters == (str(alone),)
    assert discover(["nothing/adapter_config.json"]).adapters == ("nothing/adapter_config.json",)
