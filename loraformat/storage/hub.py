"""A folder of a repository on the Hugging Face Hub, read by ranges: headers cost kilobytes, whatever the weights are.

huggingface_hub is imported when the first repository is opened, and nowhere else.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

from loraformat import strict_json
from loraformat.diagnostics import show
from loraformat.errors import InvalidJson, StorageError
from loraformat.storage.base import Copy, Writer
from loraformat.storage.faults import checked_name, checked_range
from loraformat.storage.http import Answer, Client
from loraformat.storage.local.store import LocalStore

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
_HEAD_NBYTES = 128 << 10  # of a safetensors file: the header of nearly all shards lies in it
_MOST_AT_ONCE = 32 << 20
_MOST_INFO_NBYTES = 64 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_URI = re.compile(r"hf://([\w.\-]+/[\w.\-]+)(?:@(refs/[\w.\-]+/[\w.\-]+|[^/@]+))?((?:/[^/]+)*)/?")
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_LIBRARIES = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
_LOGIN = "log in with `hf auth login` if it is private"


def open_repository(uri: str) -> HubStore | CachedRepository:
    """The files of a repository: of the Hub, or with HF_HUB_OFFLINE of the cache of the Hub's own tools.

    Args:
        uri: hf://owner/name, with @revision (branch, tag or commit) and /folder if wanted.

    Raises: StorageError: no such address or repository, no access, no connection, nothing in the cache.
    """
    with _told_as(uri):
        from huggingface_hub import constants

    return CachedRepository(uri) if constants.HF_HUB_OFFLINE else HubStore(uri)


class HubStore:
    """The files of a repository, or of one folder of it, at one commit. Read only.

    The revision is resolved once; every byte is then asked for by the commit, which stands in `uri`, so that a branch
    that moves in between changes nothing. The token that the Hub's own tools use goes to the Hub alone. Answers are
    bounded in bytes and time; what is busy or cut is asked for again.

    Args:
        uri: see `open_repository`.
        endpoint: where the Hub is; None for the Hub's own tools to say.
        wait: how to pass some seconds before a request is made again.
        patience_s: seconds for a whole answer without a body.

    Raises: StorageError: no such address or repository, no access, no connection.
    """

    def __init__(
        self,
        uri: str,
        *,
        endpoint: str | None = None,
        wait: Callable[[float], None] = time.sleep,
        patience_s: float | None = None,
    ) -> None:
        self._repository, revision, self._folder = _parsed(uri)
        self._heads: dict[str, bytes] = {}
        with _told_as(uri):
            self._api, self._client = _connected(endpoint, wait, patience_s)
            self._commit, self._sizes = self._listed(revision)
        self._files = self._inside_folder()
        self.uri = _pinned(self._repository, self._commit, self._folder)
        if self._folder and not any(name.startswith(f"{self._folder}/") for name in self._sizes):
            raise StorageError("the repository has no such folder", where=uri)

    def _listed(self, revision: str | None) -> tuple[str, dict[str, int]]:
        """The commit of a revision, and its files by name → size in bytes."""
        at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
        url = f"{self._api.endpoint}/api/models/{self._repository}{at}?blobs=true"
        answer = self._client.get(url, {}, most=_MOST_INFO_NBYTES)
        _check_status(answer)
        if answer.headers.get("content-type", "").startswith("text/html"):
            raise StorageError("a web page came in the place of the Hub's answer: the login page of a proxy?")
        try:
            info = strict_json.parse(answer.body, "the Hub's answer", limit=_MOST_INFO_NBYTES)
        except InvalidJson as error:
            raise StorageError(f"the Hub's answer is not strict JSON: {error.message}") from error
        fields = info if isinstance(info, dict) else {}
        commit, siblings = fields.get("sha"), fields.get("siblings")
        if not isinstance(commit, str) or _COMMIT.fullmatch(commit) is None:
            raise StorageError("the Hub did not name the commit")
        sizes: dict[str, int] = {}
        for each in siblings if isinstance(siblings, list) else ():
            name, size = (each.get("rfilename"), each.get("size")) if isinstance(each, dict) else (None, None)
            if isinstance(name, str) and type(size) is int and size >= 0:
                sizes[name] = size
        return commit, sizes

    def files(self) -> Mapping[str, int]:
        """See Store."""
        return self._files

    def _inside_folder(self) -> dict[str, int]:
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
        size = self.size(path)
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

    is_single_file = False

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source: the commit stands in the URI."""
        return (self.uri, path)

    def check_inside(self, path: str) -> None:
        """See Source: a repository has no links."""

    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> AbstractContextManager[Writer]:
        """Raises: StorageError, always."""
        del size, copies
        raise StorageError("nothing is written to the Hub", where=f"{self.uri}/{path}", hint="write a folder")

    def size(self, path: str) -> int:
        """See Store."""
        size = self.files().get(checked_name(path, self.uri))
        if size is None:
            raise StorageError("no such file", where=f"{self.uri}/{show(path)}")
        return size

    def _range(self, path: str, start: int, nbytes: int) -> bytes:
        if nbytes == 0:
            return b""
        size = self.size(path)
        with _told_as(f"{self.uri}/{path}"):
            url = _address(self._api, self._repository, self._commit, self._inside(path))
            wanted = {"Range": f"bytes={start}-{start + nbytes - 1}"}
            answer = self._client.get(url, wanted, most=nbytes, least=nbytes)
            _check_status(answer)
            if answer.status == 206:
                _check_range(answer, start, nbytes, size)
            elif nbytes != size or len(answer.body) != nbytes:
                is_page = answer.headers.get("content-type", "").startswith("text/html")
                page = "a web page came in the place of the file: the login page of a proxy?"
                raise StorageError(page if is_page else "the server does not serve parts of files")
        return answer.body

    def _inside(self, path: str) -> str:
        return f"{self._folder}/{path}" if self._folder else path


