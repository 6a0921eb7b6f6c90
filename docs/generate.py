"""Generates text from the source: pages of docs, the outputs in them, parts of README.md and of a schema.

Run: python docs/generate.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from click import Group
from click.testing import CliRunner
from drawing import drawing
from schema_tables import page as schemas_page

import loraformat as loraformat_package
from loraformat.cli import COMMANDS
from loraformat.cli import main as loraformat
from loraformat.errors import LoraFormatError
from loraformat.formats.kit.base import CONTENTS
from loraformat.jobs.explain import Page, explain_target, known_targets, pages
from loraformat.jobs.formats import formats, matrix
from loraformat.model.updates import every_kind
from loraformat.naming.families import denoisers
from loraformat.rules.targets import parse

ROOT = Path(__file__).parent.parent
WALKS = ("algebra.md", "guides/hand-written.md", "inspect.md", "models.md", "validate.md")
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
        "The codes of all findings and errors. Generated from the source by docs/generate.py; codes are never reused.",
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


def runtimes() -> str:
    """docs/runtimes.md: the table behind `validate --target`, runtime by runtime."""
    parts = [
        "# Runtimes",
        "",
        "What `validate --target` checks. Generated from loraformat/rules/runtimes.json by docs/generate.py.",
        "A feature that is not listed loads correctly, as far as we know.",
        "",
        "`--target NAME` checks against the version below, `--target NAME==VERSION` against another one, and",
        "`--target 'NAME>=VERSION'` against the oldest version that must load the adapter. `--max-lora-rank N` is the",
        "rank that the runtime is started with.",
        "",
        "| target | program | formats that it loads | largest rank |",
        "|---|---|---|---|",
        *(_target_row(name, label) for name, label in known_targets()),
    ]
    for name, _ in known_targets():
        page = explain_target(name)
        assert page is not None
        parts += ["", page.replace("# ", f"## `{name}`: ", 1).rstrip()]
    return "\n".join(parts) + "\n"


def _target_row(name: str, label: str) -> str:
    target = parse(name)
    anchor = re.sub(r"[^a-z0-9 -]", "", f"{name} {label}".lower()).replace(" ", "-")
    ranks = ((target.default_rank, "by default"), (target.most_rank, "at most"))
    parts = [f"{rank} {word}" for rank, word in ranks if rank is not None]
    parts += [f"`{target.rank_option}`"] if target.rank_option else []
    greatest = ", ".join(parts) or "-"
    return f"| [{name}](#{anchor}) | {label} | {', '.join(target.reads)} | {greatest} |"


def readme(text: str) -> str:
    """README.md with the output of its commands as it is now, and the table of formats."""
    with _checkout():
        text = re.sub(r"```console\n(\$ loraformat .*?)```", lambda block: _session(block[1]), text, flags=re.DOTALL)
    return _replaced(text, _README_HEAD, _readme_rows("docs/formats/"))


_README_HEAD = "| name | what it is |\n|---|---|\n"


def _readme_rows(folder: str) -> str:
    """A row for each format that is written, and one for all that are only read."""
    every = list(formats())
    written = [f"| [{each.name}]({folder}{each.name}.md) | {each.title} |\n" for each in every if each.writes]
    others = " · ".join(f"[{each.name}]({folder}{each.name}.md)" for each in every if not each.writes)
    return "".join(written) + f"| read only | {others} |\n"


def _replaced(text: str, head: str, rows: str) -> str:
    return re.sub(re.escape(head) + r"(\|.*\n)*", lambda _: head + rows, text)


def walk(text: str) -> str:
    """A page of docs with the output of its commands as it is now."""
    with _checkout():
        return re.sub(r"```console\n(\$ loraformat .*?)```", lambda block: _session(block[1]), text, flags=re.DOTALL)


def _format_rows(folder: str) -> str:
    return "".join(
        f"| [{each.name}]({folder}{each.name}.md) | {each.title} | {'yes' if each.writes else 'no'} |\n"
        for each in formats()
    )


def _matrix(targets: list[str]) -> str:
    """The conversion matrix into some formats: formats that read the same share a row, targets a column."""
    found = matrix()
    columns: dict[tuple[str, ...], list[str]] = {}
    for target in targets:
        column = tuple(_cell(source, cells[target]) for source, cells in found.items())
        columns.setdefault(column, []).append(target)
    rows: dict[tuple[str, ...], list[str]] = {}
    for number, source in enumerate(found):
        rows.setdefault(tuple(column[number] for column in columns), []).append(source)
    head = f"| from \\ to | {' | '.join(', '.join(names) for names in columns.values())} |\n"
    body = "".join(f"| {', '.join(names)} | {' | '.join(cells)} |\n" for cells, names in rows.items())
    return f"{head}|{'---|' * (len(columns) + 1)}\n{body}"


def _cell(source: str, refused: tuple[str, ...] | None) -> str:
    """What survives a conversion, in the shorter of two wordings."""
    if refused is None:
        return "nothing: other models"
    reads = next(each.reads for each in formats() if each.name == source)
    kept = [kind for kind in reads if kind not in refused]
    if not refused:
        return "everything"
    if len(kept) < len(refused):
        return f"only {_joined(kept)}"
    return f"all but {_joined(list(refused))}"


# The words of CONTENTS, shorter where a table has them.
_SHORT = {
    "linear": "linear layers",
    "embedding": "embeddings",
    "convolution": "convolutions",
    "dora": "DoRA",
    "bias": "biases",
    "dense delta": "dense deltas",
    "init subtracted from the base (PiSSA, OLoRA)": "PiSSA and OLoRA",
    "multiplicative (IA3, OFT …)": "IA3, OFT …",
}


def _joined(kinds: list[str]) -> str:
    return ", ".join(_SHORT.get(kind, kind) for kind in kinds)


def _families() -> str:
    """The families whose names are known, and which names files of two formats have."""
    rows = "".join(
        f"| {each.title} | `{each.component}` | {', '.join(each.classes)} | {each.kohya} | {each.comfy} |\n"
        for each in denoisers()
    )
    return (
        "Models whose module names are known without a base; for any other model pass `--base`. The names are\n"
        "those of diffusers, or those of the original model, whose fused modules are split and fused as needed.\n\n"
        f"| model | component | class in diffusers | names in kohya | names in comfy |\n|---|---|---|---|---|\n{rows}"
    )


def formats_page() -> str:
    """docs/formats/README.md: the formats, the conversion matrix and its terms."""
    written = [each for each in formats() if each.writes]
    plain = _matrix([each.name for each in written if not each.families])
    images = _matrix([each.name for each in written if each.families])
    losses = "".join(f"| {each.name} | {', '.join(each.holds)} | {each.loses} |\n" for each in written)
    kinds = "".join(f"| {name} | {meaning} |\n" for name, meaning in CONTENTS.items())
    return (
        "# Formats\n\nGenerated from the source by docs/generate.py.\n\n"
        f"| name | what it is | writes |\n|---|---|---|\n{_format_rows('')}"
        "\n## What comes through a conversion\n\n"
        "Find your format on the left. Whatever a cell does not list is refused before anything is written\n"
        "(LF702), with the weight and the kind of update; everything else survives a conversion and back.\n"
        "`tests/test_pairs.py` tests every pair with LoRA, rsLoRA, DoRA, rank and alpha patterns, embeddings,\n"
        f"heads, tied heads and fused layers.\n\n{plain}\nInto the formats of image and video models:\n\n{images}"
        '\n"Nothing: other models" means that one format has the names of language models and the other those\n'
        "of image models. native and peft hold both. DoRA of an embedding is refused between mlx and the\n"
        "others: there MLX-LM takes norms of rows, PEFT of columns. gguf and litgpt have their own names for\n"
        "the weights of a model, and refuse a model whose names they do not know; gguf refuses LoRA on a head\n"
        "that is tied to the embedding table.\n"
        f"\n| word | meaning |\n|---|---|\n{kinds}"
        f"\n## Image and video models\n\n{_families()}"
        f"\n## What each format holds, and what it loses\n\n| name | holds | loses |\n|---|---|---|\n{losses}"
    )


def python(text: str) -> str:
    """docs/python.md with the kinds of update and the tree of errors as they are now."""
    rows = "".join(f"| `{kind.__name__}` | {_first_line(kind)} |\n" for kind in get_args(loraformat_package.Update))
    text = _replaced(text, "| kind | what it does to the weight W |\n|---|---|\n", rows)
    tree = "\n".join(_branch(loraformat_package.LoraFormatError))
    return re.sub(r"```text\nLoraFormatError.*?```", lambda _: f"```text\n{tree}\n```", text, flags=re.DOTALL)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").splitlines()[0].replace("|", "\\|")


def _branch(error: type[LoraFormatError], before: str = "") -> Iterator[str]:
    """An error and those below it, one a line, with their codes."""
    name = f"{before}{error.__name__}"
    yield f"{name:<35}{error.code} {error.name}"
    below = sorted((each for each in error.__subclasses__()), key=lambda each: each.__name__)
    trunk = before.replace("├── ", "│   ").replace("└── ", "    ")
    for each in below:
        yield from _branch(each, trunk + ("└── " if each is below[-1] else "├── "))


def report_schema(text: str) -> str:
    """schemas/report.schema.json with the names of the kinds of update as their table has them."""
    names = ", ".join(f'"{kind.name}"' for kind in every_kind())
    lines = textwrap.wrap(names, 96, initial_indent=" " * 18, subsequent_indent=" " * 18)
    return re.sub(
        r'("kind": \{\s*"enum": \[\n).*?(\n\s*\])', rf"\1{chr(10).join(lines)}\2", text, count=1, flags=re.DOTALL
    )


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
    (ROOT / "docs" / "formats" / "README.md").write_text(formats_page(), encoding="utf-8")
    (ROOT / "docs" / "cli.md").write_text(cli(), encoding="utf-8")
    for name in WALKS:
        example = ROOT / "docs" / name
        example.write_text(walk(example.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "runtimes.md").write_text(runtimes(), encoding="utf-8")
    (ROOT / "docs" / "schemas.md").write_text(schemas_page(), encoding="utf-8")
    (ROOT / "docs" / "pictures" / "architecture.svg").write_text(drawing(), encoding="utf-8")
    guide = ROOT / "docs" / "python.md"
    guide.write_text(python(guide.read_text(encoding="utf-8")), encoding="utf-8")
    described = ROOT / "schemas" / "report.schema.json"
    described.write_text(report_schema(described.read_text(encoding="utf-8")), encoding="utf-8")
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
