"""Writes docs/rules: a page for each code, and an index. Run: python docs/generate.py."""

from __future__ import annotations

from pathlib import Path

from loraformat.jobs.explain import Page, pages

TARGET = Path(__file__).parent / "rules"

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


def main() -> None:
    """Write the pages, and remove those that have no code any more."""
    texts = documents()
    TARGET.mkdir(exist_ok=True)
    for stale in {path.name for path in TARGET.glob("*.md")} - set(texts):
        (TARGET / stale).unlink()
    for name, text in texts.items():
        (TARGET / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
