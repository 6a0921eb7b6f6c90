"""Debian's Chromium without a window: what a page is after its script ran, what it said, and what it asked for."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
# What the browser asks for on its own account, whatever the page.
_OWN_HOSTS = (".google.com", ".googleapis.com", ".gvt1.com")
_LONGEST_WAIT_MS = 60_000
_LONGEST_SILENCE_S = 90
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
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


@dataclass
class Tab:
    """A page that stays open: scripts run in it, keys are pressed. Chrome's DevTools protocol, by pipes."""

    to: int
    out: int
    session: str = ""
    _number: int = 0
    _rest: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; what happens meanwhile is kept in `events`."""
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.to, json.dumps(command).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def run_in(self, session: str, script: str) -> Any:
        """The value of an expression in a worker of the page by its session; "" is the page itself."""
        before = self.session
        self.session = session or before
        try:
            return self.run(script)
        finally:
            self.session = before

    def event(self, method: str) -> dict[str, Any]:
        """The parameters of the next event of a kind, of those that came already too."""
        while not (found := [each for each in self.events if each.get("method") == method]):
            self.events.append(self._next())
        self.events.remove(found[0])
        return dict(found[0]["params"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page, a promise waited for."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true of the page, which is looked at whenever its elements change."""
        self.run(f"""new Promise((resolve, reject) => {{
            setTimeout(() => reject(new Error(document.body.innerText)), {_LONGEST_WAIT_MS});
            const changes = new MutationObserver(look);
            function look() {{ if ({condition}) {{ changes.disconnect(); resolve(); }} }}
            const every = {{ subtree: true, childList: true, attributes: true, characterData: true }};
            changes.observe(document, every);
            look();
        }})""")

    def drop(self, *paths: Path) -> None:
        """Files and folders dropped on the page, as from a file manager."""
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.ask("Input.dispatchDragEvent", type=kind, x=50, y=50, data=data)

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def press(self, key: str) -> None:
        """A key, as the keyboard has it."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        typed = {"text": "\r"} if key == "Enter" else {}  # without it no button is pressed
        for kind in ("keyDown" if typed else "rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **typed)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self.out], [], [], _LONGEST_SILENCE_S)[0], "the browser says nothing any more"
            got = os.read(self.out, 1 << 20)
            assert got, "the browser ended"
            self._rest += got
        one, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(one))


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder over http: its address, and a list that grows by each path that is asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *said: object) -> None:
            """Nothing: `asked` has it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def opened(address: str, folder: Path, *, width: int = 1200, is_dark: bool = False) -> Iterator[Tab]:
    """An address in a tab of `width` pixels, in a fresh profile below `folder`; downloads go to `folder`."""
    (child_in, to), (out, child_out) = os.pipe(), os.pipe()

    def connect() -> None:
        reads, writes = os.dup(child_in), os.dup(child_out)  # first: a pipe may stand where another must go
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *_FLAGS, "--remote-debugging-pipe", profile, "about:blank"]
    browser = subprocess.Popen(command, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=connect)  # noqa: PLW1509
    os.close(child_in)
    os.close(child_out)
    try:
        tab = Tab(to, out)
        target = tab.ask("Target.createTarget", url="about:blank")["targetId"]
        tab.session = tab.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab.ask("Page.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        tab.ask("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        tab.ask("Emulation.setEmulatedMedia", features=features)
        tab.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)
        tab.ask("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in tab.events):
            tab.events.append(tab._next())
        yield tab
    finally:
        browser.kill()
        browser.wait()
        os.close(to)
        os.close(out)
        shutil.rmtree(folder / "profile", ignore_errors=True)


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
