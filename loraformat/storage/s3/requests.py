"""Requests that create, complete and remove objects, and recover if the answer is lost."""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.local.interrupts import Deferral
from loraformat.storage.s3.client import Client, as_storage_error, code_of, is_conflict, is_no_upload
from loraformat.storage.s3.records import SentPart, UploadRecord
from loraformat.storage.s3.store import Listed, fetch, head

# Whether the service checks CRC-32 of parts; what does not is given an MD5, which all do.
_CRC32 = "parts have a CRC-32"
_CONDITIONS = "completion takes conditions"
_NOT_TAKEN = frozenset({"NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400"})


def md5_of(data: bytes | bytearray) -> str:
    """The ETag of an object of these bytes that was put at once and not encrypted with a key of KMS."""
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def put_object(client: Client, bucket: str, key: str, data: bytes, **conditions: str) -> str:
    """Make an object of a few bytes; its ETag. The service compares the body with an MD5.

    Raises: what boto3 raises; use within `as_storage_error`.
    """
    sum_of = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    answer = client.quick.put_object(Bucket=bucket, Key=key, Body=data, ContentMD5=sum_of, **conditions)
    return str(answer["ETag"])


def put_new(client: Client, bucket: str, key: str, data: bytes) -> str:
    """Make an object where there is none; its ETag.

    Raises: StorageError: somebody else made one meanwhile; what boto3 raises.
    """
    try:
        return put_object(client, bucket, key, data, IfNoneMatch="*")
    except Exception as error:
        where = f"s3://{bucket}/{show(key)}"
        if code_of(error) in _NOT_TAKEN:
            return put_object(client, bucket, key, data)
        if not is_conflict(error):
            raise
        # An earlier attempt of this very request may have made it, and its answer was lost.
        found = head(client, bucket, key, where)
        if found is not None and found.nbytes == len(data):
            made = bytearray(len(data))
            fetch(client, bucket, key, found, 0, memoryview(made))
            if made == data:
                return found.etag
        raise StorageError("somebody else created this object in the meantime", where=where) from None


def create_upload(client: Client, bucket: str, key: str) -> str:
    """Begin an upload; its id. Signals wait for the answer, without which the upload would be nobody's."""
    with Deferral():
        answer = client.quick.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="CRC32")
    return str(answer["UploadId"])


def send_part(client: Client, bucket: str, key: str, upload: str, number: int, data: bytearray) -> SentPart:
    """Send a part with a sum that the service compares: its CRC-32, or where it does not know that, its MD5."""
    sums: dict[str, Any] = {}
    has_crc32 = client.traits.get(_CRC32)
    if has_crc32 is not False:
        sums["ChecksumCRC32"] = base64.b64encode(struct.pack(">I", zlib.crc32(data))).decode()
    if has_crc32 is not True:
        sums["ContentMD5"] = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    answer = client.quick.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=data, **sums)
    crc32 = str(answer.get("ChecksumCRC32", ""))
    if has_crc32 is None:
        client.traits[_CRC32] = bool(crc32)
    return SentPart(number, str(answer["ETag"]), len(data), crc32)


def copy_part(
    client: Client, bucket: str, key: str, upload: str, number: int, source: tuple[str, str, str], start: int, stop: int
) -> SentPart:
    """Let the store copy a range into a part.

    Args:
        source: bucket, key and the ETag that the object must have.
    """
    from_bucket, from_key, etag = source
    answer = client.patient.upload_part_copy(
        Bucket=bucket,
        Key=key,
        UploadId=upload,
        PartNumber=number,
        CopySource={"Bucket": from_bucket, "Key": from_key},
        CopySourceIfMatch=etag,
        CopySourceRange=f"bytes={start}-{stop - 1}",
    )
    result = answer["CopyPartResult"]
    return SentPart(number, str(result["ETag"]), stop - start, str(result.get("ChecksumCRC32", "")))


