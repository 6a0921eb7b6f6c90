"""Requests to the Hub: the files of a repository at a revision, and ranges of them.

huggingface_hub is imported when the first repository is opened, and nowhere else.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import quote

from loraformat import strict_json
from loraformat.diagnostics import show
from loraformat.errors import InvalidJson, StorageError
from loraformat.storage.hub.addresses import Address
from loraformat.storage.hub.faults import refusal
from loraformat.storage.hub.http import Answer, Client

_MOST_INFO_NBYTES = 64 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[!-~]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class ListedFile(NamedTuple):
    """What the Hub says of a file.

    Attributes:
        nbytes: its size.
        sha256: of its bytes, where it is stored as a large file; else "".
        blob: the name that git has for what it stores: the bytes, or the pointer to a large file.
    """

    nbytes: int
    sha256: str = ""
    blob: str = ""


class State(NamedTuple):
    """A repository at one commit.

    Attributes:
        files: by their paths in it.
        is_private: whether others cannot see it.
    """

    commit: str
    files: Mapping[str, ListedFile]
    is_private: bool = False


@dataclass(frozen=True, slots=True)
class Connection:
    """A Hub, with the token that its own tools use.

    Attributes:
        endpoint: where it is.
    """

    endpoint: str
    client: Client

    @classmethod
    def open(
        cls,
        endpoint: str | None = None,
        wait: Callable[[float], None] = time.sleep,
        patience_s: float | None = None,
    ) -> Connection:
        """A connection; nothing is asked yet.

        Args:
            endpoint: where the Hub is; None for the Hub's own tools to say.
            wait: how to pass some seconds before a request is made again.
            patience_s: seconds for a whole answer without a body.
        """
        from huggingface_hub import constants, utils

        http: Any = utils  # it does not mark what it exports
        check_token()
        headers = http.build_hf_headers(library_name="loraformat")
        client = Client(http.get_session(), headers, wait)
        client = client if patience_s is None else replace(client, patience_s=patience_s)
        return cls(str(constants.ENDPOINT if endpoint is None else endpoint), client)

    def state(self, address: Address) -> State:
        """The commit of a revision, and its files.

        Raises: StorageError: no such repository or revision, or no access; no answer that can be read.
        """
        answer = self.ask(address)
        check_status(answer, address.repository)
        return state_of(answer)

    def ask(self, address: Address) -> Answer:
        """The Hub's answer about a repository at a revision, whatever it is."""
        at = "" if address.revision is None else f"/revision/{quote(address.revision, safe='')}"
        url = f"{self.endpoint}/api/models/{address.repository}{at}?blobs=true"
        return self.client.get(url, {}, most=_MOST_INFO_NBYTES)

    def range(self, repository: str, commit: str, path: str, start: int, nbytes: int, size: int) -> bytes:
        """`nbytes` bytes of a file of `size` bytes from `start` on.

        Raises: StorageError: other bytes came than those that were asked for.
        """
        from huggingface_hub import hf_hub_url

        url = str(hf_hub_url(repository, path, revision=commit, endpoint=self.endpoint))
        answer = self.client.get(url, {"Range": f"bytes={start}-{start + nbytes - 1}"}, most=nbytes, least=nbytes)
        check_status(answer, repository)
        if answer.status == 206:
            _check_range(answer, start, nbytes, size)
        elif nbytes != size or len(answer.body) != nbytes:
            is_page = answer.headers.get("content-type", "").startswith("text/html")
            page = "got a web page instead of the file, perhaps the login page of a proxy"
            raise StorageError(page if is_page else "the server does not support range requests")
        return answer.body


def check_token() -> None:
    """Raises: StorageError: the access token holds what no header of a request may hold; it is not repeated."""
    from huggingface_hub import get_token

    token = get_token()
    if token is not None and _TOKEN.fullmatch(token) is None:
        text = "the access token contains spaces or characters that are not printable ASCII"
        raise StorageError(text, hint="set HF_TOKEN again, or log in again with `hf auth login`")


def check_status(answer: Answer, repository: str) -> None:
    """Raises: StorageError: the answer is not the one that was asked for."""
    if not 200 <= answer.status < 300:
        raise refusal(answer.status, answer.headers, repository)


def state_of(answer: Answer) -> State:
    """What an answer about a repository says. Raises: StorageError: it cannot be read."""
    if answer.headers.get("content-type", "").startswith("text/html"):
        raise StorageError("got a web page instead of the Hub's answer, perhaps the login page of a proxy")
    try:
        info = strict_json.parse(answer.body, "the Hub's answer", limit=_MOST_INFO_NBYTES)
    except InvalidJson as error:
        raise StorageError(f"the Hub's answer is not valid JSON: {error.message}") from error
    fields = info if isinstance(info, dict) else {}
    commit, siblings = fields.get("sha"), fields.get("siblings")
    if not isinstance(commit, str) or _COMMIT.fullmatch(commit) is None:
        raise StorageError("the Hub did not name the commit")
    files: dict[str, ListedFile] = {}
    for each in siblings if isinstance(siblings, list) else ():
        name, size = (each.get("rfilename"), each.get("size")) if isinstance(each, dict) else (None, None)
        if isinstance(each, dict) and isinstance(name, str) and type(size) is int and size >= 0:
            lfs, blob = each.get("lfs"), each.get("blobId")
            sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
            is_known = isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None
            files[name] = ListedFile(size, str(sha256) if is_known else "", blob if isinstance(blob, str) else "")
    return State(commit, files, fields.get("private") is True)


def _check_range(answer: Answer, start: int, nbytes: int, size: int) -> None:
    """Raises: StorageError: the bytes are others than those that were asked for."""
    stated = answer.headers.get("content-range", "")
    found = _RANGE.fullmatch(stated)
    wanted = f"bytes {start}-{start + nbytes - 1}/{size}"
    if found is None or (int(found[1]), int(found[2])) != (start, start + nbytes - 1):
        raise StorageError(f"{wanted} were requested, but the server sent {show(stated, 80) or 'an unnamed range'}")
    if found[3] != "*" and int(found[3]) != size:
        raise StorageError(f"the Hub listed {size} bytes, but the server says {int(found[3])}")
    if len(answer.body) != nbytes:
        raise StorageError(f"{nbytes} bytes were requested, but {len(answer.body)} came")
