"""An output folder that appears complete or not at all."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.faults import as_storage_error
from loraformat.storage.local.interrupts import Deferral
from loraformat.storage.local.locks import locked
from loraformat.storage.local.store import OWN_PREFIX, HiddenFolder, LocalStore, SharedFolder, nbytes_below
from loraformat.storage.local.targets import (
    ANYONE,
    checked,
    refuse_existing_folder,
    refuse_inputs,
    refuse_names,
    resolved,
)
from loraformat.storage.platform import NEW_FLAGS, NO_FOLLOW, platform

# In a folder that a run has not finished, or in which it keeps an old output for a moment: the name of the output.
MARKER = f"{OWN_PREFIX}output"

_MOST_MARKER_NBYTES = 4096
_WORD_CHARACTERS = 16  # of a word, in the name of its folder
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
    word: str | None = None,
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
        word: give the unfinished output of this word back, see `join`, and keep it where the block raises.

    Raises: StorageError: any of these, another run is writing to `target`, or no output of this word is there.
    """
    path = checked(target, overwrite=overwrite, inputs=inputs, names=names, written=written)
    with Deferral() as signals, locked(target, _sibling(path, "lock")):
        partial = _unfinished(target, path, word, resume=resume, on_cleared=on_cleared)
        refuse_existing_folder(target, path, overwrite, names, written)
        keep = word is not None
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
            keep = keep or (resume and not isinstance(error, Exception))
            raise
        finally:
            if not keep:
                _remove_tree(partial)
        if word is not None:
            _sweep(_left_beside(path), on_cleared)


@contextmanager
def join(
    target: str,
    word: str,
    *,
    overwrite: bool,
    inputs: Sequence[str] = (),
    names: Collection[str] = (),
    written: Callable[[str], Collection[str]] | None = None,
    permissions: int = ANYONE,
) -> Iterator[LocalStore]:
    """A store for files of the folder `target` that several processes write at a time, also on several machines.

    All that give the same word get the same folder, `.{name}.loraformat-{word}.partial` beside `target`, made by the
    first of them; it is kept when the block ends, with or without an error. `stage` with the same word finishes it;
    any other run to `target` removes it. While one of them runs, no other run can write to `target`.

    Args:
        word: lower-case hexadecimal, from a hash over all that decides about the bytes of the output.
        overwrite: as for `stage`, as are `inputs`, `names`, `written` and `permissions`.

    Raises: StorageError: as `stage`; or the folder is another user's.
    """
    path = resolved(target)
    refuse_inputs(target, path, inputs)
    refuse_names(target, names)
    with Deferral() as signals, locked(target, _sibling(path, "lock"), shared=True):
        refuse_existing_folder(target, path, overwrite, names, written)
        partial = _sibling(path, _short(word))
        with as_storage_error(target):
            os.makedirs(partial, permissions, exist_ok=True)
            if os.path.islink(partial) or not platform().is_mine(os.lstat(partial)):
                hint = f"remove {show(partial)}"
                raise StorageError("the unfinished output belongs to another user", where=target, hint=hint)
            _mark(partial, path, permissions)
            _restrict(partial, permissions)
        if not _belongs_to(partial, path):
            raise StorageError("there is an unfinished output of another name", where=partial, hint="remove it")
        with signals.delivered():
            yield SharedFolder(partial, permissions)


def unfinished(target: str) -> Iterator[LocalStore]:
    """The unfinished outputs of `target` that `join` has made, the newest last.

    Raises: StorageError: as `stage`, about the path.
    """
    for left, is_shared in _left_beside(resolved(target)).items():
        if is_shared:
            yield LocalStore(left)


def _short(word: str) -> str:
    if not re.fullmatch(f"[0-9a-f]{{{_WORD_CHARACTERS},}}", word):
        raise ValueError(word)
    return word[:_WORD_CHARACTERS]


