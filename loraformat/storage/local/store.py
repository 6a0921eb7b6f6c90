"""A folder or a file of this machine, by positional reads and writes."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.base import Copy, Source, Writer
from loraformat.storage.blocks import copy_blocks
from loraformat.storage.direct import open_direct
from loraformat.storage.faults import as_storage_error, checked_local_name, checked_range, checked_total, kind_of
from loraformat.storage.platform import NEW_FLAGS, READ_FLAGS, is_same_file, platform

if TYPE_CHECKING:
    from typing_extensions import Self

# Files that this package keeps in a folder for the time of a run; they are not part of its content.
OWN_PREFIX = ".loraformat-"

# Of files that are read as weights: a link of such a name may leave its folder. None of them is ever copied unread.
CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
WEIGHT_SUFFIXES = (*CHECKPOINT_SUFFIXES, ".pth.lora", ".npz")


class LocalStore:
    """The regular files of one folder, or one file alone as a store with one entry.

    Nothing is ever mapped into memory: a file that shrinks while it is read is an error, not a SIGBUS. A file that is
    another one at a later read than when it was listed or first read (identity, size, time of change) is an error too.
    FIFOs, devices and folders are neither listed nor opened. A symbolic link is followed inside the folder and into the
    `blobs` of the Hub cache that the folder belongs to; one that leads elsewhere is followed for weight files only,
    whose content is parsed and never copied as it is: the author of a folder must not choose which of the reader's
    files become part of a model. Reads and writes may come from any thread.

    Args:
        uri: the path of a folder or a file.
        permissions: mode bits that files which are written may have, beside what the umask takes away.

    Raises: StorageError: there is no such file or folder, or it is neither.
    """

    def __init__(self, uri: str, permissions: int = 0o777) -> None:
        self.uri = uri
        self._seen: dict[str, tuple[int, ...]] = {}
        self._unfinished: set[str] = set()
        self._permissions = permissions
        with as_storage_error(uri):
            path = os.path.abspath(uri)
            mode = os.stat(uri).st_mode
        self._folder = path if stat.S_ISDIR(mode) else os.path.dirname(path)
        self._only = None if stat.S_ISDIR(mode) else os.path.basename(path)
        if self._only is not None and not stat.S_ISREG(mode):
            raise StorageError("neither a folder nor a regular file", where=uri)

    @property
    def is_single_file(self) -> bool:
        """Whether the URI names one file rather than a folder."""
        return self._only is not None

    @property
    def permissions(self) -> int:
        """Mode bits that files which are written may have."""
        return self._permissions

    @property
    def location(self) -> str:
        """See Output."""
        return self._folder

    reads_copies = True
    refused = ""

    def proves(self, path: str) -> bool | None:
        """See Output."""
        del path
        return None

    @property
    def folder(self) -> str:
        """The absolute path of the folder in which the files lie."""
        return self._folder

    def files(self) -> Mapping[str, int]:
        """Regular files by name → size in bytes, sorted; without those that belong to a run of this package."""
        with as_storage_error(self.uri):
            if self._only is not None:
                found = {self._only: os.stat(self._path(self._only))}
            else:
                with os.scandir(self._folder) as entries:
                    found = {entry.name: status for entry in entries if (status := _regular(entry)) is not None}
        listed = {name: status for name, status in sorted(found.items()) if not self._is_hidden(name)}
        for name, status in listed.items():
            self._seen.setdefault(name, _identity(status))
        return {name: status.st_size for name, status in listed.items()}

    def folders(self) -> tuple[str, ...]:
        """See Store."""
        if self._only is not None:
            return ()
        with as_storage_error(self.uri), os.scandir(self._folder) as entries:
            return tuple(sorted(each.name for each in entries if each.is_dir() and not each.name.startswith(".")))

    def size(self, path: str) -> int:
        """See Store."""
        with self._opened(path) as (_, size):
            return size

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Store."""
        with self._opened(path) as (fd, size):
            count = size - offset if nbytes is None else nbytes
            checked_range(self._path(path), size, offset, count)
            parts = []
            while count > 0:
                part = platform().read_at(fd, count, offset)
                self._check_progress(path, len(part), offset)
                parts.append(part)
                offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Store."""
        view = memoryview(buffer).cast("B")
        with self._opened(path) as (fd, size):
            checked_range(self._path(path), size, offset, view.nbytes)
            done = 0
            while done < view.nbytes:
                count = platform().read_into(fd, view[done:], offset + done)
                self._check_progress(path, count, offset + done)
                done += count

    @contextmanager
    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> Iterator[Writer]:
        """See Store. The bytes are on the disk before the name is there; an existing file is replaced.

        Raises: StorageError: a link, a device or anything else than a regular file stands there; it cannot be written.
        """
        del copies  # the kernel copies any run
        target = self._path(checked_local_name(path, self.uri))
        self.check_target(path)
        unfinished = self._name_to_write(path)
        partial = self._path(unfinished)
        with as_storage_error(target):
            fd = os.open(partial, NEW_FLAGS, 0o666 & self._permissions)
        self._unfinished.add(unfinished)
        try:
            try:
                with as_storage_error(target):
                    platform().reserve(fd, size or 0)
                with LocalWriter(fd, target, partial, size) as writer:
                    yield writer
                    checked_total(target, size, writer.written)
                with as_storage_error(target):
                    platform().sync(fd)
            finally:
                os.close(fd)  # Windows neither renames nor removes a file that is open
            if partial != target:
                with as_storage_error(target):
                    os.replace(partial, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        finally:
            self._unfinished.discard(unfinished)
            self._seen.pop(path, None)

    @contextmanager
    def subfolder(self, name: str) -> Iterator[LocalStore]:
        """See Output."""
        path = self._path(checked_local_name(name, self.uri))
        with as_storage_error(path):
            os.makedirs(path, mode=0o777 & self._permissions, exist_ok=True)
        yield HiddenFolder(path, self._permissions)
        with as_storage_error(path):
            platform().sync_folder(path)

    def below(self, name: str) -> LocalStore:
        """A subfolder, for reading. Raises: StorageError: there is none."""
        return LocalStore(self._path(checked_local_name(name, self.uri)))

    def remove_folder(self, name: str) -> None:
        """Remove a subfolder, and all that is in it."""
        path = self._path(checked_local_name(name, self.uri))
        with as_storage_error(path):
            _remove_folder(path)

    def nbytes(self) -> int:
        """Bytes of all files in the folder and below it."""
        with as_storage_error(self.uri):
            return nbytes_below(self._folder)

    def check_target(self, path: str) -> None:
        """Raises: StorageError: a link, a folder, a device or the like stands where a file is to be written."""
        target = self._path(checked_local_name(path, self.uri))
        if not os.path.lexists(target):
            return
        with as_storage_error(target):
            kind = kind_of(os.lstat(target).st_mode)
            other = _other_spelling(self._folder, path)
        if other is not None:
            text = f"{show(other)} stands there, and this file system does not tell the two names apart"
            raise StorageError(text, where=target, hint="write to a file system that does, or rename one of the two")
        if kind != "a file":
            text = f"the output is a file, but {kind} exists there, which is not replaced"
            raise StorageError(text, where=target, hint="use another name, or remove it yourself")

    def _name_to_write(self, path: str) -> str:
        """The name under which a file is made before it gets the name `path`."""
        del path
        return f"{OWN_PREFIX}{os.urandom(8).hex()}.tmp"

    def _is_hidden(self, name: str) -> bool:
        return name.startswith(OWN_PREFIX) or name in self._unfinished

    def kinds(self) -> Mapping[str, str]:
        """Everything in the folder, sorted: name → what it is ("a file", "a folder", "a symbolic link", "a FIFO" ...).

        A link inside the folder, or into the Hub cache that it belongs to, is what it leads to.
        """
        found = {}
        with as_storage_error(self.uri), os.scandir(self._folder) as entries:
            for entry in entries:
                is_inner = entry.is_symlink() and self._is_inside(entry.path)
                found[entry.name] = kind_of(entry.stat(follow_symlinks=is_inner).st_mode)
        return dict(sorted(found.items()))

    def names(self) -> list[str]:
        """Names of everything in the folder, files of a run of this package included, sorted."""
        with as_storage_error(self.uri):
            return sorted(os.listdir(self._folder))

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        full = self._path(checked_local_name(path, self.uri))
        with as_storage_error(full), suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(full).st_mode):
                _remove_folder(full)
            else:
                os.unlink(full)
        self._seen.pop(path, None)

    def seal(self, names: Collection[str]) -> None:
        """See Output."""

    def is_own(self, path: str) -> bool:
        """Whether `path` is a regular file of this folder and of no other: no link, and no second name."""
        with as_storage_error(self._path(path)):
            status = os.lstat(self._path(checked_local_name(path, self.uri)))
        return stat.S_ISREG(status.st_mode) and status.st_nlink == 1

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source: inode, size, times of change in ns, the second that of the system, which no program sets.

        The device is left out: another start of the machine may change its number.
        """
        with self._opened(path) as (fd, _):
            return (*self._seen[path][1:], os.fstat(fd).st_ctime_ns)

    def identity_anywhere(self, path: str) -> tuple[int, ...]:
        """The same as far as every machine that sees the file agrees on it: size, time of change in ns."""
        with self._opened(path):
            return self._seen[path][2:]

    def check_inside(self, path: str) -> None:
        """Raises: StorageError: `path` is a link that leaves the folder, so that its content must not be copied."""
        full = self._path(checked_local_name(path, self.uri))
        if self._only is None and os.path.islink(full) and not self._is_inside(full):
            raise _leaves(full)

    def statuses(self, path: str) -> tuple[list[os.stat_result], os.stat_result]:
        """The folder of a file and the file itself, or those that a link leads to.

        Raises: StorageError: there is none.
        """
        full = self._path(checked_local_name(path, self.uri))
        with as_storage_error(full):
            return [os.stat(os.path.dirname(os.path.realpath(full)))], os.stat(full)

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, int]]:
        """A descriptor for reading, and the size of the file."""
        path = self._path(checked_local_name(name, self.uri))
        if self._only not in (None, name) or name in self._unfinished:
            raise StorageError("no such file or folder", where=path)
        if os.path.islink(path) and not self._may_follow(path):
            raise _leaves(path)
        with as_storage_error(path):
            fd = os.open(path, READ_FLAGS)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise StorageError("not a regular file", where=path)
                identity = _identity(status)
                if self._seen.setdefault(name, identity) != identity:
                    raise StorageError("the file changed while it was in use", where=path)
                yield fd, status.st_size
            finally:
                os.close(fd)

    def _may_follow(self, path: str) -> bool:
        if self._only is not None or path.lower().endswith(WEIGHT_SUFFIXES):
            return True  # the user named this very file, or it is read as weights
        return self._is_inside(path)

    def _is_inside(self, path: str) -> bool:
        """Whether a link leads to a file of the folder, or into the `blobs` of the Hub cache that it belongs to."""
        target, folder = os.path.realpath(path), os.path.realpath(self._folder)
        repository, found, _ = f"{folder}{os.sep}".rpartition(f"{os.sep}snapshots{os.sep}")
        roots = [folder, *([os.path.join(repository, "blobs")] if found else [])]
        return os.path.exists(target) and any(target.startswith(root + os.sep) for root in roots)

    def _check_progress(self, name: str, count: int, offset: int) -> None:
        if count <= 0:
            raise StorageError(f"the file ends at byte {offset}, but was longer before", where=self._path(name))

    @contextmanager
    def descriptor(self, name: str) -> Iterator[int]:
        """A descriptor of a file, open for reading, for copies inside the kernel."""
        with self._opened(name) as (fd, _):
            yield fd


