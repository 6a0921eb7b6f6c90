"""One output file as a multipart upload: ranges that the store copies, and parts that are sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.base import Copy, Source
from loraformat.storage.blocks import copy_blocks
from loraformat.storage.s3.buffers import Buffers, PartBuffer
from loraformat.storage.s3.client import Client, as_storage_error, code_of, refuses_copies
from loraformat.storage.s3.parts import LEAST_NBYTES, Part, cut
from loraformat.storage.s3.records import SentPart, UploadRecord
from loraformat.storage.s3.requests import abort, copy_part, create_upload, send_part
from loraformat.storage.s3.store import S3Store, head

_SENDERS, _COPIERS = 4, 64
_MOST_SENDING, _MOST_OPEN = 4, 4  # parts in memory that are complete, and that are not


@dataclass(frozen=True, slots=True)
class Workers:
    """What the uploads of one output share: threads, and room for parts.

    Attributes:
        senders, copiers: threads that send parts, and that wait for copies.
        room: for complete parts in memory.
        buffers: parts that are not complete.
        refused: what the service said where it did not copy.
    """

    senders: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_SENDERS, "loraformat-send"))
    copiers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_COPIERS, "loraformat-copy"))
    room: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(_MOST_SENDING))
    buffers: Buffers = field(default_factory=lambda: Buffers(_MOST_OPEN))
    refused: list[str] = field(default_factory=list)

    def close(self) -> None:
        """End the threads; what is not begun is not done."""
        for pool in (self.senders, self.copiers):
            pool.shutdown(wait=True, cancel_futures=True)


def is_remote(client: Client, source: Source) -> bool:
    """Whether a source lies in the same service as an output."""
    return isinstance(source, S3Store) and source.client is client


class Upload:
    """See Writer. Nothing of it can be seen before it is completed, which is not done here.

    Args:
        client: the service.
        bucket, key: where the object will be.
        size: its bytes.
        copies: runs that will come by `copy_from`, as far as they are known.
        workers: what uploads share.
    """

    def __init__(
        self,
        client: Client,
        bucket: str,
        key: str,
        size: int,
        copies: Sequence[Copy],
        workers: Workers,
    ) -> None:
        self._client, self._bucket, self._key, self._size = client, bucket, key, size
        self._workers, self._announced = workers, tuple(copies)
        self._where = f"s3://{bucket}/{show(key)}"
        self._futures: list[Future[SentPart]] = []
        self._failed: list[Exception] = []
        self._done: dict[int, SentPart] = {}
        self._position = 0
        with as_storage_error(self._where):
            self.upload = create_upload(client, bucket, key)
        try:
            self._parts = self._cut()
            self._buffers = [PartBuffer(part) if part.copy is None else None for part in self._parts]
            self._begin()
        except BaseException:
            wait(self._futures)
            abort(client, bucket, key, self.upload)
            raise

    def _begin(self) -> None:
        """Copy, and send what needs no computed byte."""
        for part, buffer in zip(self._parts, self._buffers, strict=True):
            if buffer is None and part.number not in self._done:
                self._submit(self._workers.copiers, self._copy, part)
        for buffer in self._buffers:
            if buffer is not None and buffer.missing == 0:
                self._send_soon(buffer)

    def _cut(self) -> tuple[Part, ...]:
        """The parts; the store has to show first that it copies."""
        runs = [copy for copy in self._announced if self._is_copyable(copy)]
        parts = self._parts_with([] if self._workers.refused else runs)
        copied = next((part for part in parts if part.copy is not None), None)
        if copied is None or self._trait in self._client.traits:
            return parts
        with as_storage_error(self._where):
            try:
                self._done[copied.number] = self._copied(copied)
            except Exception as error:
                if not refuses_copies(error):
                    raise
                self._workers.refused.append(code_of(error))
                return self._parts_with([])
        self._client.traits[self._trait] = True
        return parts

    def _is_copyable(self, copy: Copy) -> bool:
        """Whether the store can copy the run: ranges of objects of up to 5 MiB it cannot."""
        return is_remote(self._client, copy.source) and copy.source.size(copy.path) > LEAST_NBYTES

    @property
    def _trait(self) -> str:
        return f"copies into {self._bucket}"

    def _parts_with(self, copied: Sequence[Copy]) -> tuple[Part, ...]:
        """The file cut; bytes of files that come by `write` in any case are fetched only for parts of both kinds."""
        with as_storage_error(self._where):
            return tuple(map(self._mixed, cut(self._size, copied, self._announced)))

    def _mixed(self, part: Part) -> Part:
        is_whole = sum(fill.nbytes for fill in part.fills) == part.nbytes
        if not is_whole or all(is_remote(self._client, fill.source) for fill in part.fills):
            return part
        return Part(part.number, part.start, part.stop)

    # Writer

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See Writer."""
        self.write_at(self._position, data)
        self._position += memoryview(data).nbytes

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See Writer. Bytes that the store copies, or that are fetched when their part is sent, are left out."""
        view = memoryview(data).cast("B")
        if offset + view.nbytes > self._size:
            raise StorageError(f"expected {self._size} bytes, but more were written", where=self._where)
        for index in self._indices(offset, offset + view.nbytes):
            buffer = self._buffers[index]
            if buffer is None:
                continue
            part = buffer.part
            low, high = max(offset, part.start), min(offset + view.nbytes, part.stop)
            if self._workers.buffers.write(buffer, low, view[low - offset : high - offset], self._where):
                self._send_soon(buffer)

    def copy_from(self, source: Source, path: str, source_offset: int, offset: int, nbytes: int) -> None:
        """See Writer. Nothing passes through here of what was announced and lies in the same service."""
        if is_remote(self._client, source) and self._is_announced(source, path, source_offset, offset, nbytes):
            self._raise_failed()
            return
        copy_blocks(self, source, path, source_offset, offset, nbytes)

    def clone_from(self, source: Source, path: str) -> bool:
        """See Writer: objects share nothing."""
        del source, path
        return False

    def _is_announced(self, source: Source, path: str, source_offset: int, offset: int, nbytes: int) -> bool:
        return any(
            (run.source, run.path) == (source, path)
            and run.offset <= offset
            and offset + nbytes <= run.offset + run.nbytes
            and run.source_offset - run.offset == source_offset - offset
            for run in self._announced
        )

    def _indices(self, start: int, stop: int) -> range:
        """Of the parts that a range touches."""
        from bisect import bisect_right

        first = bisect_right(self._parts, start, key=lambda part: part.start) - 1
        last = bisect_right(self._parts, max(start, stop - 1), key=lambda part: part.start)
        return range(first, last)

    # parts

    def _submit(self, pool: ThreadPoolExecutor, function: Callable[[Part], SentPart], part: Part) -> Future[SentPart]:
        future = pool.submit(function, part)
        future.add_done_callback(self._note)
        self._futures.append(future)
        return future

    def _note(self, future: Future[SentPart]) -> None:
        if not future.cancelled() and isinstance(error := future.exception(), Exception):
            self._failed.append(error)

    def _raise_failed(self) -> None:
        if self._failed:
            raise self._failed[0]

    def _send_soon(self, buffer: PartBuffer) -> None:
        """Hand a complete part to a thread that sends it, when there is room for it."""
        self._raise_failed()
        self._workers.room.acquire()
        try:
            future = self._submit(self._workers.senders, lambda part: self._send(part, buffer), buffer.part)
        except BaseException:
            self._workers.room.release()
            raise
        future.add_done_callback(lambda _: self._workers.room.release())

    def _send(self, part: Part, buffer: PartBuffer) -> SentPart:
        self._raise_failed()
        data = buffer.take()
        view = memoryview(data)
        for fill in part.fills:
            at = fill.offset - part.start
            fill.source.read_into(fill.path, fill.source_offset, view[at : at + fill.nbytes])
        view.release()
        with as_storage_error(self._where):
            return send_part(self._client, self._bucket, self._key, self.upload, part.number, data)

    def _copy(self, part: Part) -> SentPart:
        self._raise_failed()
        with as_storage_error(self._where):
            return self._copied(part)

    def _copied(self, part: Part) -> SentPart:
        copy = part.copy
        assert copy is not None
        assert isinstance(copy.source, S3Store)
        source = (copy.source.address.bucket, copy.source.key(copy.path), copy.source.listed(copy.path).etag)
        start = copy.source_offset
        try:
            return copy_part(
                self._client, self._bucket, self._key, self.upload, part.number, source, start, start + copy.nbytes
            )
        except Exception as error:
            if code_of(error) in ("NoSuchKey", "404", "PreconditionFailed", "412", "InvalidArgument"):
                text = f"the file changed while it was in use ({show(code_of(error), 40)})"
                raise StorageError(text, where=f"{copy.source.uri}/{show(copy.path)}") from None
            raise

    def finish(self) -> UploadRecord:
        """Wait for all parts.

        Raises: StorageError: bytes are missing, a part was not taken, or a file that was copied from is another one.
        """
        wait(self._futures)
        self._raise_failed()
        missing = sum(buffer.missing for buffer in self._buffers if buffer is not None)
        if missing:
            text = f"expected {self._size} bytes, but {self._size - missing} were written"
            raise StorageError(text, where=self._where)
        sent = sorted(
            [*self._done.values(), *(future.result() for future in self._futures)], key=lambda part: part.number
        )
        if [part.number for part in sent] != [part.number for part in self._parts]:
            raise StorageError("parts of the upload are missing", where=self._where)
        self._check_sources()
        return UploadRecord(self.upload, self._size, tuple(sent))

    def _check_sources(self) -> None:
        """Raises: StorageError: a file is another one than when it was opened. Not every store heeds conditions."""
        copies = [part.copy for part in self._parts if part.copy is not None]
        for source, path in {(copy.source, copy.path) for copy in copies}:
            assert isinstance(source, S3Store)
            where = f"{source.uri}/{show(path)}"
            if head(self._client, source.address.bucket, source.key(path), where) != source.listed(path):
                raise StorageError("the file changed while it was in use: another ETag", where=where)

    def abandon(self) -> None:
        """Give the file up, and wait until nothing of it is under way."""
        self._failed.append(StorageError("the upload was aborted", where=self._where))
        wait([future for future in self._futures if not future.cancel()])
        for buffer in self._buffers:
            if buffer is not None:
                self._workers.buffers.forget(buffer)
        abort(self._client, self._bucket, self._key, self.upload)
