"""The page that judges dropped files, in headless Chromium: the verdicts of the command line, and no request."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import Tab, needs_chromium, opened, served
from click.testing import CliRunner

from loraformat.cli import main

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
SITE = ROOT / "site"
pytestmark = [
    pytest.mark.browser,
    needs_chromium,
    pytest.mark.skipif(not (SITE / "browser" / "parts.json").is_file(), reason="make browser builds the page"),
]
RESULT = """({
    judged: document.getElementById('judged').textContent,
    verdict: document.getElementById('verdict').textContent,
    text: document.getElementById('text').textContent,
    codes: [...document.querySelectorAll('#findings td[data-head=Code]')].map((cell) => cell.textContent),
    links: [...document.querySelectorAll('#findings td[data-head=Code] a')].map((link) => link.getAttribute('href')),
})"""


@dataclass
class Page:
    """The page in a tab, ready; `asked` are the paths that its server was asked for since."""

    tab: Tab
    asked: list[str]
    loaded: int

    def judged(self, *paths: Path, verb: str = "validate") -> dict[str, Any]:
        """What the page shows after files were dropped on it."""
        self.tab.run(f"document.querySelector('input[value={verb}]').checked = true")
        self.tab.run("document.getElementById('status').textContent = ''")
        self.tab.drop(*paths)
        self.tab.wait("document.getElementById('status').textContent === 'Done'")
        return dict(self.tab.run(RESULT))

    def refused(self, *paths: Path) -> str:
        """What the page says of files that it does not take."""
        self.tab.run("document.getElementById('notice').hidden = true")
        self.tab.drop(*paths)
        self.tab.wait("!document.getElementById('notice').hidden")
        return str(self.tab.run("document.getElementById('notice').textContent"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("browser")
    with served(SITE) as (address, asked), opened(f"{address}/browser/index.html", folder) as tab:
        tab.ask("Runtime.enable")
        tab.ask("Log.enable")
        tab.ask("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
        tab.wait("document.documentElement.dataset.state === 'ready'")
        yield Page(tab, asked, len(asked))


def in_a_terminal(verb: str, path: Path) -> dict[str, Any]:
    """What the command line says, started beside the files as the page does."""
    shown = CliRunner().invoke(main, [verb, str(path)])
    listed = CliRunner().invoke(main, [verb, str(path), "--format", "json"])
    return {
        "text": shown.output.replace(f"{path.parent}/", ""),
        "judged": f"{verb}, exit code {shown.exit_code}",
        "codes": [each["code"] for each in json.loads(listed.stdout)["findings"]],
    }


@pytest.mark.parametrize("verb", ["validate", "inspect"])
@pytest.mark.parametrize(
    "name",
    [
        "good/peft/tiny-llama",
        "good/kohya/tiny-flux/lora.safetensors",
        "good/litgpt/tiny-llama",
        "bad/LF004-truncated-file/adapter",
        "bad/LF007-unsafe-pickle/adapter",
        "bad/LF203-redundant-copy/adapter",
        "README.md",
    ],
)
def test_the_page_judges_as_the_command_line_does(page: Page, name: str, verb: str) -> None:
    wanted = in_a_terminal(verb, FIXTURES / name)
    found = page.judged(FIXTURES / name, verb=verb)
    assert {key: found[key] for key in wanted} == wanted
    assert [(SITE / "browser" / link).resolve().stem for link in found["links"]] == found["codes"]
    assert page.asked[page.loaded :] == []


def test_a_folder_of_adapters_is_judged_one_by_one(page: Page, tmp_path: Path) -> None:
    for name in ("LF004-truncated-file", "LF204-rank-against-config"):
        shutil.copytree(FIXTURES / "bad" / name / "adapter", tmp_path / "run" / name)
    found = page.judged(tmp_path / "run")
    assert sorted(found["codes"]) == ["LF004", "LF204"]
    assert found["verdict"] == "Not OK: 2 errors"


def test_loose_files_with_settings_among_them_are_one_adapter(page: Page) -> None:
    folder = FIXTURES / "good" / "peft" / "tiny-llama"
    found = page.judged(*(folder / name for name in ("adapter_config.json", "adapter_model.safetensors")))
    assert found["text"].splitlines()[-1].startswith("files (peft): OK")


def test_names_of_strangers_are_text(page: Page, tmp_path: Path) -> None:
    source = FIXTURES / "good" / "kohya" / "tiny-flux" / "lora.safetensors"
    names = ("<img src=x onerror=document.title='x'>.safetensors", "-h.safetensors", "constructor.safetensors")
    for name in names:
        shutil.copyfile(source, tmp_path / name)
    found = page.judged(*(tmp_path / name for name in names))
    assert all(f"{name} (kohya): " in found["text"] for name in names)
    assert page.tab.run("document.querySelectorAll('main img, main script').length") == 0
    assert page.tab.run("document.title").startswith("Check an adapter")


def test_a_folder_named_like_a_part_of_the_language_is_a_folder(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "constructor" / "toString"
    shutil.copytree(FIXTURES / "good" / "peft" / "tiny-llama", folder)
    assert "constructor/toString (peft): OK" in page.judged(tmp_path / "constructor")["text"]


def test_what_a_browser_cannot_hold_is_refused_in_words(page: Page, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert page.refused(tmp_path / "empty") == "The folder empty has no files."
    (tmp_path / "__proto__").write_bytes(b"x")
    assert "The name __proto__ cannot be used" in page.refused(tmp_path / "__proto__")
    many = tmp_path / "many"
    many.mkdir()
    for number in range(2001):
        (many / str(number)).touch()
    assert page.refused(many).startswith("More than 2000 files")


def test_a_file_of_five_gigabytes_is_judged_by_its_header(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    size, names = 80_000_000, ("lora_unet_double_blocks_0_img_attn_proj.lora_down", "lora_unet_x.lora_up")
    spans = [(at * 32 * size, (at + 1) * 32 * size) for at in range(2)]
    head = {
        f"{name}.weight": {"dtype": "F16", "shape": [16, size], "data_offsets": list(span)}
        for name, span in zip(names, spans, strict=True)
    }
    text = json.dumps(head).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + spans[-1][1])
    assert file.stat().st_size > 5e9
    wanted = in_a_terminal("validate", file)
    found = page.judged(file)
    assert {key: found[key] for key in wanted} == wanted


def test_neither_the_page_nor_its_checker_can_connect_once_it_is_loaded(page: Page) -> None:
    workers = [each for each in page.tab.events if each.get("method") == "Target.attachedToTarget"]
    *_, worker = [each["params"] for each in workers if each["params"]["targetInfo"]["type"] == "worker"]
    with served(FIXTURES) as (other, reached):
        for session in ("", worker["sessionId"]):
            for address in (other, page.tab.run("location.href")):
                said = page.tab.run_in(
                    session,
                    f"""new Promise((done) => {{
                        self.addEventListener('securitypolicyviolation', (found) => done(found.effectiveDirective));
                        const asking = new XMLHttpRequest();
                        asking.onload = () => done('answered');
                        asking.open('GET', {address!r});
                        asking.send();
                    }})""",
                )
                assert said == "connect-src"
        assert reached == []
    assert page.asked[page.loaded :] == []


def test_what_is_stopped_leaves_a_page_that_judges_again(page: Page) -> None:
    page.tab.drop(FIXTURES / "bad")
    page.tab.wait("!document.getElementById('stop').hidden")
    page.tab.run("document.getElementById('stop').click()")
    assert page.tab.run("document.getElementById('status').textContent") == "Stopped"
    folder = FIXTURES / "good" / "peft" / "tiny-llama"
    assert page.judged(folder)["verdict"] == "OK"  # dropped while the checker starts: it waits
    page.loaded = len(page.asked)


def test_files_are_chosen_by_keyboard(page: Page) -> None:
    page.tab.ask("Page.setInterceptFileChooserDialog", enabled=True)
    page.tab.run("document.querySelector('main').tabIndex = -1, document.querySelector('main').focus()")
    page.tab.press("Tab")
    assert page.tab.run("document.activeElement.id") == "choose-folder"
    page.tab.press("Tab")
    assert page.tab.run("document.activeElement.id") == "choose-files"
    page.tab.press("Enter")
    node = page.tab.event("Page.fileChooserOpened")["backendNodeId"]
    page.tab.run("document.getElementById('status').textContent = ''")
    path = FIXTURES / "good" / "kohya" / "tiny-flux" / "lora.safetensors"
    page.tab.ask("DOM.setFileInputFiles", backendNodeId=node, files=[str(path)])
    page.tab.wait("document.getElementById('status').textContent === 'Done'")
    assert page.tab.run(RESULT)["text"].splitlines()[-1].startswith("lora.safetensors (kohya): OK")
    assert page.tab.run("document.activeElement.id") == "verdict"
    page.tab.run("document.querySelector('input[value=validate]').focus()")
    page.tab.press("ArrowDown")  # the next option is chosen, and the same file judged again
    page.tab.wait("document.getElementById('heard').textContent === 'Inspected'")
    assert page.tab.run("document.activeElement.value") == "inspect"


def test_a_folder_is_chosen_with_all_that_is_in_it(page: Page) -> None:
    root = page.tab.ask("DOM.getDocument")["root"]["nodeId"]
    node = page.tab.ask("DOM.querySelector", nodeId=root, selector="#folder")["nodeId"]
    page.tab.run("document.querySelector('input[value=validate]').checked = true")
    page.tab.run("document.getElementById('status').textContent = ''")
    page.tab.ask("DOM.setFileInputFiles", nodeId=node, files=[str(FIXTURES / "good" / "peft" / "tiny-llama")])
    page.tab.wait("document.getElementById('status').textContent === 'Done'")
    assert page.tab.run(RESULT)["text"].splitlines()[-1].startswith("tiny-llama (peft): OK")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    page.judged(FIXTURES / "bad" / "LF502-card-without-base" / "adapter")
    assert page.tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.tab.run("document.querySelector('table').getBoundingClientRect().right <= innerWidth")


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    shutil.copytree(SITE / "browser", tmp_path / "site", ignore=shutil.ignore_patterns("python_stdlib.zip"))
    with served(tmp_path / "site") as (address, _), opened(f"{address}/index.html", tmp_path) as tab:
        tab.wait("document.documentElement.dataset.state === 'failed'")
        said = tab.run("document.getElementById('notice').textContent")
        assert said == "The checker could not be loaded: python_stdlib.zip could not be loaded (404)."
        assert tab.run("document.getElementById('retry').checkVisibility()")


def test_the_console_is_silent(page: Page) -> None:
    kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    said = [each for each in page.tab.events if each.get("method") in kinds]
    blocked = [each for each in said if "Content Security Policy" in json.dumps(each)]  # by the test above
    assert [each for each in said if each not in blocked] == []


def test_a_file_that_ends_the_checker_is_named_and_the_next_is_judged(page: Page, tmp_path: Path) -> None:
    """WebAssembly has less stack than a process: 300,000 tuples in each other are too many to take apart there."""
    file = tmp_path / "deep.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"(" * 300_000 + b"t" * 300_000 + b".")
        archive.writestr("x/version", "3")
    assert "Nothing is known about them; use the command line." in page.refused(file)
    page.tab.wait("document.documentElement.dataset.state === 'ready'")
    assert page.judged(FIXTURES / "good" / "peft" / "tiny-llama")["verdict"] == "OK"
