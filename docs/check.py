"""A look at the built site: every link inside of it leads somewhere, and no page asks another host for anything.

Run: python docs/check.py FOLDER.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Elements that load what they name as soon as the page is opened.
_LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class _Page(HTMLParser):
    """Names of elements, links, and what is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.names |= {found[key] for key in ("id", "name") if key in found}
        address = found.get(_LOADS.get(tag, ""), "")
        if address and found.get("rel") not in ("canonical", "alternate"):
            self.loaded.append(address)
        if tag == "a" and "href" in found:
            self.links.append(found["href"])


def problems(site: Path) -> list[str]:
    """What is wrong, a line each."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found += [f"{where}: loads {address}" for address in page.loaded if urlsplit(address).netloc]
        for address in [*page.links, *(one for one in page.loaded if not urlsplit(one).netloc)]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{where}: {address} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names:
                found.append(f"{where}: {address}: the page has no such heading")
    return found if pages else [f"{site}: no pages"]


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]).resolve())
    sys.exit("\n".join(lines) if lines else 0)
