"""GET requests, bounded in bytes and time, and retried if that helps.

The session is that of huggingface_hub, of httpx or of requests by its version; both are known here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from loraformat.diagnostics import show
from loraformat.errors import StorageError

ATTEMPTS = 8
_LONGEST_BACKOFF_S = 8.0
_SILENCE_S = 30  # between two bytes, as the library below counts it
_PATIENCE_S = 40  # for a whole answer, however its bytes come; and for its length:
_LEAST_RATE = 100_000  # bytes a second
_LONGEST_WAIT_S = 60
_MOST_HOPS = 5
_CHUNK_NBYTES = 64 << 10
BUSY = frozenset({408, 429, 500, 502, 503, 504})
_CUT = frozenset(
    {
        *("RemoteProtocolError", "ReadError", "WriteError", "CloseError"),  # httpx
        *("ChunkedEncodingError", "ProtocolError", "IncompleteRead"),  # requests and urllib3
        *("ConnectionResetError", "BrokenPipeError"),
    }
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The last of a chain of answers; `body` is empty where the status is no success."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _CutError(Exception):
    """The answer ended early, or the connection was reset: worth another attempt."""


@dataclass(frozen=True, slots=True)
class Client:
    """Requests with one set of headers.

    Attributes:
        session: of httpx or requests.
        headers: sent with each request; `Authorization` to the host that is asked first and to no other.
        wait: how to pass some seconds before the next attempt.
        patience_s: seconds for a whole answer without a body.
    """

    session: Any
    headers: Mapping[str, str]
    wait: Callable[[float], None] = time.sleep
    patience_s: float = _PATIENCE_S

    def get(self, url: str, headers: Mapping[str, str], *, most: int, least: int = 0) -> Answer:
        """The answer to a request.

        Args:
            most: bytes of its body.
            least: bytes of a part that was asked for (206): fewer were cut off. It may take the longer the more.

        Raises: StorageError: longer, encoded, too slow, or still busy or cut after some attempts; and what the library
            below raises where there is no connection at all.
        """
        sent = {**self.headers, **headers, "Accept-Encoding": "identity"}  # an encoding would count its own bytes
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                answer = self._whole_answer(url, sent, most, least)
            except _CutError as error:
                reason, pause = str(error), backoff(attempt)
            else:
                if answer.status not in BUSY:
                    return answer
                reason, pause = (
                    f"status {answer.status}",
                    pause_of(answer.status, answer.headers.get("retry-after", ""), attempt),
                )
            if attempt + 1 < ATTEMPTS:
                self.wait(pause)
        raise StorageError(f"the server cannot be read, tried {ATTEMPTS} times ({reason})", hint="try again later")

    def _whole_answer(self, url: str, headers: Mapping[str, str], most: int, least: int) -> Answer:
        """One attempt, made by a thread of its own: no timeout of the libraries below covers a header in drops."""
        results: list[Answer | BaseException] = []
        done, given_up = threading.Event(), threading.Event()

        def run() -> None:
            try:
                results.append(self._follow(url, headers, most, least, given_up))
            except BaseException as error:  # noqa: BLE001 - raised again below, where somebody waits for it
                results.append(error)
            done.set()

        threading.Thread(target=run, name="loraformat-http", daemon=True).start()
        seconds = self.patience_s + least / _LEAST_RATE
        try:
            if not done.wait(seconds):
                raise StorageError(f"the answer was not complete after {seconds:.0f} s", hint="try again later")
        finally:
            given_up.set()
        (result,) = results
        if isinstance(result, BaseException):
            if _is_cut(result):
                raise _CutError("the connection was cut") from result
            raise result
        return result

    def _follow(self, url: str, headers: Mapping[str, str], most: int, least: int, given_up: threading.Event) -> Answer:
        """The answer at the end of some redirections, whose bodies are not read."""
        sent = dict(headers)
        for _ in range(_MOST_HOPS + 1):
            with self._opened(url, sent) as response:
                status, target = int(response.status_code), response.headers.get("Location")
                if 300 <= status < 400 and target is not None:
                    following = _redirected(url, target)
                    if urlsplit(following)[:2] != urlsplit(url)[:2]:
                        sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
                    url = following
                    continue
                return _received(response, status, most, least, given_up)
        raise StorageError(f"more than {_MOST_HOPS} redirections")

    def _opened(self, url: str, headers: Mapping[str, str]) -> AbstractContextManager[Any]:
        """The answer before its body is read."""
        if callable(getattr(self.session, "stream", None)):
            answer: AbstractContextManager[Any] = self.session.stream(
                "GET", url, headers=headers, timeout=_SILENCE_S, follow_redirects=False
            )
            return answer
        return closing(self.session.get(url, headers=headers, timeout=_SILENCE_S, stream=True, allow_redirects=False))


def _is_cut(error: BaseException) -> bool:
    """Whether the connection was reset; requests has the reason among the arguments of its own error."""
    return any(type(each).__name__ in _CUT for each in (error, error.__cause__, *error.args))


def _received(response: Any, status: int, most: int, least: int, given_up: threading.Event) -> Answer:  # noqa: ANN401
    headers = {name.lower(): value for name, value in response.headers.items()}
    if not 200 <= status < 300:
        return Answer(status, headers, b"")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise StorageError(f"the server sent the bytes encoded as {show(encoding, 40)}, which was not requested")
    announced = headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > most:
        return Answer(status, headers, b"")  # of no use, and it may be gigabytes
    body = bytearray()
    for chunk in _chunks(response):
        body += chunk
        if len(body) > most:
            raise StorageError(f"the server sent more than the {most} bytes that were requested")
        if given_up.is_set():
            break
    if status == 206 and len(body) < least:
        raise _CutError(f"only {len(body)} of {least} bytes arrived")
    return Answer(status, headers, bytes(body))


def _chunks(response: Any) -> Iterator[bytes]:  # noqa: ANN401 - of httpx or of requests
    """The body as it comes, nothing decoded."""
    if hasattr(response, "iter_raw"):
        yield from response.iter_raw(_CHUNK_NBYTES)
    else:
        yield from response.raw.stream(_CHUNK_NBYTES, decode_content=False)


def _redirected(url: str, target: str) -> str:
    following = urljoin(url, target)
    scheme = urlsplit(following).scheme
    if scheme != "https" and scheme != urlsplit(url).scheme:
        raise StorageError(f"a redirection to {show(scheme, 20)}://, which is not followed")
    return following


def backoff(attempt: int) -> float:
    """Seconds until the next attempt, where the server says nothing."""
    return min(2.0**attempt, _LONGEST_BACKOFF_S)


def pause_of(status: int, retry_after: str, attempt: int) -> float:
    """Seconds until the next attempt: what the server asks for, else twice as many as before.

    Raises: StorageError: it asks for more than a minute.
    """
    asked = _retry_after(retry_after)
    if asked is None:
        return backoff(attempt)
    if asked > _LONGEST_WAIT_S:
        raise StorageError(f"the server is busy (status {status}) and asks to wait {asked:.0f} s")
    return asked


def _retry_after(text: str) -> float | None:
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