def nbytes_below(folder: str) -> int:
    """Bytes of all files in a folder and below it."""
    found = 0
    for path, _, names in os.walk(folder):
        found += sum(os.lstat(os.path.join(path, name)).st_size for name in names)
    return found


class HiddenFolder(LocalStore):
    """A folder that has no name of its own yet: its files are made under their own names, once and in place.

    A file counts when it is complete, for this store; after a run that was killed its journal tells which are. A file
    that is there already is replaced as in any other folder.
    """

    def _name_to_write(self, path: str) -> str:
        return super()._name_to_write(path) if os.path.lexists(self._path(path)) else path


class SharedFolder(LocalStore):
    """A folder without a name of its own into which several processes write: a file is there when it is complete."""

    @contextmanager
    def subfolder(self, name: str) -> Iterator[LocalStore]:
        """See Output."""
        with super().subfolder(name) as folder:
            yield SharedFolder(folder.folder, self._permissions)


class LocalWriter:
    """See Writer. A large file goes past the page cache where the file system can; see `storage.direct`.

    Args:
        fd: an open file.
        where: its name in messages.
        path: where it lies.
        nbytes: its size, if known.
    """

    def __init__(self, fd: int, where: str, path: str, nbytes: int | None) -> None:
        self.written = 0
        self._fd, self._where = fd, where
        self._position = 0
        self._lock = threading.Lock()
        self._direct = open_direct(path, nbytes, self._put)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        """Everything written, where the block ended well."""
        direct, self._direct = self._direct, None
        if direct is None:
            return
        try:
            if kind is None:
                with as_storage_error(self._where):
                    direct.finish()
        finally:
            direct.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See Writer."""
        self.write_at(self._position, data)
        self._position += memoryview(data).nbytes

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See Writer."""
        view = memoryview(data).cast("B")
        with as_storage_error(self._where):
            if self._direct is None:
                self._put(offset, view)
            else:
                self._direct.write_at(offset, view)
        self._count(view.nbytes)

    def _put(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < view.nbytes:
            done += platform().write_at(self._fd, view[done:], offset + done)

    def clone_from(self, source: Source, path: str) -> bool:
        """Share all bytes of `source`'s file `path`, where the file system can; False where nothing was done."""
        if not isinstance(source, LocalStore):
            return False
        with source.descriptor(path) as fd:
            with as_storage_error(self._where):
                is_shared = platform().clone(self._fd, fd)
            if is_shared:
                self._count(os.fstat(fd).st_size)
        return is_shared

    def copy_from(self, source: Source, path: str, source_offset: int, offset: int, nbytes: int) -> None:
        """See Writer."""
        done = 0
        if isinstance(source, LocalStore) and self._direct is None:
            with source.descriptor(path) as fd, as_storage_error(self._where):
                done = platform().copy_range(self._fd, fd, source_offset, offset, nbytes)
            self._count(done)
        copy_blocks(self, source, path, source_offset + done, offset + done, nbytes - done)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.written += nbytes


def _remove_folder(path: str) -> None:
    import shutil

    shutil.rmtree(path)


def _leaves(path: str) -> StorageError:
    hint = "copy the file into the folder if you want to use it"
    return StorageError("a symbolic link that leaves the folder; it is not followed", where=path, hint=hint)


def _regular(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        status = os.stat(entry.path)  # that of the entry has no identity on Windows
    except OSError:  # a link to nothing, or to itself
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _other_spelling(folder: str, name: str) -> str | None:
    """The file that the system finds by `name` although it is called otherwise: macOS and Windows ignore case."""
    names = os.listdir(folder)
    if name in names:
        return None
    status = os.lstat(os.path.join(folder, name))
    same = (each for each in sorted(names) if is_same_file(os.lstat(os.path.join(folder, each)), status))
    return next(same, None)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
