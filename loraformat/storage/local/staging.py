"""An output folder that is there whole, or not at all."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.faults import as_storage_error
from loraformat.storage.local.interrupts import Deferral
from loraformat.storage.local.store import OWN_PREFIX, HiddenFolder, LocalStore, nbytes_below
from loraformat.storage.local.targets import ANYONE, refuse_existing_folder, refuse_inputs, resolved
from loraformat.storage.platform import LOCK_FLAGS, NEW_FLAGS, NO_FOLLOW, platform

# In a folder that a run has not finished, or in which it keeps an old output for a moment: the name of the output.
MARKER = f"{OWN_PREFIX}output"

_MOST_MARKER_NBYTES = 4096
_MOST_LOCK_NBYTES = 20
_OLD = "old"


@contextmanager
def stage(
    target: str,
    *,
    overwrite: bool,
    inputs: Sequence[str] = (),
    resume: bool = False,
    names: Collection[str] = (),
    written: Callable[[str], Collection[str]] | None = None,
    permissions: int = ANYONE,
    on_cleared: Callable[[int], None] | None = None,
) -> Iterator[LocalStore]:
    """A store for the files of the folder `target`, which appears under its name when the block ends without exception.

    Until then the files are in `.{name}.loraformat-{random}.partial` beside it. On any exception, KeyboardInterrupt
    too, that folder is removed. A run that was killed leaves it; the next run to the same target removes it.
    Files whose names begin with OWN_PREFIX do not become part of the output.

    Args:
        target: a folder that does not exist, in one that does.
        overwrite: replace what stands there, if it is a folder that holds nothing but files of `names` and files that
            an earlier run wrote. The old content stays until the new one is complete.
        inputs: what the run reads; `target` may not be, contain, or lie inside one of them, with `overwrite` or not.
        resume: give the folder of a killed run back with what is in it, and keep it where a signal ends the block.
        names: of the files that the run will write.
        written: gives the names of files that an earlier run wrote into the folder at a path.
        permissions: mode bits that the folder and its files may have, beside what the umask takes away.
        on_cleared: called with the bytes of an unfinished output of an earlier run that was removed.

    Raises: StorageError: any of these, or another run is writing to `target`.
    """
    path = resolved(target)
    refuse_inputs(target, path, inputs)
    refuse_existing_folder(target, path, overwrite, names, written)
    with Deferral() as signals, _locked(target, path):
        partial = _reclaim(path, keep_one=resume, on_cleared=on_cleared) or _sibling(path, os.urandom(4).hex())
        refuse_existing_folder(target, path, overwrite, names, written)
        keep = False
        try:
            with as_storage_error(target):
                _mark(partial, path, permissions)
                _restrict(partial, permissions)
            with signals.delivered():
                yield HiddenFolder(partial, permissions)
            with as_storage_error(target):
                _remove_own(partial)
                _sync(partial)
                refuse_existing_folder(target, path, overwrite, names, written)
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
    with as_storage_error(target):
        free = platform().free_nbytes(folder)
    if free is not None and free < nbytes:
        raise StorageError(f"no space: {nbytes} bytes are needed, {free} are free", where=target)


def _sibling(path: str, word: str) -> str:
    parent, name = os.path.split(path)
    return os.path.join(parent, f".{name}.loraformat-{word}.partial")


@contextmanager
def _locked(target: str, path: str) -> Iterator[None]:
    """The right to write to `path`, for as long as this process lives or the block lasts."""
    lock = _sibling(path, "lock")
    with as_storage_error(target):
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
        try:
            fd = os.open(lock, LOCK_FLAGS, 0o666)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ELOOP):
                raise
            raise _no_lock(target, lock) from error
        try:
            platform().lock(fd)
        except BlockingIOError:
            owner = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise StorageError(f"in use by pid {owner or 'unknown'}", where=target) from None
        except OSError:
            os.close(fd)
            raise
        if not _is_lock(fd):
            os.close(fd)
            raise _no_lock(target, lock)
        if _is_same_file(fd, lock):
            with suppress(OSError):  # a full disk shows soon enough; the number is only for the other run's message
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode("ascii"), 0)
            return fd
        os.close(fd)  # the run before us removed it between our open and our lock


def _no_lock(target: str, lock: str) -> StorageError:
    return StorageError("something else stands where its lock must be", where=target, hint=f"remove {show(lock)}")


def _is_lock(fd: int) -> bool:
    """Whether a file is a lock of ours: one of its own, with no more in it than a number.

    It is emptied and removed; another name of it may be that of a file that somebody needs.
    """
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1 and status.st_size <= _MOST_LOCK_NBYTES


def _is_same_file(fd: int, path: str) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), found)


def _mark(folder: str, path: str, permissions: int = 0o700) -> None:
    """Make a folder that is known by its content to belong to the output `path`, also after a power cut."""
    os.makedirs(folder, permissions, exist_ok=True)
    marker = os.path.join(folder, MARKER)
    if not os.path.lexists(marker):
        fd = os.open(marker, NEW_FLAGS, 0o600)
        try:
            os.write(fd, os.fsencode(os.path.basename(path)))
            os.fsync(fd)
        finally:
            os.close(fd)


def _restrict(folder: str, permissions: int) -> None:
    """Take mode bits from a folder and the files in it: what an earlier run left may be more readable than it may."""
    paths = [folder]
    for above, folders, files in os.walk(folder):
        paths += [os.path.join(above, name) for name in (*folders, *files)]
    for path in paths:
        if os.path.islink(path):
            continue
        mode = stat.S_IMODE(os.lstat(path).st_mode)
        if mode & ANYONE & ~permissions:
            os.chmod(path, mode & ~(ANYONE & ~permissions))


def _belongs_to(folder: str, path: str) -> bool:
    """Whether a run of this user to `path` made a folder; one that is empty was made by a run that was killed at once.

    What others made is neither believed nor removed.
    """
    try:
        if not platform().is_mine(os.lstat(folder)):
            return False
        if not os.listdir(folder):
            return True
        marker = os.path.join(folder, MARKER)
        if not stat.S_ISREG(os.lstat(marker).st_mode):
            return False
        fd = os.open(marker, os.O_RDONLY | NO_FOLLOW)
        try:
            return os.read(fd, _MOST_MARKER_NBYTES) == os.fsencode(os.path.basename(path))
        finally:
            os.close(fd)
    except OSError:
        return False


def _reclaim(path: str, *, keep_one: bool, on_cleared: Callable[[int], None] | None) -> str | None:
    """Remove what killed runs left beside `path`; give an old output back that was moved aside and not replaced.

    What was left is known by its content. A folder with a name like that may belong to an output of another name.

    Returns: with `keep_one` the newest unfinished output, which is not removed, if there is one.
    """
    parent, name = os.path.split(path)
    pattern = re.compile(rf"\.{re.escape(name)}\.loraformat-[0-9a-f]{{8}}(-{_OLD})?\.partial", re.DOTALL)
    unfinished: list[str] = []
    for found in sorted(os.listdir(parent)):
        left = os.path.join(parent, found)
        match = pattern.fullmatch(found)
        if match is None or os.path.islink(left) or not os.path.isdir(left) or not _belongs_to(left, path):
            continue
        if match[1] is None:
            unfinished.append(left)
            continue
        old = os.path.join(left, _OLD)
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        _remove_tree(left)
    unfinished.sort(key=lambda left: os.stat(left).st_mtime_ns)
    kept = unfinished.pop() if unfinished and keep_one else None
    for left in unfinished:
        nbytes = nbytes_below(left)
        _remove_tree(left)
        if on_cleared is not None:
            on_cleared(nbytes)
    return kept


def _remove_own(partial: str) -> None:
    for name in os.listdir(partial):
        if name.startswith(OWN_PREFIX):
            os.unlink(os.path.join(partial, name))


def _put_in_place(partial: str, path: str) -> None:
    """Rename the output to its name; what stands there goes into a marked folder until the new output has the name."""
    if not os.path.lexists(path):
        os.rename(partial, path)
        _sync(os.path.dirname(path))
        return
    aside = _sibling(path, f"{os.urandom(4).hex()}-{_OLD}")
    old = os.path.join(aside, _OLD)
    try:
        _mark(aside, path)
        _sync(aside)
        os.rename(path, old)
        os.rename(partial, path)
        _sync(os.path.dirname(path))
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        _remove_tree(aside)


def _sync(folder: str) -> None:
    platform().sync_folder(folder)


def _remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
