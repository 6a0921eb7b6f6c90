"""Debian's Chromium without a window: what a page is after its script ran, what it said, and what it asked for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
# What the browser asks for on its own account, whatever the page.
_OWN_HOSTS = (".google.com", ".googleapis.com", ".gvt1.com")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
)


@dataclass(frozen=True)
class Seen:
    """A page in the browser.

    Attributes:
        dom: its HTML after the script.
        console: what it wrote to the console, errors of the browser about the page included.
        requests: addresses that were asked for, those of the browser's own services left out.
    """

    dom: str
    console: list[str]
    requests: list[str]


def visit(address: str, folder: Path) -> Seen:
    """Open an address in a fresh profile below `folder`."""
    log = folder / "net.json"
    command = [
        str(CHROMIUM),
        *_FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}",
        "--dump-dom",
        address,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    shutil.rmtree(folder / "profile", ignore_errors=True)
    return Seen(done.stdout, console, _requested(log))


def _requested(log: Path) -> list[str]:
    """Addresses of all requests in a net log, which Chromium may leave without its closing brackets."""
    text = log.read_text()
    try:
        events = json.loads(text)["events"]
    except ValueError:
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    found = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    remote = (re.match(r"(?:https?|wss?|ftp)://([^/:?#]*)", url) for url in found)
    return sorted(match.string for match in remote if match and not match[1].endswith(_OWN_HOSTS))


class Dom(HTMLParser):
    """Classes of cells, rows of tables by their id, and attributes of the root element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root: dict[str, str | None] = {}
        self.cells: list[dict[str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.sorted_by: str | None = None
        self.texts: dict[str, str] = {}
        self._table: str | None = None
        self._row: list[str] | None = None
        self._ids: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "html":
            self.root = found
        if tag == "g" and "data-cell" in found:
            self.cells.append(found)
        if tag == "table":
            self._table = found.get("id") or ""
            self.tables[self._table] = []
        if tag == "th" and found.get("aria-sort") in ("ascending", "descending"):
            self.sorted_by = f"{found['data-column']} {found['aria-sort']}"
        if tag == "tr" and self._table is not None:
            self._row = []
            self.tables[self._table].append(self._row)
        if tag in ("td", "th") and self._row is not None:
            self._row.append("")
        if found.get("id"):
            self._ids.append(found["id"])

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        if tag == "tr":
            self._row = None

    def handle_data(self, data: str) -> None:
        if self._row:
            self._row[-1] += data
        if self._ids and self._ids[-1] is not None:
            self.texts[self._ids[-1]] = self.texts.get(self._ids[-1], "") + data
