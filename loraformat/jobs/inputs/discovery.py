"""The adapters of a path: itself, the folder that a file belongs to, or those in subfolders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loraformat import formats
from loraformat.containers import has_components, open_bundle
from loraformat.diagnostics import listed
from loraformat.errors import LoraFormatError, StorageError, UnknownFormat
from loraformat.formats.kit.folder import is_training_state
from loraformat.io import folder_of
from loraformat.model.format_files import has_marker
from loraformat.report.words import plural
from loraformat.storage import WEIGHT_SUFFIXES, Folder, folders_below

DEPTH = 16
MOST_ADAPTERS = 1000
_FEW = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """The adapters that paths stand for.

    Attributes:
        adapters: paths, each once, in their order.
        errors: path → why it could not be searched; it is among `adapters`.
        notes: what was passed over, in numbers.
    """

    adapters: tuple[str, ...]
    errors: Mapping[str, StorageError] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def discover(paths: Sequence[str], *, recursive: bool = True, format: str | None = None) -> Discovery:  # noqa: A002
    """The adapters that `paths` stand for.

    A file of an adapter's folder stands for that folder. A folder stands for itself where it is an adapter, and for
    every adapter below it: the checkpoints of a run, the adapters that PEFT writes one a subfolder. A folder in which
    no adapter is found stands for itself, so that it is judged, and refused.

    Args:
        paths: folders, files, addresses of the Hub; what does not exist is returned as it is.
        recursive: False takes every folder as it is.
        format: where it was chosen, every path is taken as it is.
    """
    if format is not None:
        return Discovery(adapters=tuple(dict.fromkeys(paths)))
    adapters: dict[str, None] = {}
    errors: dict[str, StorageError] = {}
    notes: list[str] = []
    for path in paths:
        found = [folder_of(path)]
        if recursive and os.path.isdir(path):
            try:
                found = _below(path, notes)
            except StorageError as error:
                errors[path] = error
        adapters.update(dict.fromkeys(found))
    return Discovery(adapters=tuple(adapters), errors=errors, notes=tuple(notes))


def _below(path: str, notes: list[str]) -> list[str]:
    """Raises: StorageError: it cannot be searched within the bounds."""
    if has_components(path):
        return [path]
    found: list[str] = []
    loose: list[str] = []
    links = 0
    for folder in folders_below(path, depth=DEPTH):
        links += folder.links
        if has_marker(folder.files):
            found.append(folder.path)
        elif folder.path == path:
            found += _in_top(folder, loose)
        else:
            loose += _weight_files(folder)
        if len(found) > MOST_ADAPTERS:
            raise StorageError(
                f"more than {MOST_ADAPTERS} adapters below", where=path, hint="pass the folders themselves"
            )
    if not found:
        return [path]
    notes += _notes(path, loose, links)
    return found


def _in_top(folder: Folder, loose: list[str]) -> Iterator[str]:
    """The folder, where its only weight file is an adapter; each such file, where there are several."""
    files = list(_weight_files(folder))
    if len(files) == 1:
        if _may_be_adapter(folder.path):
            yield folder.path
        else:
            loose += files
        return
    for file in files:
        if _may_be_adapter(file):
            yield file
        else:
            loose.append(file)


def _may_be_adapter(path: str) -> bool:
    """Whether a format fits, or the file is damaged, which is to be told."""
    try:
        formats.detect(open_bundle(path))
    except UnknownFormat:
        return False
    except LoraFormatError:
        return True
    return True


def _weight_files(folder: Folder) -> Iterator[str]:
    for name in folder.files:
        if name.lower().endswith(WEIGHT_SUFFIXES) and not is_training_state(name):
            yield os.path.join(folder.path, name)


def _notes(path: str, loose: Sequence[str], links: int) -> Iterable[str]:
    if loose:
        names = listed([os.path.relpath(each, path) for each in loose], _FEW)
        yield f"{path}: not checked: {plural(len(loose), 'weight file')} outside of adapters: {names}"
    if links:
        yield f"{path}: not searched: {plural(links, 'link')} to folders"
