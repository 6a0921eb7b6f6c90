"""An output folder that is there whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from loraformat.errors import StorageError
from loraformat.storage.faults import told_as
from loraformat.storage.interrupts import Deferral
from loraformat.storage.local import OWN_PREFIX, HiddenFolder, LocalStore

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def stage(target: str, *, overwrite: bool, inputs: Sequence[str] = (), resume: bool = False) -> Iterator[LocalStore]:
    """A store for the files of the folder `target`, which appears under its name when the block ends without exception.

    Until then the files are in `.{name}.loraformat-{random}.partial` beside it. On any exception, KeyboardInterrupt
    too, that folder is removed. A run that was killed leaves it; the next run to the same target removes it.
    Files whose names begin with OWN_PREFIX do not become part of the output.

    Args:
        target: a folder that does not exist, in one that does.
        overwrite: replace what stands there. The old content stays until the new one is complete.
        inputs: what the run reads; `target` may not be, contain, or lie inside one of them, with `overwrite` or not.
        resume: give the folder of a killed run back with what is in it, and keep it where a signal ends the block.

    Raises: StorageError: any of these, or another run is writing to `target`.
    """
    path = _resolved(target)
    _refuse_inputs(target, path, inputs)
    _refuse_existing(target, path, overwrite)
    with Deferral() as signals, _locked(target, path):
        partial = _reclaim(path, keep_one=resume) or _sibling(path, os.urandom(4).hex())
        _refuse_existing(target, path, overwrite)
        keep = False
        try:
            with told_as(target):
                os.makedirs(partial, exist_ok=True)
            with signals.delivered():
                yield HiddenFolder(partial)
            with told_as(target):
                _remove_own(partial)
                _sync(partial)
                _refuse_existing(target, path, overwrite)
                _put_in_place(partial, path)
        except BaseException as error:
            keep = resume and not isinstance(error, Exception)
            raise
        finally:
            if not keep:
                _remove_tree(partial)


def require_space(target: str, nbytes: int) -> None:
    """Raises: StorageError: the file system on which `target` will stand has less than `nbytes` bytes free."""
    folder = os.path.abspath(target)
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    with told_as(target):
        status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < nbytes:
        raise StorageError(f"no space: {nbytes} bytes are needed, {free} are free", where=target)


def _resolved(target: str) -> str:
    """The absolute path of `target`, its parent free of links; the last component may be a link."""
    if "\0" in target:
        raise StorageError("not a path", where=target.replace("\0", "\\x00"))
    parent, name = os.path.split(os.path.abspath(target))
    if not name:
        raise StorageError("no folder name", where=target)
    if not os.path.isdir(parent):
        raise StorageError("the folder that should contain it does not exist", where=target, hint=f"create {parent}")
    return os.path.join(os.path.realpath(parent), name)


def _refuse_inputs(target: str, path: str, inputs: Sequence[str]) -> None:
    for given in inputs:
        if "://" in given or not os.path.exists(given):
            continue
        outputs = {path, os.path.realpath(path)}
        source = os.path.realpath(given)
        if any(_is_in(output, source) or _is_in(source, output) for output in outputs):
            raise StorageError(f"the output is, contains, or lies inside the input {given}", where=target)


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
        return os.path.samefile(one, other)
    except OSError:
        return False


def _refuse_existing(target: str, path: str, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise StorageError("the output exists already", where=target, hint="replace it with --overwrite")
    real = os.path.realpath(path)
    if any(_is_in(os.path.realpath(kept), real) for kept in (os.curdir, os.path.expanduser("~"))):
        raise StorageError("the output contains the current or the home folder: it is not replaced", where=target)


def _sibling(path: str, word: str) -> str:
    parent, name = os.path.split(path)
    return os.path.join(parent, f".{name}.loraformat-{word}.partial")


@contextmanager
def _locked(target: str, path: str) -> Iterator[None]:
    """The right to write to `path`, for as long as this process lives or the block lasts."""
    lock = _sibling(path, "lock")
    with told_as(target):
        fd = _take_lock(target, lock)
    try:
        yield
    finally:
        # Before the descriptor goes, so that nobody can hold a lock on a file that has lost its name.
        with suppress(OSError):
            os.unlink(lock)
        os.close(fd)


def _take_lock(target: str, lock: str) -> int:
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise StorageError(f"in use by pid {owner or 'unknown'}", where=target) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                raise
        if _is_same_file(fd, lock):
            with suppress(OSError):  # a full disk shows soon enough; the number is only for the other run's message
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode("ascii"), 0)
            return fd
        os.close(fd)  # the run before us removed it between our open and our lock


def _is_same_file(fd: int, path: str) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), found)


def _reclaim(path: str, *, keep_one: bool) -> str | None:
    """Remove what killed runs left beside `path`; give an old output back that was moved aside and not replaced.

    Returns: with `keep_one` the newest unfinished output, which is not removed, if there is one.
    """
    parent, name = os.path.split(path)
    prefix, suffix = f".{name}.loraformat-", ".partial"
    lock = os.path.basename(_sibling(path, "lock"))
    unfinished: list[str] = []
    for found in sorted(os.listdir(parent)):
        if not (found.startswith(prefix) and found.endswith(suffix)) or found == lock:
            continue
        left = os.path.join(parent, found)
        is_old = found.endswith(f"-old{suffix}")
        if is_old and not os.path.lexists(path):
            os.rename(left, path)
        elif keep_one and not is_old and os.path.isdir(left) and not os.path.islink(left):
            unfinished.append(left)
        else:
            _remove(left)
    unfinished.sort(key=lambda left: os.stat(left).st_mtime_ns)
    for left in unfinished[:-1]:
        _remove(left)
    return unfinished[-1] if unfinished else None


def _remove_own(partial: str) -> None:
    for name in os.listdir(partial):
        if name.startswith(OWN_PREFIX):
            os.unlink(os.path.join(partial, name))


def _put_in_place(partial: str, path: str) -> None:
    aside = _sibling(path, f"{os.urandom(4).hex()}-old")
    try:
        if os.path.lexists(path):
            os.rename(path, aside)
        os.rename(partial, path)
        _sync(os.path.dirname(path))
    finally:
        if os.path.lexists(aside) and not os.path.lexists(path):
            os.rename(aside, path)
    if os.path.lexists(aside):
        _remove(aside)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        _remove_tree(path)
    else:
        with suppress(OSError):
            os.unlink(path)


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
