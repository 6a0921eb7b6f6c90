"""The folders below a folder of this machine, within bounds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from loraformat.errors import StorageError
from loraformat.storage.faults import as_storage_error

MOST_FOLDERS = 100_000
_HINT = "pass the folders themselves"


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder and what lies in it.

    Attributes:
        path: below the path that was asked for.
        files: names of regular files, links to them included, sorted.
        links: how many links to folders it has; none is followed.
    """

    path: str
    files: tuple[str, ...]
    links: int


def folders_below(path: str, *, depth: int) -> Iterator[Folder]:
    """The folder at `path`, then every folder below it, parents first and numbers in their order; no hidden ones.

    Raises: StorageError: one cannot be listed, or there are folders more than `depth` levels down, or too many.
    """
    waiting = [(path, 0)]
    count = 0
    while waiting:
        here, level = waiting.pop()
        folder, inner = _listed(here)
        yield folder
        if inner and level == depth:
            raise StorageError(f"folders are nested more than {depth} levels deep", where=path, hint=_HINT)
        count += len(inner)
        if count > MOST_FOLDERS:
            raise StorageError(f"more than {MOST_FOLDERS} folders", where=path, hint=_HINT)
        waiting += [(os.path.join(here, name), level + 1) for name in sorted(inner, key=in_numbers, reverse=True)]


def in_numbers(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts checkpoint-500 before checkpoint-1000."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name) if part)


def _listed(path: str) -> tuple[Folder, list[str]]:
    files, inner, links = [], [], 0
    with as_storage_error(path), os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.name)
            elif entry.is_file():
                files.append(entry.name)
            elif entry.is_symlink() and entry.is_dir():
                links += 1
    return Folder(path, tuple(sorted(files)), links), inner
