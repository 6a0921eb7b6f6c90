"""Writes all text that is made from the source: docs/rules, docs/cli.md, the outputs in docs/inspect.md and README.md.

Run: python docs/generate.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from click import Group
from click.testing import CliRunner

from loraformat.cli import COMMANDS
from loraformat.cli import main as loraformat
from loraformat.formats import FORMATS
from loraformat.jobs.explain import Page, pages

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "rules"

FAMILIES = {
    "LF0": "Containers and detection",
    "LF1": "The config",
    "LF2": "The config against the tensors",
    "LF3": "Against the base model",
    "LF4": "Values",
    "LF5": "Metadata and tokens",
    "LF6": "Runtimes",
    "LF7": "Losses of a conversion",
    "LF8": "Merging",
    "LF9": "Repairs",
}


def documents() -> dict[str, str]:
    """File name → text, for every page and the index."""
    found = pages()
    texts = {f"{code}.md": page.markdown() for code, page in found.items()}
    return {**texts, "README.md": index(list(found.values()))}


def index(found: list[Page]) -> str:
    """The table of all codes, family by family."""
    lines = [
        "# Codes",
        "",
        "What `loraformat` may say. Generated from the source by docs/generate.py; codes are never reused.",
    ]
    for prefix, title in FAMILIES.items():
        members = [page for page in found if page.code.startswith(prefix)]
        if members:
            lines += ["", f"## {prefix}: {title}", "", "| code | name | severity | |", "|---|---|---|---|"]
            lines += [_row(page) for page in members]
    return "\n".join(lines) + "\n"


def _row(page: Page) -> str:
    first = page.text.splitlines()[0].replace("|", "\\|")
    return f"| [{page.code}]({page.code}.md) | {page.name} | {page.severity.value} | {first} |"


def cli() -> str:
    """docs/cli.md: the help of every command, at 100 columns."""
    assert isinstance(loraformat, Group)
    parts = ["# Command line", "", "Generated from the source by docs/generate.py."]
    for name in ("", *COMMANDS):
        arguments = [name, "--help"] if name else ["--help"]
        shown = CliRunner().invoke(loraformat, arguments, prog_name="loraformat", terminal_width=100)
        parts += ["", f"## loraformat {name}".rstrip(), "", "```text", shown.stdout.rstrip(), "```"]
    return "\n".join(parts) + "\n"


def readme(text: str) -> str:
    """README.md with the output of its commands as it is now, and the table of formats."""
    with _checkout():
        text = re.sub(r"```console\n(\$ loraformat .*?)```", lambda block: _session(block[1]), text, flags=re.DOTALL)
    rows = "".join(
        f"| [{each.NAME}](docs/formats/{each.NAME}.md) | {each.TITLE} | yes | {'yes' if each.WRITES else 'no'} |\n"
        for each in FORMATS
    )
    head = "| name | what it is | reads | writes |\n|---|---|---|---|\n"
    return re.sub(re.escape(head) + r"(\|.*\n)*", lambda _: head + rows, text)


def walk(text: str) -> str:
    """docs/inspect.md with the output of its commands as it is now."""
    with _checkout():
        return re.sub(r"```console\n(\$ loraformat .*?)```", lambda block: _session(block[1]), text, flags=re.DOTALL)


def _session(block: str) -> str:
    command = block.splitlines()[0]
    arguments = shlex.split(command.removeprefix("$ loraformat "))
    done = CliRunner().invoke(loraformat, arguments, prog_name="loraformat")
    lines = [line.rstrip() for line in done.output.splitlines()]
    return "\n".join(["```console", command, *lines, "```"])


@contextmanager
def _checkout() -> Iterator[None]:
    """A temporary working directory that has the fixtures of this checkout."""
    before = os.getcwd()
    folder = tempfile.mkdtemp()
    for name in ("minigpt", "bad"):
        shutil.copytree(ROOT / "fixtures" / name, Path(folder) / "fixtures" / name)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def main() -> None:
    """Write the pages, and remove those that have no code any more."""
    texts = documents()
    TARGET.mkdir(exist_ok=True)
    for stale in {path.name for path in TARGET.glob("*.md")} - set(texts):
        (TARGET / stale).unlink()
    for name, text in texts.items():
        (TARGET / name).write_text(text, encoding="utf-8")
    (ROOT / "docs" / "cli.md").write_text(cli(), encoding="utf-8")
    example = ROOT / "docs" / "inspect.md"
    example.write_text(walk(example.read_text(encoding="utf-8")), encoding="utf-8")
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
