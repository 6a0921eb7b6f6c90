"""The type of a file by its first bytes, independent of its name."""

from __future__ import annotations

import struct

from loraformat.errors import GitLfsPointer, NotATensorFile, WebPage

# Enough for the magic of tar, which stands at byte 257.
HEAD_NBYTES = 512
MOST_HEADER_NBYTES = 100_000_000  # safetensors 0.8.0, `MAX_HEADER_SIZE`

_DOWNLOAD = "download it again"
_RESAVE = "save the tensors as safetensors where the file was made"

_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive, perhaps the output of torch.save", "rename it to .pt"),
    (b"PK\x05\x06", "an empty zip archive", _DOWNLOAD),
    (b"GGUF", "a GGUF file", "rename it to .gguf"),
    (b"\x1f\x8b", "a gzip stream", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _RESAVE),
    (b"\x28\xb5\x2f\xfd", "a zstd stream", "unpack it"),
    (b"\xfd7zXZ\x00", "an xz stream", "unpack it"),
    (b"BZh", "a bzip2 stream", "unpack it"),
    (b"Rar!", "a rar archive", _RESAVE),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _RESAVE),
    (b"\x93NUMPY", "a numpy array", _RESAVE),
    (b"\x80\x02\x8a\x0a", "a pickle in the format of torch before 1.6; it was not executed", _RESAVE),
)


def looks_like_safetensors(head: bytes) -> bool:
    """Whether the first bytes are a header length within the limit and an opening brace."""
    return len(head) >= 9 and head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] <= MOST_HEADER_NBYTES


def refuse_foreign(head: bytes, where: str, *, zip_is_foreign: bool) -> None:
    """Raises: NotATensorFile: `head`, the first bytes of a file, are those of something else, which is named."""
    refuse_stand_in(head, where)
    found = _foreign(head)
    if found is None or (not zip_is_foreign and found[0].startswith("a zip")):
        return
    raise NotATensorFile(f"this is {found[0]}", where=where, hint=found[1])


def refuse_stand_in(head: bytes, where: str) -> None:
    """Raises GitLfsPointer (LF006) or WebPage (LF008): `head` is that of what a failed download leaves."""
    if head.startswith(_POINTER):
        message = "this is a Git-LFS pointer, not the file it stands for"
        raise GitLfsPointer(
            message, where=where, hint="run `git lfs pull`; in GitHub Actions, check out with lfs: true"
        )
    if _stripped(head).startswith(_PAGES):
        raise WebPage("this is an HTML or XML page, perhaps an error page", where=where, hint=_DOWNLOAD)


def _stripped(head: bytes) -> bytes:
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()


def _foreign(head: bytes) -> tuple[str, str] | None:
    for magic, what, hint in _MAGIC:
        if head.startswith(magic):
            return what, hint
    if head[257:262] == b"ustar":
        return "a tar archive, perhaps of torch before 0.4", _RESAVE
    if head[:1] == b"\x80" and head[1:2] in (b"\x00", b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a bare pickle; it was not executed", _RESAVE
    return _text(head)


def _text(head: bytes) -> tuple[str, str] | None:
    start = _stripped(head)
    if start.startswith((b'{"', b"{\n", b"{}", b"[{")):
        return "a JSON document, perhaps an error message", _DOWNLOAD
    if len(head) >= 9 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return "a plain text file", _DOWNLOAD
    return None
