"""Digests of what a merge writes: of a tensor while threads write its windows, and of all files as a list."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Condition
from typing import Any, cast

from loraformat.storage import ALGORITHM, Run, digest_of, new_hash

SCHEMA = "loraformat.digests/1"


class Digest:
    """Takes windows in the order of their rows, whichever is computed first.

    A thread waits for the windows before its own. Windows are begun in order, so those are at work or done.
    """

    def __init__(self) -> None:
        self._hash = new_hash()
        self._next = 0
        self._has_failed = False
        self._moved = Condition()

    @contextmanager
    def turn(self, start: int, stop: int) -> Iterator[Callable[[memoryview], None]]:
        """A block that computes rows `start:stop` and calls what it is given with their bytes.

        Where it raises, windows after it are not waited for any more: the tensor has no digest then.
        """

        def add(data: memoryview) -> None:
            with self._moved:
                self._moved.wait_for(lambda: self._next == start or self._has_failed)
            self._hash.update(data)
            with self._moved:
                self._next = stop
                self._moved.notify_all()

        try:
            yield add
        except BaseException:
            with self._moved:
                self._has_failed = True
                self._moved.notify_all()
            raise

    def hexdigest(self) -> str:
        """The digest of all windows so far."""
        return self._hash.hexdigest()


def build_digests(
    sizes: Mapping[str, int],
    runs: Mapping[str, Sequence[Run]],
    sha256: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The digests as JSON values.

    Args:
        sizes: name → bytes, of every file of the output but the two that describe it.
        runs: name → digests of its bytes; those that were left out are in none.
        sha256: name → SHA-256 of the whole file, where that was asked for.
        inputs: SHA-256 of the inputs' files, where that was asked for.
    """
    whole = sha256 or {}
    files = {
        name: {
            "nbytes": nbytes,
            "runs": [list(run) for run in runs.get(name, ())],
            **({"sha256": whole[name]} if name in whole else {}),
        }
        for name, nbytes in sorted(sizes.items())
    }
    return {
        "schema": SCHEMA,
        "algorithm": ALGORITHM,
        "files": files,
        **({"inputs": dict(inputs)} if inputs else {}),
    }


def rendered(record: Mapping[str, Any]) -> bytes:
    """A record as bytes, with the digest of itself: keys sorted, only ASCII, a line end."""
    values = {key: value for key, value in record.items() if key != "digest"}
    return _text({**values, "digest": digest_of(_text(values))})


def is_as_rendered(data: bytes, record: Mapping[str, Any]) -> bool:
    """Whether the bytes of a record, and the values in it, are those that `rendered` gave."""
    return data == rendered(record)


def runs_of(record: Mapping[str, Any]) -> dict[str, tuple[Run, ...]]:
    """The runs of a record that fits its schema, by file."""
    files = cast("Mapping[str, Mapping[str, Any]]", record["files"])
    return {name: tuple(Run(*run) for run in entry["runs"]) for name, entry in files.items()}


def _text(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return f"{text}\n".encode("ascii")
