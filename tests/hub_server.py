"""A server on this machine that speaks as much of the Hub as is asked of it, and answers as a test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories, and what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.commit = COMMIT
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.sent = 0
        self.serves_ranges = True
        # Taken one after the other, each in the place of an answer; those of `for_files` for files alone.
        self.faults: list[Callable[[Answer], None]] = []
        self.for_files: list[Callable[[Answer], None]] = []
        self.done = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        return

    def do_GET(self) -> None:
        path, wanted = self.path.partition("?")[0], self.headers.get("Range")
        self.server.asked.append((path, wanted))
        if faults := self.server.for_files if "/resolve/" in path else self.server.faults:
            faults.pop(0)(self)
        elif path in (
            "/api/models/org/base",
            "/api/models/org/base/revision/v1",
            f"/api/models/org/base/revision/{self.server.commit}",
        ):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
            self.answer(200, json.dumps({"id": "org/base", "sha": self.server.commit, "siblings": siblings}).encode())
        elif path.startswith(f"/org/base/resolve/{self.server.commit}/"):
            data = self.server.files[path.partition(f"{self.server.commit}/")[2]]
            if wanted and self.server.serves_ranges:
                first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
                self.answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
            else:
                self.answer(200, data)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.server.sent += len(body)
