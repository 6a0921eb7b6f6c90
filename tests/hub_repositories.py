"""A Hub with repositories on 127.0.0.1: what huggingface_hub 2.4.0 asks for reading, uploading and committing.

Our reading of the protocol, without Xet (HF_HUB_DISABLE_XET=1). Large files lie on another host name, as the Hub's do:
no token may go there. Every request is in `log`; `faults` go wrong as a test wants it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

TOKEN = "hf_THEsecretTOKENofTHEtests"
_LARGE = re.compile(r"\.(safetensors|bin|gguf|pt|npz)$")
_LARGE_NBYTES = 10 << 20


class Stored(NamedTuple):
    sha256: str
    nbytes: int
    is_large: bool
    blob: str


@dataclass
class Fault:
    """Requests whose path matches go wrong: so many, after so many that do not.

    kind: "status", "reset", "cut" (half of the body), "lost" (done, but no answer), "call" (a function first), "wait"
    (until `gate` is set).
    """

    kind: str
    path: str
    times: int = 1
    skip: int = 0
    code: int = 503
    method: str = "."
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "injected"}'
    call: Callable[[Hub], None] = lambda hub: None
    gate: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repository:
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    region: str = "us"
    is_private: bool = False
    has_xet: bool = True
    ignored: str = ""


@dataclass
class Row:
    method: str
    path: str
    host: str
    has_token: bool
    received: int = 0
    sent: int = 0
    status: int = 0


class Hub:
    """Repositories by name, and what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens = {TOKEN: "write"}
        self.organizations = ["acme"]
        self.log: list[Row] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.other_host = f"http://localhost:{self.server.server_port}"

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        names = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return names if token is None else {**names, "HF_TOKEN": token}

    def store(self, data: bytes, path: str) -> Stored:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Stored(sha256, len(data), bool(_LARGE.search(path)) or len(data) > _LARGE_NBYTES, blob)

    def create(self, name: str, **settings: Any) -> Repository:
        self.repositories[name] = Repository(**settings)
        self.commit(name, "main", {".gitattributes": self.store(b"*.safetensors filter=lfs\n", ".gitattributes")})
        return self.repositories[name]

    def commit(self, name: str, branch: str, files: Mapping[str, Stored], message: str = "") -> str:
        repository = self.repositories[name]
        text = json.dumps([name, branch, sorted(files), len(repository.commits)])
        commit = hashlib.sha1(text.encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.messages[commit] = message
        repository.refs[branch] = commit
        return commit

    def put(self, name: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add files to a repository, which is made where it is not there."""
        if name not in self.repositories:
            self.create(name)
        there = self.files(name, branch)
        return self.commit(name, branch, {**there, **{path: self.store(data, path) for path, data in files.items()}})

    def put_folder(self, name: str, folder: Path) -> str:
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories.setdefault(name, Repository())
        return self.commit(name, "main", {path: self.store(data, path) for path, data in found.items()})

    def files(self, name: str, branch: str = "main") -> dict[str, Stored]:
        repository = self.repositories[name]
        return repository.commits[repository.refs.get(branch, branch)]

    def read(self, name: str, path: str, branch: str = "main") -> bytes:
        return self.blobs[self.files(name, branch)[path].sha256]

    def taken(self, pattern: str = "", since: int = 0) -> list[Row]:
        return [row for row in self.log[since:] if re.search(pattern, f"{row.method} {row.path}")]

    def fault(self, kind: str, path: str, **more: Any) -> Fault:
        self.faults.append(Fault(kind, path, **more))
        return self.faults[-1]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        for fault in hub.faults:
            fault.gate.set()
        hub.server.shutdown()
        hub.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    hub: Hub
    row: Row

    def log_message(self, *arguments: Any) -> None:
        return

    # What comes in

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path, token = urllib.parse.unquote(url.path), self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.row = Row(self.command, path, self.headers.get("Host", ""), bool(token))
        self.hub.log.append(self.row)
        if self._fault("reset"):
            self._drop()
            return
        body = self._body() if self.command in ("POST", "PUT", "DELETE") else b""
        self.row.received = len(body)
        if (found := self._fault("wait")) is not None:
            found.reached.set()
            found.gate.wait(120)
        if (found := self._fault("call")) is not None:
            found.call(self.hub)
        if (found := self._fault("status")) is not None:
            self._send(found.code, found.body, found.headers)
            return
        self.is_lost = self._fault("lost") is not None
        with self.hub.lock:
            self._answer(path, dict(urllib.parse.parse_qsl(url.query)), body, token)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - the library calls them so

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while count := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(count))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fault(self, kind: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                is_meant = fault.kind == kind and re.search(fault.path, self.row.path)
                if not is_meant or not re.search(fault.method, self.command) or fault.times <= 0:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    # What goes out

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if getattr(self, "is_lost", False):
            self._drop()
            return
        self.row.status = status
        self.row.sent += len(data)
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            half = self._fault("cut") is not None
            self.wfile.write(data[: len(data) // 2] if half else data)
            self.wfile.flush()
            if half:
                self._drop()
        self.wfile.flush()

    def _refuse(self, status: int, code: str, text: str) -> None:
        self._send(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text})

    def _send_bytes(self, data: bytes) -> None:
        wanted = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, data)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        self._send(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # The routes

    def _answer(self, path: str, query: dict[str, str], body: bytes, token: str) -> None:
        if (found := re.fullmatch(r"/large/([0-9a-f]{64})", path)) is not None:
            self._large(found[1], body)
            return
        if token and token not in self.hub.tokens:
            self._send(401, {"error": "Invalid username or password."})
            return
        for pattern, route in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found is None:
                continue
            name = found.groupdict().get("name")
            repository = self.hub.repositories.get(name or "")
            if name and (repository is None or (repository.is_private and not token)):
                self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            else:
                route(self, found.groupdict(), query, body, token)
            return
        self._send(404, {"error": f"no such route: {self.command} {path}"})

    def _large(self, sha256: str, body: bytes) -> None:
        if self.command != "PUT":
            self._send_bytes(self.hub.blobs[sha256])
        elif hashlib.sha256(body).hexdigest() == sha256:
            self.hub.blobs[sha256] = body
            self._send(200, b"")
        else:
            self._send(400, b"another SHA-256")

    def _who(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        orgs = [{"name": name} for name in self.hub.organizations]
        role = {"accessToken": {"role": self.hub.tokens.get(token, "read")}}
        self._send(200, {"type": "user", "name": "tester", "orgs": orgs, "auth": role})

    def _repositories(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        fields = json.loads(body)
        name = f"{fields.get('organization') or 'tester'}/{fields['name']}"
        if self.command == "DELETE":
            del self.hub.repositories[name]
            self._send(200, {})
        elif name in self.hub.repositories:
            self._send(409, {"error": "exists"})
        else:
            self.hub.create(name, is_private=fields.get("visibility") == "private" or bool(fields.get("private")))
            self._send(200, {"url": f"{self.hub.url}/{name}"})

    def _yaml(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _batch(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.other_host}/large/{one['oid']}", "header": {}}}}
            if one["oid"] not in self.hub.blobs
            else one
            for one in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _duplicate(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        fields = json.loads(body)
        target = self.hub.repositories[fields["target"]["name"]]
        hashes = [one["sha256"] for one in fields["files"]]
        if target.region == self.hub.repositories[found["name"]].region:
            self._send(200, {"success": hashes, "failed": []})
        else:
            failed = [{"sha256": one, "error": "another storage region"} for one in hashes]
            self._send(200, {"success": [], "failed": failed})

    def _state(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        commit = self._commit_of(found)
        if commit is None:
            return
        files = self.hub.repositories[found["name"]].commits[commit]
        siblings = []
        for path, one in files.items():
            lfs = {"lfs": {"sha256": one.sha256, "size": one.nbytes, "pointerSize": 134}} if one.is_large else {}
            siblings.append({"rfilename": path, "size": one.nbytes, "blobId": one.blob, **lfs})
        self._send(200, {"id": found["name"], "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _commit_of(self, found: dict[str, str]) -> str | None:
        repository, revision = self.hub.repositories[found["name"]], found.get("revision") or "main"
        commit = repository.refs.get(revision) or (revision if revision in repository.commits else None)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _branch(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        repository = self.hub.repositories[found["name"]]
        if self.command == "DELETE":
            del repository.refs[found["revision"]]
        else:
            repository.refs[found["revision"]] = repository.refs["main"]
        self._send(200, {})

    def _preupload(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        if self.hub.tokens.get(token) != "write":
            self._refuse(403, "", "You do not have write access")
            return
        repository, files = self.hub.repositories[found["name"]], []
        for one in json.loads(body)["files"]:
            mode = "lfs" if _LARGE.search(one["path"]) or one["size"] > _LARGE_NBYTES else "regular"
            is_ignored = bool(repository.ignored) and one["path"].endswith(repository.ignored)
            files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": is_ignored})
        self._send(200, {"files": files})

    def _paths(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        commit = self._commit_of(found)
        if commit is None:
            return
        repository = self.hub.repositories[found["name"]]
        paths = (
            json.loads(body)["paths"]
            if body[:1] == b"{"
            else [value for key, value in urllib.parse.parse_qsl(body.decode()) if key == "paths"]
        )
        entries = []
        for path in paths:
            if (one := repository.commits[commit].get(path)) is not None:
                large = {"lfs": {"oid": one.sha256, "size": one.nbytes, "pointerSize": 134}} if one.is_large else {}
                xet = {"xetHash": one.sha256[::-1]} if one.is_large and repository.has_xet else {}
                entries.append({"type": "file", "path": path, "size": one.nbytes, "oid": one.blob, **large, **xet})
        self._send(200, entries)

    def _committed(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        name, branch = found["name"], found["revision"]
        commit = self._commit_of(found)
        if commit is None:
            return
        files, message = dict(self.hub.repositories[name].commits[commit]), ""
        for line in body.splitlines():
            key, value = (each := json.loads(line))["key"], each["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, commit):
                    self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
                    return
            elif key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]), value["path"])._replace(
                    is_large=False
                )
            elif key == "lfsFile":
                files[value["path"]] = self.hub.store(self.hub.blobs[value["oid"]], value["path"])
            elif key == "deletedFile":
                del files[value["path"]]
        target = f"refs/pr/{len(self.hub.repositories[name].commits)}" if query.get("create_pr") else branch
        made = self.hub.commit(name, target, files, message)
        answer = {"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{name}/commit/{made}"}
        self._send(200, {**answer, "pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"})

    def _resolve(self, found: dict[str, str], query: dict[str, str], body: bytes, token: str) -> None:
        commit = self._commit_of(found)
        if commit is None:
            return
        one = self.hub.repositories[found["name"]].commits[commit].get(found["path"])
        if one is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif one.is_large:
            self._send(302, b"", {"Location": f"{self.hub.other_host}/large/{one.sha256}"})
        else:
            self._send_bytes(self.hub.blobs[one.sha256])


_NAME = r"(?P<name>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>.+)"
_Route = Callable[[Handler, dict[str, str], dict[str, str], bytes, str], None]
_ROUTES: tuple[tuple[str, _Route], ...] = (
    (r"/api/whoami-v2", Handler._who),
    (r"/api/repos/(?:create|delete)", Handler._repositories),
    (r"/api/validate-yaml", Handler._yaml),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", Handler._batch),
    (rf"/api/models/{_NAME}/lfs-files/duplicate", Handler._duplicate),
    (rf"/api/models/{_NAME}", Handler._state),
    (rf"/api/models/{_NAME}/revision/{_REVISION}", Handler._state),
    (rf"/api/models/{_NAME}/branch/{_REVISION}", Handler._branch),
    (rf"/api/models/{_NAME}/preupload/{_REVISION}", Handler._preupload),
    (rf"/api/models/{_NAME}/paths-info/{_REVISION}", Handler._paths),
    (rf"/api/models/{_NAME}/commit/{_REVISION}", Handler._committed),
    (rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler._resolve),
)
