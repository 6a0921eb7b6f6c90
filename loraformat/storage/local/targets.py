"""Where an output may be written: what exists there, what may be replaced, and who may read the result."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Sequence

from loraformat.errors import StorageError
from loraformat.storage.faults import as_storage_error, checked_local_name, kind_of, refuse_existing
from loraformat.storage.local.store import LocalStore
from loraformat.storage.platform import is_same_file, platform

ANYONE = 0o777
_REMOVE = "use another name, or remove it yourself"
_GROUP = 0o070
_OTHERS = ((stat.S_IRGRP, stat.S_IXGRP, _GROUP), (stat.S_IROTH, stat.S_IXOTH, 0o007))


def resolved(target: str) -> str:
    """The absolute path of `target`, its parent free of links; the last component may be a link.

    Raises: StorageError: it is no path, or its parent folder does not exist.
    """
    if "\0" in target:
        raise StorageError("not a path", where=target.replace("\0", "\\x00"))
    parent, name = os.path.split(os.path.abspath(target))
    if not name:
        raise StorageError("this is the root of the file system: it is never written to", where=target)
    if not os.path.isdir(parent):
        raise StorageError("its parent folder does not exist", where=target, hint=f"create {parent}")
    return os.path.join(os.path.realpath(parent), name)


def checked(
    target: str,
    *,
    overwrite: bool,
    inputs: Sequence[str] = (),
    names: Collection[str] = (),
    written: Callable[[str], Collection[str]] | None = None,
) -> str:
    """The path of an output that a run may write; see `stage` for the arguments.

    Raises: StorageError: it may not.
    """
    path = resolved(target)
    refuse_inputs(target, path, inputs)
    refuse_names(target, names)
    refuse_existing_folder(target, path, overwrite, names, written)
    return path


def refuse_names(target: str, names: Collection[str]) -> None:
    """Raises: StorageError: a file or folder of an output cannot have its name on this machine."""
    for name in names:
        for part in filter(None, name.split("/")):  # that of a folder may end in a slash
            checked_local_name(part, target)


def refuse_inputs(target: str, path: str, inputs: Sequence[str]) -> None:
    """Raises: StorageError: `path` is, contains, or lies inside one of the paths that a run reads."""
    for given in inputs:
        if "://" in given or not os.path.exists(given):
            continue
        outputs = {path, os.path.realpath(path)}
        source = os.path.realpath(given)
        if any(_is_in(output, source) or _is_in(source, output) for output in outputs):
            raise StorageError(f"the output is, contains, or lies inside the input {given}", where=target)


def refuse_existing_folder(
    target: str,
    path: str,
    overwrite: bool,
    names: Collection[str] = (),
    written: Callable[[str], Collection[str]] | None = None,
) -> None:
    """See `stage` for what may be replaced: nothing by a run that names no files.

    Raises: StorageError: something stands at `path` that may not be replaced, with the reason.
    """
    if not os.path.lexists(path):
        return
    _refuse_places(target, path)
    with as_storage_error(target):
        kind = kind_of(os.lstat(path).st_mode)
        if kind != "a folder":
            raise StorageError(
                f"the output is a folder, but {kind} exists there, which is not replaced", where=target, hint=_REMOVE
            )
        found = _listed(path, {name.partition("/")[0] for name in names if "/" in name})
    known = names if written is None else {*names, *written(path)}
    others = sorted(name for name, is_file in found.items() if name not in known or not is_file)
    refuse_existing(target, "folder", others, overwrite=overwrite, names=names, written=written)


def permissions_for(sources: Iterable[tuple[object, Iterable[str]]], target: str) -> int:
    """The mode bits that an output made from these files may have: it is never more readable than any of them.

    A file that group or others cannot read, by its own mode or that of the folder that it lies in, takes their bits
    away. The group of the output may be another than that of a file; it is then one of the others. What is not on this
    machine takes none.

    Args:
        sources: (store, names of the files that were read).
        target: the path of the output.
    """
    granted, group = ANYONE, _group_at(target)
    for store, names in sources:
        if isinstance(store, LocalStore):
            granted &= _granted([os.stat(store.folder)], group, is_folder=True)
            for folders, file in (store.statuses(name) for name in names):
                granted &= _granted([file], group) & _granted(folders, group, is_folder=True)
    return granted


def _group_at(target: str) -> int:
    """The group that a new file or folder at `target` gets."""
    parent = os.path.dirname(os.path.abspath(target))
    try:
        status = os.stat(parent)
    except OSError:  # told where the output is made
        return platform().group()
    return status.st_gid if status.st_mode & stat.S_ISGID else platform().group()


def _granted(found: Iterable[os.stat_result], group: int, *, is_folder: bool = False) -> int:
    """The bits of those who may read files, or enter folders, that are found so."""
    granted = ANYONE
    for status in found:
        for of_file, of_folder, bits in _OTHERS:
            is_known = bits != _GROUP or status.st_gid == group
            needed = (
                (of_folder if is_folder else of_file) if is_known else (stat.S_IXOTH if is_folder else stat.S_IROTH)
            )
            if not status.st_mode & needed:
                granted &= ~bits
    return granted


def is_restricted(permissions: int) -> bool:
    """Whether files will be less readable than the umask of this process would leave them."""
    umask = platform().umask()
    readable = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
    return (ANYONE & ~umask & readable) != (permissions & ~umask & readable)


def _refuse_places(target: str, path: str) -> None:
    real = os.path.realpath(path)
    if os.path.ismount(path):
        raise StorageError("the output is a mount point, which is not replaced", where=target)
    if any(_is_in(os.path.realpath(kept), real) for kept in (os.curdir, os.path.expanduser("~"))):
        raise StorageError("the output contains the current or the home folder, so it is not replaced", where=target)


def _listed(path: str, folders: Collection[str]) -> dict[str, bool]:
    """What lies in a folder, and in those of its folders that an output has too: name → whether it is a file."""
    found: dict[str, bool] = {}
    with os.scandir(path) as entries:
        for each in entries:
            if each.name in folders and each.is_dir(follow_symlinks=False):
                inner = _listed(each.path, ())
                found.update({f"{each.name}/{name}": is_file for name, is_file in inner.items()})
            else:
                found[each.name] = _is_file(each)
    return found


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False)


def _is_in(inner: str, outer: str) -> bool:
    """Whether `inner` is `outer` or lies in it, by path and by identity (bind mounts, case-blind file systems)."""
    while True:
        if inner == outer or _is_same(inner, outer):
            return True
        parent = os.path.dirname(inner)
        if parent == inner:
            return False
        inner = parent


def _is_same(one: str, other: str) -> bool:
    try:
        return is_same_file(os.stat(one), os.stat(other))
    except OSError:
        return False
