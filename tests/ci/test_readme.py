"""The README against the files that it is about, and the commands of all pages against the options that they name."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Context
from click.exceptions import Exit
from click.testing import CliRunner

import loraformat
from loraformat.cli import main

ROOT = Path(__file__).parent.parent.parent
GUIDES = ROOT / "docs" / "guides"


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_example_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the examples in the console, whose outputs it must not replace."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for output in outputs("README.md"):
        Path(output).mkdir()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    known: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), known)
    assert known["report"].ok
    assert (tmp_path / "python-merged" / "model.pt").is_file()


def commands(page: str) -> list[list[str]]:
    """The arguments of each loraformat command that starts a line of a block, redirections left out."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = [body.replace("\\\n", " ") for language, body in fences if language in ("", "console", "bash", "sh")]
    lines = [line for block in blocks for line in re.findall(r"^(?:\$ )?loraformat (.*)", block, re.MULTILINE)]
    return [shlex.split(line.partition(" > ")[0], comments=True) for line in lines]


def outputs(page: str) -> list[str]:
    """What the commands of a page write when they are typed in order, placeholders like OUT left out."""
    wanted = [each for each in commands(page) if not {"--dry-run", "--overwrite", "--resume"} & set(each)]
    targets = [each[each.index("-o") + 1].rstrip("/") for each in wanted if "-o" in each]
    return [name for name in targets if not name.isupper()]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/guides/{path.name}" for path in sorted(GUIDES.glob("*.md")))])
def test_the_commands_of_a_page_write_different_outputs(page: str) -> None:
    written = outputs(page)
    assert len(written) == len(set(written)), written


@pytest.mark.parametrize("folder", [".", "docs", "docs/guides"])
def test_the_commands_of_every_page_have_the_options_that_they_need(folder: str) -> None:
    """Parsed, not run: click refuses unknown options, and missing or extra arguments."""
    pages = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / folder).glob("*.md"))]
    parent = Context(main, info_name="loraformat", **main.context_settings)
    for name, *arguments in (each for page in pages for each in commands(page)):
        command = main.get_command(parent, name)
        assert command is not None, name
        with suppress(Exit):  # --help, --version
            command.make_context(name, arguments, parent).close()


def example(sign: str) -> Any:
    """The YAML of the README that contains `sign`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if sign in block]
    return yaml.safe_load(found)


@pytest.fixture(scope="module")
def step() -> dict[str, Any]:
    return next(each for each in example("actions/checkout") if "loraformat" in each["uses"])


@pytest.fixture(scope="module")
def hook() -> dict[str, Any]:
    (found,) = example("hooks:")
    assert isinstance(found, dict)
    return found


def test_the_step_gives_inputs_that_the_action_has(step: dict[str, Any]) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    assert set(step["with"]) <= set(action["inputs"])


def test_the_hook_is_one_that_the_repository_has(hook: dict[str, Any]) -> None:
    known = {each["id"] for each in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))}
    assert {each["id"] for each in hook["hooks"]} <= known
    for each in hook["hooks"]:
        options = [word for word in each["args"] if word.startswith("--")]
        told = CliRunner().invoke(main, ["validate", "--help"]).output
        assert all(option in told for option in options)


def test_both_name_this_version_of_one_repository(step: dict[str, Any], hook: dict[str, Any]) -> None:
    repository, _, tag = step["uses"].partition("@")
    assert hook["repo"] == f"https://github.com/{repository}"
    assert tag == hook["rev"] == f"v{loraformat.__version__}"


def test_the_repository_is_that_of_the_package_or_said_to_be_filled_in(step: dict[str, Any]) -> None:
    """pyproject.toml is read as text: Python 3.10 has no reader of it, and only an address is looked for."""
    stated = re.findall(r"https://github\.com/([\w.-]+/[\w.-]+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    used = step["uses"].partition("@")[0]
    if stated:
        assert {used} == set(stated)
    else:
        assert used == "OWNER/loraformat"
        assert "`OWNER` in both examples stands for" in (ROOT / "README.md").read_text(encoding="utf-8")
