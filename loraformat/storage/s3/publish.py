"""Publishes an output: completes all files in an order in which nobody can mistake a part for the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from loraformat.diagnostics import show
from loraformat.errors import LoraFormatError, StorageError
from loraformat.storage.base import Copy
from loraformat.storage.local.store import WEIGHT_SUFFIXES
from loraformat.storage.s3.address import Address
from loraformat.storage.s3.client import Client, as_storage_error
from loraformat.storage.s3.leftovers import Left, clear, end_uploads, look, remove_if_same
from loraformat.storage.s3.outputs import S3Output
from loraformat.storage.s3.parts import cut
from loraformat.storage.s3.records import OUTPUT, OutputRecord, UploadRecord, own_name
from loraformat.storage.s3.requests import complete, copy_part, create_upload, md5_of, put_new, put_object, remove
from loraformat.storage.s3.store import Listed, fetch

# Old files up to this size are kept while new ones take their places, so that they can be put back.
_SAVED_NBYTES, _MOST_SAVED_NBYTES = 8 << 20, 64 << 20

# Files without which nobody takes the others for a model or an adapter.
_CONFIGS = frozenset({"config.json", "adapter_config.json", "lora_config.json", "model_index.json"})


@dataclass(frozen=True, slots=True)
class PublishedOutput:
    """An output whose files are put in place.

    Attributes:
        output: all of whose files are uploaded, or wait in memory.
        record: what was noted of it.
        old: files that stand there now, by name below the prefix.
        placed: names below the prefix → what was put there.
        prepared: files that take the place of old ones → their uploads.
        noted: names below the prefix → ETag that the object there has or will have, in the order in which they come.
    """

    output: S3Output
    record: OutputRecord
    old: Mapping[str, Listed]
    placed: dict[str, Listed] = field(default_factory=dict)
    prepared: dict[str, UploadRecord] = field(default_factory=dict)
    noted: dict[str, str] = field(default_factory=dict)

    @property
    def _client(self) -> Client:
        return self.output.making.client

    @property
    def _address(self) -> Address:
        return self.output.address

    def run(self) -> None:
        """Put all files in place, the one last without which nobody takes the others for a model or an adapter."""
        for _, output in each_folder(self.output):
            output.seal(list(output.uploaded))
        if self.record.replaces:
            for path, output, name in list(self._uploaded()):
                self._prepare(path, output, name)
        self._check_others()
        self._note()
        saved = self._saved() if self.record.replaces else {}
        try:
            self._place(saved)
        except BaseException:
            if self.record.replaces and not any(name in self.old and name not in saved for name in self.placed):
                self._restore(saved)
            raise

    def _check_others(self) -> None:
        """Raises: StorageError: an object that is not of this run came, went or changed since the run began."""
        expected = dict(self.old)
        if not self.record.replaces:
            expected |= {path: output.completed[name] for path, output, name in self._uploaded()}
        found = look(self._client, self._address).files
        for path in sorted({*found, *expected}):
            is_placed = path in found and found[path].etag == self.record.files.get(path)  # by a run that was killed
            if found.get(path) != expected.get(path) and not is_placed:
                uri = f"{self._address.uri}/{show(path)}"
                raise StorageError("somebody else created, changed or removed this object in the meantime", where=uri)

    def _uploaded(self) -> Iterator[tuple[str, S3Output, str]]:
        for folder, output in each_folder(self.output):
            for name in sorted(output.uploaded):
                yield f"{folder}{name}", output, name

    def _waiting(self) -> list[tuple[str, bytes]]:
        found = [
            (f"{folder}{name}", data) for folder, one in each_folder(self.output) for name, data in one.waiting.items()
        ]
        return sorted(found, key=lambda item: _order(item[0]))

    def _prepare(self, path: str, output: S3Output, name: str) -> None:
        """Upload a file to its own name by copies in the store; the old file stays until that is completed."""
        known, bucket = output.completed[name], self._address.bucket
        key, source = output.address.key(name), (bucket, output.key(name), known.etag)
        with as_storage_error(f"s3://{bucket}/{key}"):
            upload = create_upload(self._client, bucket, key)
            store = _Nowhere()
            parts = cut(known.nbytes, [Copy(0, known.nbytes, store, "", 0)], ())  # type: ignore[arg-type]
            pool = output.making.workers.copiers
            sent = list(
                pool.map(
                    lambda part: copy_part(
                        self._client, bucket, key, upload, part.number, source, part.start, part.stop
                    ),
                    parts,
                )
            )
        self.prepared[path] = UploadRecord(upload, known.nbytes, tuple(sent))

    def _note(self) -> None:
        """Note what will stand there, so that another run recognizes a part of it."""
        etags = {path: output.completed[name].etag for path, output, name in self._uploaded()}
        etags |= {path: record.etag for path, record in self.prepared.items()}
        self.noted.update(etags | {path: md5_of(data) for path, data in self._waiting()})
        self._write_note()

    def _write_note(self) -> None:
        names = [*self.noted]
        data = self.record.published(self.noted, names[-1] if names else "").to_bytes()
        key = self._address.key(own_name(self.output.making.word, OUTPUT))
        with as_storage_error(self._address.uri):
            put_object(self._client, self._address.bucket, key, data)

    def _saved(self) -> dict[str, bytes]:
        """The old files that are small."""
        found: dict[str, bytes] = {}
        for name, known in self.old.items():
            if known.nbytes <= _SAVED_NBYTES and sum(map(len, found.values())) <= _MOST_SAVED_NBYTES:
                data = bytearray(known.nbytes)
                fetch(self._client, self._address.bucket, self._address.key(name), known, 0, memoryview(data))
                found[name] = bytes(data)
        return found

    def _place(self, saved: Mapping[str, bytes]) -> None:
        bucket, waiting = self._address.bucket, self._waiting()
        if self.record.replaces:
            # While files are exchanged nobody may load a mixture: what describes the old ones goes first.
            remove(self._client, bucket, [self._address.key(name) for name in saved if _order(name)[0] > 0])
        for path, record in self.prepared.items():
            self._placed(path, complete(self._client, bucket, self._address.key(path), record, is_new=False))
        for path, data in waiting[:-1]:
            self._put(path, data)
        new = {*self.placed, *(path for path, _ in waiting)}
        remove(self._client, bucket, [self._address.key(name) for name in self.old if name not in new])
        for path, data in waiting[-1:]:
            self._put(path, data)

    def _put(self, path: str, data: bytes) -> None:
        bucket, key = self._address.bucket, self._address.key(path)
        put = put_object if self.record.replaces else put_new
        with as_storage_error(f"s3://{bucket}/{key}"):
            self._placed(path, Listed(len(data), put(self._client, bucket, key, data)))

    def _placed(self, path: str, made: Listed) -> None:
        """Keep what was put in its place, and note it where its ETag is not the one that was expected."""
        self.placed[path] = made
        if made.etag != self.noted[path]:
            self.noted[path] = made.etag
            self._write_note()

    def _restore(self, saved: Mapping[str, bytes]) -> None:
        """Put the old files back, of which all that were replaced are known."""
        client = self._client.hurried()
        for name, known in self.placed.items():
            if name not in self.old:
                with suppress(LoraFormatError):
                    remove_if_same(client, self._address, name, known)
        for name, data in sorted(saved.items(), key=lambda item: _order(item[0])):
            with suppress(LoraFormatError), as_storage_error(self._address.uri):
                put_object(client, self._address.bucket, self._address.key(name), data)


class _Nowhere:
    """Stands for a file that is cut as one copy."""


def each_folder(output: S3Output) -> Iterator[tuple[str, S3Output]]:
    """(name with a slash, folder) of an output: its subfolders first, then itself as ""."""
    for name, folder in sorted(output.subfolders.items()):
        yield f"{name}/", folder
    yield "", output


def discard(output: S3Output, placed: Mapping[str, Listed]) -> None:
    """Remove all that a run has put or uploaded; what cannot be reached is left to the next run.

    Args:
        placed: files in their places: name below the prefix → what was put there; none where old files stood.
    """
    client, address = output.making.client.hurried(), output.address
    found = dict(placed)
    keys: set[str] = set()
    for folder, one in each_folder(output):
        for name, record in one.uploaded.items():
            keys.add(one.key(name))
            if not output.making.replaces:
                found.setdefault(f"{folder}{name}", one.completed.get(name) or Listed(record.nbytes, record.etag))
    for name, known in found.items():
        with suppress(LoraFormatError):
            remove_if_same(client, address, name, known)
    with suppress(LoraFormatError):
        end_uploads(client, address, keys)
    with suppress(LoraFormatError):
        clear(client, address, look(client, address), [output.making.word])


def clear_up(output: S3Output, left: Left | None = None) -> None:
    """Remove what a run kept for itself, when its output is whole."""
    client, address = output.making.client, output.address
    with suppress(LoraFormatError):
        clear(client, address, left or look(client, address), [output.making.word])


def _order(path: str) -> tuple[int, str]:
    """Weights, then all else, then what describes other files; the manifest last."""
    name = path.rpartition("/")[2].lower()
    if name.endswith(WEIGHT_SUFFIXES):
        return (-1, path)
    if not name.endswith(".json"):
        return (0, path)
    if "manifest" in name:
        return (4, path)
    if name in _CONFIGS:
        return (3 if "/" not in path else 2, path)
    return (1 if name.endswith(".index.json") else 0, path)
