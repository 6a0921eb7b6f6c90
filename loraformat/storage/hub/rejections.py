"""Why the Hub rejected a request, and retries if that helps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from loraformat.diagnostics import show
from loraformat.errors import LoraFormatError, StorageError
from loraformat.storage.hub.faults import CONNECTIONS, LIBRARIES, refusal
from loraformat.storage.hub.http import ATTEMPTS, BUSY, backoff, pause_of

T = TypeVar("T")

_LONGEST_TEXT = 300
_DUPLICATE = "/lfs-files/duplicate"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class CopyRejected(Exception):
    """The Hub does not copy files of a base into the repository of the output.

    Attributes:
        reason: why, in its words or ours.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def patiently(call: Callable[[], T], wait: Callable[[float], None], *, again: bool = True) -> T:
    """What a call gives; it is made again where the Hub is busy.

    Args:
        wait: how to pass some seconds.
        again: whether also where an answer was lost, so that the Hub may have done what it was asked for.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except Exception as error:
            pause = _pause(error, attempt, again=again)
            if pause is None:
                raise
        wait(pause)
    return call()


def _pause(error: Exception, attempt: int, *, again: bool) -> float | None:
    """Seconds until a call is made again; None where it would end the same way."""
    if isinstance(error, LoraFormatError) or type(error) is RuntimeError:
        return None  # the one is final, the other an upload that the library below has tried several times
    answer = _answer(error)
    if answer is not None:
        is_busy = answer.status_code in BUSY
        return (
            pause_of(int(answer.status_code), str(answer.headers.get("retry-after", "")), attempt) if is_busy else None
        )
    is_lost = isinstance(error, (OSError, json.JSONDecodeError)) or type(error).__module__.startswith(CONNECTIONS)
    return backoff(attempt) if again and is_lost else None


@contextmanager
def as_rejection(where: str) -> Iterator[None]:
    """A block of calls to huggingface_hub whose errors become a StorageError at `where`, or CopyRejected."""
    try:
        yield
    except StorageError as error:
        raise StorageError(error.message, where=error.where or where, hint=error.hint) from error
    except LoraFormatError:
        raise
    except Exception as error:
        reason = _of_a_copy(error)
        if reason is not None:
            raise CopyRejected(reason) from error
        found = _rejection(error, where)
        raise StorageError(found.message, where=where, hint=found.hint) from error


def _rejection(error: Exception, where: str) -> StorageError:
    answer = _answer(error)
    if answer is None:
        if isinstance(error, ValueError):  # what the library says of files that the Hub does not take
            return StorageError(f"the Hub rejected it: {_plain(str(error))}")
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        return StorageError(f"the Hub cannot be written to ({type(cause).__name__})", hint="try again later")
    status, text = int(answer.status_code), _text(error)
    if status == 412:
        hint = "somebody else has written to it; check what changed, then run the command again"
        return StorageError("the branch has moved since this run started; nothing was committed", hint=hint)
    if status == 409:
        hint = "run the command again"
        return StorageError(f"the Hub reports a conflict: somebody else is writing there{text}", hint=hint)
    if status in (402, 403, 413, 507):
        hint = f"use a token with write access, or free some of the quota; {_LOGIN}"
        return StorageError(f"this token has no write access, or a quota is used up{text}", hint=hint)
    if status in BUSY:
        return StorageError(f"the Hub is busy, tried several times (status {status})", hint="try again later")
    if status in (401, 404):
        headers = {str(name).lower(): str(value) for name, value in answer.headers.items()}
        return refusal(status, headers, where)
    return StorageError(f"the Hub rejected it (status {status}){text}")


def _of_a_copy(error: Exception) -> str | None:
    """Why a file was not copied from one repository to another; None for other errors."""
    if type(error).__name__ == "FileDuplicationError":
        return _plain(str(error))
    if isinstance(error, ValueError) and "no xet hash" in str(error):
        return "the base's files are not in the Hub's newer storage (Xet)"
    answer = _answer(error)
    if answer is None or answer.status_code in BUSY or _DUPLICATE not in str(getattr(answer, "url", "")):
        return None
    return f"status {int(answer.status_code)}{_text(error)}"


def _answer(error: BaseException) -> Any:  # noqa: ANN401 - of httpx or of requests
    """The answer that an error, or what it was made of, came from; None where there was none."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if each is not None and type(each).__module__.startswith(LIBRARIES) and answer is not None:
            return answer
    return None


def _text(error: BaseException) -> str:
    """A colon and what the Hub says to people, where it says something."""
    for each in (error, error.__cause__):
        said = getattr(each, "server_message", None)
        if isinstance(said, str) and said.strip():
            return f": {_plain(said)}"
    return ""


def _plain(text: str) -> str:
    """A text of strangers in one line, without the token."""
    from huggingface_hub import get_token

    token = get_token()
    text = text if not token else text.replace(token, "…")
    return show(" ".join(text.split()), _LONGEST_TEXT)