def _parsed(uri: str) -> tuple[str, str | None, str]:
    found = _URI.fullmatch(uri)
    folder = found[3].strip("/") if found else ""
    if found is None or any(part in (".", "..") for part in [*folder.split("/"), *found[1].split("/")]):
        raise StorageError("no address of a repository", where=show(uri), hint="hf://owner/name[@revision][/folder]")
    return found[1], found[2], folder


def _pinned(repository: str, commit: str, folder: str) -> str:
    return f"{SCHEME}{repository}@{commit}{f'/{folder}' if folder else ''}"


class CachedRepository(LocalStore):
    """The files of a repository, or of one folder of it, as they lie in the cache of huggingface_hub. Read only.

    Raises: StorageError: the cache does not have the repository at that revision, or only a part of it.
    """

    def __init__(self, uri: str) -> None:
        repository, revision, folder = _parsed(uri)
        with _told_as(uri):
            snapshot = _snapshot(repository, revision)
        super().__init__(os.path.join(snapshot, *folder.split("/")) if folder else snapshot)
        self.uri = _pinned(repository, os.path.basename(snapshot), folder)

    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> NoReturn:
        """Raises: StorageError, always."""
        del size, copies
        raise StorageError("nothing is written to the Hub", where=f"{self.uri}/{path}", hint="write a folder")

    def remove(self, path: str) -> NoReturn:
        """Raises: StorageError, always."""
        raise StorageError("nothing is removed from the Hub", where=f"{self.uri}/{path}")


def _snapshot(repository: str, revision: str | None) -> str:
    """The folder of a commit in the cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(repository, revision=revision, local_files_only=True, library_name="loraformat")
    except errors.LocalEntryNotFoundError as error:
        asked = repository if revision is None else f"{repository} --revision {revision}"
        message = "HF_HUB_OFFLINE is set, and the cache does not have all of this repository (offline)"
        raise StorageError(message, hint=f"hf download {asked}, or unset it, or give a local folder") from error
    return str(found)


def _connected(endpoint: str | None, wait: Callable[[float], None], patience_s: float | None) -> tuple[HfApi, Client]:
    from huggingface_hub import HfApi, utils

    http: Any = utils  # it does not mark what it exports
    headers = http.build_hf_headers(library_name="loraformat")
    client = Client(http.get_session(), headers, wait)
    return HfApi(endpoint=endpoint, library_name="loraformat"), (
        client if patience_s is None else replace(client, patience_s=patience_s)
    )


def _address(api: HfApi, repository: str, commit: str, path: str) -> str:
    from huggingface_hub import hf_hub_url

    return str(hf_hub_url(repository, path, revision=commit, endpoint=api.endpoint))


def _check_status(answer: Answer) -> None:
    """Raises: StorageError: the answer is not the one that was asked for."""
    if 200 <= answer.status < 300:
        return
    code = answer.headers.get("x-error-code", "")
    said = show(code, 40) if code else f"status {answer.status}"
    if answer.status in (401, 403, 404):
        raise StorageError(f"no such repository or revision, or no access to it ({said}); {_LOGIN}")
    raise StorageError(f"the Hub cannot be read ({said})")


def _check_range(answer: Answer, start: int, nbytes: int, size: int) -> None:
    """Raises: StorageError: the bytes are others than those that were asked for."""
    stated = answer.headers.get("content-range", "")
    found = _RANGE.fullmatch(stated)
    wanted = f"bytes {start}-{start + nbytes - 1}/{size}"
    if found is None or (int(found[1]), int(found[2])) != (start, start + nbytes - 1):
        raise StorageError(
            f"{wanted} were asked for, the server sent {show(stated, 80) or 'some that it does not name'}"
        )
    if found[3] != "*" and int(found[3]) != size:
        raise StorageError(f"the Hub listed {size} bytes, the server says {int(found[3])}")
    if len(answer.body) != nbytes:
        raise StorageError(f"{nbytes} bytes were asked for, {len(answer.body)} came")


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
    return f"the Hub cannot be read ({type(error).__name__})"
