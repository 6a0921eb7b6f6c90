"""Fingerprints of files: size, and hashes of the header or of all bytes."""

from __future__ import annotations

import hashlib
import json

from loraformat.containers import safetensors
from loraformat.containers.bundles import is_gguf, is_safetensors
from loraformat.model.bundle import FileFingerprint
from loraformat.storage import CHECKPOINT_SUFFIXES, Source

_BLOCK_NBYTES = 4 << 20


def fingerprint_of(store: Source, name: str, *, whole: bool) -> FileFingerprint:
    """Size and hashes of a file.

    Args:
        whole: whether all bytes of a weight file are hashed; those of other files always are.

    Raises: ContainerError and StorageError, as for reading it.
    """
    nbytes = store.size(name)
    if not name.lower().endswith(CHECKPOINT_SUFFIXES):
        return FileFingerprint(name, nbytes, sha256=file_sha256(store, name))
    return FileFingerprint(name, nbytes, header_sha256(store, name), file_sha256(store, name) if whole else None)


def header_sha256(store: Source, name: str) -> str:
    """See FileFingerprint."""
    data_start = _data_start(store, name)
    if data_start is not None:
        return hashlib.sha256(store.read(name, 0, data_start)).hexdigest()
    from loraformat.containers import torch_zip

    records = torch_zip.read_archive(store, name).records.values()
    listed = [[record.name, record.offset, record.nbytes, record.crc32] for record in records]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def checked_spans(store: Source, name: str) -> list[tuple[int, int]]:
    """The (start, stop) of a weight file for which its header's hash or its own checksums, which are checked, speak.

    Raises: ContainerError: a record of a torch file does not have its CRC-32; and as for reading it.
    """
    data_start = _data_start(store, name)
    if data_start is not None:
        return [(0, data_start)]
    from loraformat.containers import torch_zip

    torch_zip.check_records(store, name)
    records = torch_zip.read_archive(store, name).records.values()
    return [(record.offset, record.offset + record.nbytes) for record in records]


def _data_start(store: Source, name: str) -> int | None:
    """The first byte after the header of a file that has one; None for a torch file."""
    if is_safetensors(store, name):
        return safetensors.read_header(store, name).data_start
    if is_gguf(store, name):
        from loraformat.containers.gguf.header import read_header

        found = read_header(store, name)
        return min(found.data_start, found.nbytes)
    return None


def file_sha256(store: Source, name: str) -> str:
    """SHA-256 of all bytes of a file."""
    nbytes, total = store.size(name), hashlib.sha256()
    buffer = memoryview(bytearray(min(_BLOCK_NBYTES, nbytes)))
    for start in range(0, nbytes, _BLOCK_NBYTES):
        block = buffer[: min(_BLOCK_NBYTES, nbytes - start)]
        store.read_into(name, start, block)
        total.update(block)
    return total.hexdigest()
