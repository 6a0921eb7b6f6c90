"""Locks of an output: an object that only one run can create, and that a running one renews."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from loraformat import strict_json
from loraformat.diagnostics import show
from loraformat.errors import InvalidJson, LoraFormatError, StorageError
from loraformat.storage.s3.address import Address
from loraformat.storage.s3.client import Client, as_storage_error, is_absent, is_conflict, is_cut
from loraformat.storage.s3.records import LOCK
from loraformat.storage.s3.requests import put_object, remove

_RENEWED_S = 30
_STALE_S = 180  # without renewal; by the clock of the service
_MOST_NBYTES = 4096
_ATTEMPTS = 4

# Words of the locks that this process holds.
_held: set[str] = set()


@dataclass(frozen=True, slots=True)
class _Found:
    """A lock that is there: its ETag, its age in seconds, and its owner."""

    etag: str
    age_s: float
    owner: dict[str, Any]


class Lock:
    """A lock that is held. Use `locked`."""

    def __init__(self, client: Client, address: Address, name: str = LOCK) -> None:
        self._client, self._bucket, self._key = client, address.bucket, address.key(name)
        self._uri = address.uri
        self._word = os.urandom(8).hex()
        self._etag = ""
        self._count = 0  # of writes, so that each has an ETag of its own
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="loraformat-lock", daemon=True)

    def take(self) -> None:
        """Raises: StorageError: another run has it, or nothing can be written there."""
        _held.add(self._word)
        try:
            with as_storage_error(self._uri):
                self._take()
                self._prove()
        except BaseException:
            _held.discard(self._word)
            raise
        self._thread.start()

    def _take(self) -> None:
        for _ in range(_ATTEMPTS):
            if self._put(IfNoneMatch="*"):
                return
            found = self.look()
            if found is None:
                continue
            if found.owner.get("word") == self._word:  # the answer to our own request was lost
                self._etag = found.etag
                return
            if not _is_stale(found):
                raise _in_use(found, self._uri)
            if self._put(IfMatch=found.etag):
                return
        raise StorageError("another run is taking the lock at the same time", hint="try again later")

    def _put(self, **condition: str) -> bool:
        self._count += 1
        data = self._content()
        try:
            self._etag = put_object(self._client, self._bucket, self._key, data, **condition)
        except Exception as error:
            if is_conflict(error) or ("IfMatch" in condition and is_absent(error)):
                return False
            raise
        return True

    def _prove(self) -> None:
        """Raises: StorageError: the lock is not ours. Where the service ignores conditions, the last one has it."""
        found = self.look()
        if found is None or found.owner.get("word") != self._word:
            raise StorageError("another run is taking the lock at the same time", hint="try again later")

    def check(self) -> None:
        """Raises: StorageError: another run has taken the lock, since this one did not renew it in time."""
        with as_storage_error(self._uri):
            found = self.look()
        if found is None or found.owner.get("word") != self._word:
            text = "another run has taken the lock because this one could not renew it for minutes"
            raise StorageError(text, where=self._uri, hint="run it again")

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        _held.discard(self._word)
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.check()
        remove(self._client, self._bucket, [self._key])

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWED_S):
            with suppress(LoraFormatError), as_storage_error(self._uri):
                self.renew()

    def renew(self) -> None:
        """Write it again, so that it is fresh; nothing where another run has it."""
        if not self._put(IfMatch=self._etag):
            found = self.look()
            if found is not None and found.owner.get("word") == self._word:  # an answer was lost
                self._put(IfMatch=found.etag)

    def look(self) -> _Found | None:
        """The lock that is there; None where none is."""
        for attempt in range(_ATTEMPTS):
            try:
                answer = self._client.quick.get_object(Bucket=self._bucket, Key=self._key)
                with closing(answer["Body"]) as body:
                    data = body.read(_MOST_NBYTES)
                if len(data) == min(answer["ContentLength"], _MOST_NBYTES) or attempt + 1 == _ATTEMPTS:
                    break
            except Exception as error:
                if is_absent(error):
                    return None
                if not is_cut(error) or attempt + 1 == _ATTEMPTS:
                    raise
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        now = parsedate_to_datetime(headers["date"]) if "date" in headers else answer["LastModified"]
        return _Found(str(answer["ETag"]), (now - answer["LastModified"]).total_seconds(), _parsed(data))

    def _content(self) -> bytes:
        return json.dumps({"word": self._word, "count": self._count, **_self()}).encode()


def check_unlocked(client: Client, address: Address, name: str = LOCK) -> None:
    """Raises: StorageError: a run has the lock."""
    with as_storage_error(address.uri):
        found = Lock(client, address, name).look()
    if found is not None and not _is_stale(found):
        raise _in_use(found, address.uri)


@contextmanager
def locked(client: Client, address: Address, name: str = LOCK) -> Iterator[Lock]:
    """The right to write to an address for as long as the block lasts.

    Args:
        name: of the lock; those who share an output have one each, which says that they are alive.

    Raises: StorageError: another run has it, or nothing can be written there.
    """
    lock = Lock(client, address, name)
    lock.take()
    try:
        yield lock
    finally:
        with suppress(LoraFormatError):
            lock.release()


def _self() -> dict[str, Any]:
    """What tells this process from all others, on whatever machine."""
    return {"host": _host(), "name": socket.gethostname()[:100], "pid": os.getpid(), "started": _started(os.getpid())}


def _host() -> str:
    """A machine since it was started, and the space in which its process ids count."""
    found = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            found.append(str(os.stat(path).st_ino) if path.endswith("pid") else _line(path))
    return " ".join(found) if len(found) == 2 else ""


def _started(pid: int) -> str:
    """When a process was started, in ticks of the machine; "" where that cannot be found out."""
    with suppress(OSError, IndexError):
        return _line(f"/proc/{pid}/stat").rpartition(")")[2].split()[19]
    return ""


def _line(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.readline().strip()


def _is_stale(found: _Found) -> bool:
    """Whether the owner is gone: a process of this machine that ended, or one that has not renewed its lock."""
    owner = found.owner
    host, pid = owner.get("host"), owner.get("pid")
    if host and host == _host() and type(pid) is int and owner.get("started"):
        is_gone = _started(pid) != owner.get("started")
        return is_gone or (pid == os.getpid() and owner.get("word") not in _held)
    return found.age_s > _STALE_S


def _in_use(found: _Found, uri: str) -> StorageError:
    name, pid = show(found.owner.get("name", "another machine"), 60), show(found.owner.get("pid", "unknown"), 20)
    left = max(0, round(_STALE_S - found.age_s))
    hint = f"if that run has died, its lock expires in {left} s"
    return StorageError(f"in use by pid {pid} on {name}", where=uri, hint=hint)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = strict_json.parse(data, LOCK, limit=_MOST_NBYTES)
    except InvalidJson:
        return {}
    return dict(value) if isinstance(value, dict) else {}
