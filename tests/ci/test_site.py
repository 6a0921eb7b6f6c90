"""The check of the built site finds what it is for."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from scripts import script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return script("docs/check.py")


def test_a_site_whose_links_lead_somewhere_has_no_problems(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="sub/b.html#here">b</a> <a href="https://example.org">out</a> <a href="#top" id="top">'
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text('<h1 id="here">x</h1><script src="../s.js"></script>')
    (tmp_path / "s.js").write_text("")
    assert check.problems(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<a href="gone.html">', "gone.html leads nowhere"),
        ('<a href="#gone">', "#gone: the page has no such heading"),
        ('<img src="gone.png">', "gone.png leads nowhere"),
        ('<script src="https://example.org/x.js"></script>', "loads https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "loads //example.org/x.css"),
    ],
)
def test_what_is_wrong_is_named_with_its_page(check: ModuleType, tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "page.html").write_text(text)
    assert check.problems(tmp_path) == [f"page.html: {problem}"]


def test_a_folder_without_pages_is_no_site(check: ModuleType, tmp_path: Path) -> None:
    assert check.problems(tmp_path) == [f"{tmp_path}: no pages"]


def test_every_guide_and_page_of_a_command_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split()
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")]
    names = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in pages} - {"index"}
    assert names - set(index) == set()


@pytest.mark.parametrize(("page", "up"), [("index", ""), ("guides/browser", "../")])
def test_on_the_site_the_page_in_the_browser_is_the_one_that_was_built(page: str, up: str) -> None:
    text = [(ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")]
    script("docs/conf.py")._outward(None, page, text)
    assert f'<a href="{up}browser/index.html">' in text[0]
    assert "web/index.html" not in text[0]


def test_every_benchmark_is_on_the_page_of_benchmarks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    scripts = {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(re.findall(r"`(benchmarks/[a-z_]+\.py)`", page)) == scripts