def complete(client: Client, bucket: str, key: str, record: UploadRecord, *, is_new: bool) -> Listed:
    """Make an object of the parts of an upload.

    Args:
        is_new: nothing may stand there.

    Raises: StorageError: something stands there, the upload is gone, or the object is not what was sent.
    """
    where = f"s3://{bucket}/{show(key)}"
    with as_storage_error(where):
        if is_new and client.traits.get(_CONDITIONS) is False:
            found = head(client, bucket, key, where)
            if found is not None and record.etag and found == Listed(record.nbytes, record.etag):
                return found
            if found is not None:
                raise StorageError("somebody else created this object in the meantime", where=where)
        try:
            etag = _complete(client, bucket, key, record, is_new=is_new)
        except Exception as error:
            if not is_no_upload(error) and not is_conflict(error):
                raise
            # The upload may have been completed by an attempt whose answer was lost.
            found = head(client, bucket, key, where)
            if found is not None and record.etag and found == Listed(record.nbytes, record.etag):
                return found
            if is_conflict(error):
                raise StorageError("somebody else created this object in the meantime", where=where) from None
            raise StorageError("the upload is gone: another run removed it", where=where) from None
        found = head(client, bucket, key, where)
    # Where a store encrypts with keys of its own, ETags are others than the documented ones: its answer says which.
    known = {etag.strip('"') or record.etag.strip('"'), record.etag.strip('"')} - {""}
    if found is None or found.nbytes != record.nbytes or (known and found.etag.strip('"') not in known):
        raise StorageError(
            "the stored object differs from what was sent", where=where, hint="check whether another run writes there"
        )
    return found


def _complete(client: Client, bucket: str, key: str, record: UploadRecord, *, is_new: bool) -> str:
    """The ETag in the answer."""
    has_sums = all(part.crc32 for part in record.parts)
    parts = [
        {"PartNumber": part.number, "ETag": part.etag, **({"ChecksumCRC32": part.crc32} if has_sums else {})}
        for part in record.parts
    ]
    asked: dict[str, Any] = {
        "Bucket": bucket,
        "Key": key,
        "UploadId": record.upload,
        "MultipartUpload": {"Parts": parts},
    }
    conditions = {"IfNoneMatch": "*"} if is_new and client.traits.get(_CONDITIONS, True) else {}
    try:
        answer = client.patient.complete_multipart_upload(**asked, **conditions)
    except Exception as error:
        if not conditions or code_of(error) not in _NOT_TAKEN:
            raise
        client.traits[_CONDITIONS] = False
        answer = client.patient.complete_multipart_upload(**asked)
    return str(answer.get("ETag", ""))


def abort(client: Client, bucket: str, key: str, upload: str) -> None:
    """Give an upload up; nothing where it is gone."""
    with as_storage_error(f"s3://{bucket}/{show(key)}"):
        try:
            client.quick.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
        except Exception as error:
            if not is_no_upload(error):
                raise


def remove(client: Client, bucket: str, keys: Sequence[str]) -> None:
    """Remove objects, one request each: services differ in the sums that a list of keys needs."""
    for key in keys:
        with as_storage_error(f"s3://{bucket}/{show(key)}"):
            client.quick.delete_object(Bucket=bucket, Key=key)


def uploads_below(client: Client, bucket: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, id) of every unfinished upload whose key begins with a prefix."""
    with as_storage_error(f"s3://{bucket}/{prefix}"):
        pages = client.quick.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        found = [(str(one["Key"]), str(one["UploadId"])) for page in pages for one in page.get("Uploads", ())]
    yield from found


def parts_of(client: Client, bucket: str, key: str, upload: str) -> list[tuple[int, str, int]] | None:
    """(number, ETag, bytes) of every part that the store has of an upload; None where there is no such upload."""
    with as_storage_error(f"s3://{bucket}/{show(key)}"):
        try:
            pages = client.quick.get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=upload)
            return [
                (int(one["PartNumber"]), str(one["ETag"]), int(one["Size"]))
                for page in pages
                for one in page.get("Parts", ())
            ]
        except Exception as error:
            if is_no_upload(error):
                return None
            raise
