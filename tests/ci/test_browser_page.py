"""What can be seen of the page in the browser without one: its rules, its names, what it is built of."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from scripts import script

from loraformat.cli import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "web"
FIXTURES = ROOT / "fixtures"
SCRIPTS = sorted(PAGE.glob("*.js"))


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return script("web/build.py")


class Elements(HTMLParser):
    """Start tags with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements((PAGE / "index.html").read_text(encoding="utf-8")).found


def test_the_page_may_connect_to_its_own_server_only() -> None:
    (policy,) = [found["content"] for tag, found in ELEMENTS if found.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(each.strip().partition(" ")[::2] for each in (policy or "").split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["form-action"] == rules["base-uri"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert set(rules["script-src"].split()) == {"'self'", "'wasm-unsafe-eval'"}
    assert not re.search(r"https?:|\*|unsafe-inline|'unsafe-eval'", policy or "")


def test_the_policy_stands_before_everything_that_loads() -> None:
    tags = [tag for tag, found in ELEMENTS if "http-equiv" in found or tag in ("script", "link")]
    assert tags[0] == "meta"


def test_no_script_makes_elements_of_text() -> None:
    for each in SCRIPTS:
        text = each.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not [found for _, found in ELEMENTS if any(name.startswith("on") or name == "style" for name in found)]


def test_every_element_that_the_scripts_ask_for_is_there() -> None:
    asked = {name for path in SCRIPTS for name in re.findall(r'\bat\("([\w-]+)"\)', path.read_text(encoding="utf-8"))}
    assert len(asked) > 10
    assert asked <= {found["id"] for _, found in ELEMENTS if "id" in found}


def test_every_control_has_a_name() -> None:
    labelled = {found["for"] for tag, found in ELEMENTS if tag == "label" and "for" in found}
    controls = {found["id"] for tag, found in ELEMENTS if tag in ("select", "progress") or found.get("id") == "alpha"}
    assert len(controls) == 3
    assert controls <= labelled


@pytest.mark.parametrize("verb", ["validate", "inspect"])
@pytest.mark.parametrize(
    "name", ["good/peft/tiny-llama", "bad/LF004-truncated-file", "bad/LF501-base-model-disagreement"]
)
def test_the_page_says_what_the_command_line_says(verb: str, name: str) -> None:
    judge = script("web/judge.py")
    folder = FIXTURES / name
    answer = json.loads(judge.judge(verb, [folder.name], str(folder.parent), {}))
    shown = CliRunner().invoke(main, [verb, str(folder)])
    listed = CliRunner().invoke(main, [verb, str(folder), "--format", "json"])
    assert answer["exit"] == shown.exit_code
    assert answer["text"] == shown.output.replace(f"{folder.parent}/", "")
    found = json.loads(listed.stdout)["findings"]
    assert [each["code"] for each in answer["findings"]] == [each["code"] for each in found]
    assert (answer["cut"], answer["left_out"]) == (0, 0)


def test_several_adapters_keep_their_findings_apart(tmp_path: Path) -> None:
    judge = script("web/judge.py")
    names = ["LF004-truncated-file", "LF204-rank-against-config"]
    answer = json.loads(judge.judge("validate", names, str(FIXTURES / "bad"), {}))
    assert answer["exit"] == 1
    codes = {name: [each["code"] for each in answer["findings"] if name in each["subject"]] for name in names}
    assert codes == {names[0]: ["LF004"], names[1]: ["LF204"]}


def test_more_than_a_page_can_hold_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = script("web/judge.py")
    monkeypatch.setattr(judge, "MOST_FINDINGS", 1)
    monkeypatch.setattr(judge, "MOST_CHARACTERS", 10)
    names = ["LF004-truncated-file", "LF204-rank-against-config"]
    answer = json.loads(judge.judge("validate", names, str(FIXTURES / "bad"), {}))
    assert (len(answer["findings"]), answer["left_out"]) == (1, 1)
    assert len(answer["text"]) == 10
    assert answer["cut"] > 10


def test_a_mistake_in_an_option_is_an_answer() -> None:
    judge = script("web/judge.py")
    answer = json.loads(judge.judge("validate", ["peft"], str(FIXTURES / "good"), {"alpha": "much"}))
    assert answer["exit"] == 2
    assert "'much'" in answer["text"]


def test_what_is_packed_judges_without_any_other_package(build: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(build.core_zip())) as archive:
        archive.extractall(tmp_path)
    names = ["litgpt/tiny-llama", "peft/tiny-llama", "kohya/tiny-flux"]  # LitGPT's settings are YAML
    dropped = tmp_path / "dropped"
    for name in names:  # away from this checkout, whose pyproject.toml Python 3.10 reads with another package
        shutil.copytree(FIXTURES / "good" / name, dropped / name)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import judge, json\n"
        f"answers = [judge.about(), judge.judge('validate', {names}, {str(dropped)!r}, {{}})]\n"
        "print(json.dumps([json.loads(each) for each in answers]))"
    )
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    about, answer = json.loads(done.stdout)
    assert {"vllm", "peft"} <= {name for name, _ in about["targets"]}
    assert answer["exit"] == 0
    assert [f"{name} ({name.partition('/')[0]}): OK" in answer["text"] for name in names] == [True] * 3


def test_the_same_files_are_packed_into_the_same_bytes(build: ModuleType) -> None:
    files = build.core_files()
    assert {"judge.py", "loraformat/cli/__init__.py", "loraformat/schemas/report.schema.json"} <= set(files)
    assert {name.partition("/")[0] for name in files} == {"judge.py", "loraformat", "click", "yaml"}
    assert not [name for name in files if name.endswith((".so", ".pyd"))]


def run_build(*arguments: str, kept: Path) -> subprocess.CompletedProcess[str]:
    script = (
        f"import sys, pathlib; sys.path.insert(0, {str(PAGE)!r}); import build; "
        f"build.KEPT = pathlib.Path({str(kept)!r}); sys.argv[1:] = {list(arguments)!r}; build.main()"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=False, capture_output=True, text=True, env={"PATH": ""})


def test_without_npm_the_site_has_a_notice_that_says_how(tmp_path: Path) -> None:
    target = tmp_path / "browser"
    done = run_build("--optional", str(target), kept=tmp_path / "kept")
    assert done.returncode == 0
    assert "npm is not installed" in done.stderr
    assert [path.name for path in target.iterdir()] == ["index.html"]
    assert "make browser" in (target / "index.html").read_text()
    done = run_build(str(target), kept=tmp_path / "kept")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "not built: npm is not installed" in done.stderr


def test_a_runtime_with_another_digest_is_not_used(tmp_path: Path, build: ModuleType) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / f"pyodide-{build.PYODIDE}.tgz").write_bytes(b"something else")
    done = run_build(str(tmp_path / "browser"), kept=kept)
    assert done.returncode == 1
    assert not (tmp_path / "browser").exists()
