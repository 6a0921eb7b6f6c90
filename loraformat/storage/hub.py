"""A folder of a repository on the Hugging Face Hub, read by ranges: headers cost kilobytes, whatever the weights are.

huggingface_hub is imported when the first repository is opened, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.base import Writer
from loraformat.storage.faults import checked_name, checked_range

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
_TIMEOUT_S = 30
_HEAD_NBYTES = 128 << 10  # of a safetensors file: the header of nearly all shards lies in it
_MOST_AT_ONCE = 32 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_URI = re.compile(r"hf://([\w.\-]+/[\w.\-]+)(?:@(refs/[\w.\-]+/[\w.\-]+|[^/@]+))?((?:/[^/]+)*)/?")
_LIBRARIES = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")


class HubStore:
    """The files of a repository, or of one folder of it, at one commit. Read only.

    The revision is resolved once; every byte is then asked for by the commit, which stands in `uri`, so that a branch
    that moves in between changes nothing. The token that the Hub's own tools use goes to the Hub alone.

    Args:
        uri: hf://owner/name, with @revision (branch, tag or commit) and /folder if wanted.

    Raises: StorageError: no such address or repository, no access, no connection, or HF_HUB_OFFLINE is set.
    """

    def __init__(self, uri: str) -> None:
        self._repository, revision, self._folder = _parsed(uri)
        self._heads: dict[str, bytes] = {}
        with _told_as(uri):
            self._api = _api()
            info = self._api.model_info(self._repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        if _COMMIT.fullmatch(info.sha or "") is None:
            raise StorageError("the Hub did not name the commit", where=uri)
        self._commit = str(info.sha)
        self._sizes = {each.rfilename: each.size for each in info.siblings or () if isinstance(each.size, int)}
        self.uri = f"{SCHEME}{self._repository}@{self._commit}{f'/{self._folder}' if self._folder else ''}"
        if self._folder and not any(name.startswith(f"{self._folder}/") for name in self._sizes):
            raise StorageError("the repository has no such folder", where=uri)

    def files(self) -> Mapping[str, int]:
        """See Store."""
        prefix = f"{self._folder}/" if self._folder else ""
        found = {name.removeprefix(prefix): size for name, size in self._sizes.items() if name.startswith(prefix)}
        return dict(sorted((name, size) for name, size in found.items() if "/" not in name))

    def folders(self) -> tuple[str, ...]:
        """See Store."""
        prefix = f"{self._folder}/" if self._folder else ""
        inner = [name.removeprefix(prefix) for name in self._sizes if name.startswith(prefix)]
        return tuple(sorted({name.partition("/")[0] for name in inner if "/" in name and not name.startswith(".")}))

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Store."""
        size = self._size(path)
        count = size - offset if nbytes is None else nbytes
        checked_range(path, size, offset, count)
        if offset + count <= min(size, _HEAD_NBYTES):
            if path not in self._heads:
                self._heads[path] = self._range(path, 0, min(size, _HEAD_NBYTES))
            return self._heads[path][offset : offset + count]
        starts = range(offset, offset + count, _MOST_AT_ONCE)
        return b"".join(self._range(path, start, min(_MOST_AT_ONCE, offset + count - start)) for start in starts)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Store."""
        view = memoryview(buffer).cast("B")
        view[:] = self.read(path, offset, view.nbytes)

    def create(self, path: str, size: int | None = None) -> AbstractContextManager[Writer]:  # noqa: ARG002 - a Store
        """Raises: StorageError, always."""
        raise StorageError("nothing is written to the Hub", where=f"{self.uri}/{path}", hint="write a folder")

    def _size(self, path: str) -> int:
        size = self.files().get(checked_name(path, self.uri))
        if size is None:
            raise StorageError("no such file", where=f"{self.uri}/{show(path)}")
        return size

    def _range(self, path: str, start: int, nbytes: int) -> bytes:
        if nbytes == 0:
            return b""
        where = f"{self.uri}/{path}"
        with _told_as(where):
            content, status = _fetched(self._api, self._repository, self._commit, self._inside(path), start, nbytes)
        if status != 206 and len(content) != nbytes:
            raise StorageError("the server does not serve parts of files", where=where)
        if len(content) != nbytes:
            raise StorageError(f"{nbytes} bytes were asked for, {len(content)} came", where=where)
        return content

    def _inside(self, path: str) -> str:
        return f"{self._folder}/{path}" if self._folder else path


def _parsed(uri: str) -> tuple[str, str | None, str]:
    found = _URI.fullmatch(uri)
    folder = found[3].strip("/") if found else ""
    if found is None or any(part in (".", "..") for part in [*folder.split("/"), *found[1].split("/")]):
        raise StorageError("no address of a repository", where=show(uri), hint="hf://owner/name[@revision][/folder]")
    return found[1], found[2], folder


def _api() -> HfApi:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise StorageError("HF_HUB_OFFLINE is set, so the Hub is not asked", hint="unset it, or give a local folder")
    return HfApi(library_name="loraformat")


def _fetched(api: HfApi, repository: str, commit: str, path: str, start: int, nbytes: int) -> tuple[bytes, int]:
    """The answer to one request, and its status."""
    from huggingface_hub import hf_hub_url, utils

    http: Any = utils  # it does not mark what it exports
    url = hf_hub_url(repository, path, revision=commit, endpoint=api.endpoint)
    headers = {**http.build_hf_headers(library_name="loraformat"), "Range": f"bytes={start}-{start + nbytes - 1}"}
    # An encoding would count its own bytes.
    headers = {**headers, "Accept-Encoding": "identity"}
    with _answer(http.get_session(), url, headers) as response:
        http.hf_raise_for_status(response)
        status = int(response.status_code)
        if status != 206 and int(response.headers.get("Content-Length", nbytes + 1)) > nbytes:
            return b"", status  # a whole file, which may be gigabytes: not read
        return b"".join(
            response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(1 << 16)
        ), status


def _answer(session: Any, url: str, headers: Mapping[str, str]) -> Any:  # noqa: ANN401 - of httpx or of requests
    """The answer before its body is read, by either library that huggingface_hub uses."""
    if hasattr(session, "stream") and callable(session.stream):
        return session.stream("GET", url, headers=headers, timeout=_TIMEOUT_S)
    return session.get(url, headers=headers, timeout=_TIMEOUT_S, stream=True)


@contextmanager
def _told_as(where: str) -> Iterator[None]:
    """A block in which every error of the libraries below becomes a StorageError; their texts are not repeated."""
    try:
        yield
    except StorageError as error:
        raise StorageError(error.message, where=error.where or where, hint=error.hint) from error
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(_LIBRARIES):
            raise
        raise StorageError(_reason(error), where=show(where)) from error


def _reason(error: Exception) -> str:
    name = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if name in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError") or status in (401, 403, 404):
        return (
            f"no such repository or revision, or no access to it ({name}); log in with `hf auth login` if it is private"
        )
    return f"the Hub cannot be read ({name}{f', status {status}' if status else ''})"
