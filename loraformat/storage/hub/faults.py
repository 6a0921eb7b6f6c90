"""Errors of the Hub and its libraries as StorageError; their texts are repeated if they say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from loraformat.diagnostics import show
from loraformat.errors import LoraFormatError, StorageError

CONNECTIONS = ("httpx", "httpcore", "h11", "requests", "urllib3")
LIBRARIES = ("huggingface_hub", "hf_xet", *CONNECTIONS)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN, if it is private"


@contextmanager
def as_hub_error(where: str) -> Iterator[None]:
    """A block in which every error of the libraries below becomes a StorageError; their texts are not repeated."""
    try:
        yield
    except StorageError as error:
        raise StorageError(error.message, where=error.where or where, hint=error.hint) from error
    except Exception as error:
        if not is_of_libraries(error):
            raise
        raise StorageError(f"the Hub cannot be read ({type(error).__name__})", where=show(where)) from error


def is_of_libraries(error: BaseException) -> bool:
    """Whether an error comes from a connection or from a library below, rather than from this package."""
    if isinstance(error, LoraFormatError):
        return False
    return isinstance(error, OSError) or type(error).__module__.startswith(LIBRARIES)


def refusal(status: int, headers: Mapping[str, str], repository: str) -> StorageError:
    """Why the Hub gives no answer to a request for something of a repository.

    Args: headers: of the answer, their names in small letters.
    """
    code = headers.get("x-error-code", "")
    said = show(code, 40) if code else f"status {status}"
    if code == "GatedRepo":
        page = f"https://huggingface.co/{repository}"
        hint = f"accept its terms on {page}, then log in with `hf auth login` or set HF_TOKEN"
        return StorageError(f"no access: its owner grants access only on request ({said})", hint=hint)
    if code == "RevisionNotFound":
        return StorageError(f"the repository has no such branch, tag or commit ({said})")
    if code == "DisabledRepo":
        return StorageError(f"the Hub has disabled this repository ({said})")
    if status == 401 and not code:
        hint = "log in again with `hf auth login`, or set another HF_TOKEN"
        return StorageError(f"the Hub rejected the access token: it is wrong or expired ({said})", hint=hint)
    if status in (401, 403, 404):
        return StorageError(f"no such repository or revision, or no access to it ({said})", hint=_LOGIN)
    return StorageError(f"the Hub cannot be read ({said})")