def _unfinished(
    target: str, path: str, word: str | None, *, resume: bool, on_cleared: Callable[[int], None] | None
) -> str:
    """The folder in which an output is made or finished.

    Raises: StorageError: there is none of this word.
    """
    _restore_old(path)
    if word is not None:
        partial = _sibling(path, _short(word))
        if os.path.islink(partial) or not os.path.isdir(partial) or not _belongs_to(partial, path):
            hint = "run every rank first, with the same inputs and options"
            raise StorageError("no rank of this run has written anything there", where=target, hint=hint)
        return partial
    left = _left_beside(path)
    alone = [one for one, is_shared in left.items() if not is_shared]
    kept = alone[-1] if alone and resume else None
    left.pop(kept or "", None)
    _sweep(left, on_cleared)
    return kept or _sibling(path, os.urandom(4).hex())


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


def _mark(folder: str, path: str, permissions: int = 0o700) -> None:
    """Make a folder that is known by its content to belong to the output `path`, also after a power cut."""
    os.makedirs(folder, permissions, exist_ok=True)
    marker = os.path.join(folder, MARKER)
    if os.path.lexists(marker):
        return
    # Under a name of its own first: another process may mark the same folder, or this one be killed in between.
    begun = os.path.join(folder, f"{OWN_PREFIX}{os.urandom(8).hex()}.tmp")
    fd = os.open(begun, NEW_FLAGS, 0o600)
    try:
        os.write(fd, os.fsencode(os.path.basename(path)))
        platform().sync(fd)
    finally:
        os.close(fd)
    os.replace(begun, marker)


def _restrict(folder: str, permissions: int) -> None:
    """Take mode bits from a folder and the files in it: what an earlier run left may be more readable than it may."""
    paths = [folder]
    for above, folders, files in os.walk(folder):
        paths += [os.path.join(above, name) for name in (*folders, *files)]
    for path in paths:
        if os.path.islink(path):
            continue
        with suppress(FileNotFoundError):  # another process renames the files that it completes
            mode = stat.S_IMODE(os.lstat(path).st_mode)
            if mode & ANYONE & ~permissions:
                os.chmod(path, mode & ~(ANYONE & ~permissions))


def _belongs_to(folder: str, path: str) -> bool:
    """Whether a run of this user to `path` made a folder; one without content is of a run that was killed at once.

    What others made is neither believed nor removed.
    """
    try:
        if not platform().is_mine(os.lstat(folder)):
            return False
        if all(name.startswith(OWN_PREFIX) and name.endswith(".tmp") for name in os.listdir(folder)):
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


def _left(path: str) -> Iterator[tuple[str, re.Match[str]]]:
    """The folders that runs have left beside `path`, each with the match of its name.

    They are known by their content: a folder with a name like that may belong to an output of another name.
    """
    parent, name = os.path.split(path)
    words = f"[0-9a-f]{{8}}(-{_OLD})?|([0-9a-f]{{{_WORD_CHARACTERS}}})"
    pattern = re.compile(rf"\.{re.escape(name)}\.loraformat-(?:{words})\.partial", re.DOTALL)
    for found in sorted(os.listdir(parent)):
        left, match = os.path.join(parent, found), pattern.fullmatch(found)
        if match and not os.path.islink(left) and os.path.isdir(left) and _belongs_to(left, path):
            yield left, match


def _restore_old(path: str) -> None:
    """Give an old output back that a killed run moved aside and did not replace."""
    for left, match in list(_left(path)):
        if match[1] is None:
            continue
        old = os.path.join(left, _OLD)
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        _remove_tree(left)


def _left_beside(path: str) -> dict[str, bool]:
    """Unfinished outputs, the newest last: folder → whether several processes wrote it."""
    found = {left: match[2] is not None for left, match in _left(path) if match[1] is None}
    return dict(sorted(found.items(), key=lambda one: os.stat(one[0]).st_mtime_ns))


def _sweep(folders: Iterable[str], on_cleared: Callable[[int], None] | None) -> None:
    """Remove what killed runs left."""
    for left in folders:
        nbytes = nbytes_below(left)
        _remove_tree(left)
        if on_cleared is not None:
            on_cleared(nbytes)


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
