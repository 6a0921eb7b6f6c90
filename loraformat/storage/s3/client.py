"""Requests to an S3 service through boto3, and its errors as StorageError.

boto3 is imported when the first address is opened, and nowhere else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from loraformat.diagnostics import show
from loraformat.errors import MissingExtra, StorageError

ATTEMPTS = 6  # of one request, with pauses that double: half a minute when every answer is a 503
_FEW = 3
_CONNECT_S = 10
# Between two bytes. A copy inside the store answers when it is done: a gibibyte may take minutes.
_SILENCE_S, _COPY_SILENCE_S = 20, 300
_MOST_CONNECTIONS = 96

_CREDENTIALS = "boto3 looks for AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role"
_REFUSED = frozenset(
    {
        *("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"),
        *("AuthorizationHeaderMalformed", "InvalidSecurity", "RequestTimeTooSkewed", "UnrecognizedClientException"),
    }
)
_DENIED = frozenset({"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"})
_BUSY = frozenset({"SlowDown", "ServiceUnavailable", "503", "RequestTimeout", "InternalError", "500", "Throttling"})
_ABSENT = frozenset({"NoSuchKey", "404", "NotFound"})
_CHANGED = frozenset({"PreconditionFailed", "412"})
CONFLICT = frozenset({*_CHANGED, "ConditionalRequestConflict", "409"})
_NO_COPIES = frozenset({"NotImplemented", "501", "MethodNotAllowed", "405", *_DENIED})
_NO_UPLOAD = frozenset({"NoSuchUpload", "404"})
_CUT = frozenset(
    {
        *("IncompleteReadError", "ResponseStreamingError", "ReadTimeoutError", "ProtocolError", "IncompleteRead"),
        *("ConnectionResetError", "BrokenPipeError", "TimeoutError"),
    }
)
_LIBRARIES = ("botocore", "boto3", "s3transfer", "urllib3", "awscrt")


@dataclass(frozen=True, slots=True)
class Client:
    """One service with one set of credentials, for any thread.

    Attributes:
        quick: the boto3 client for requests that are answered at once.
        patient: the one for those that the store works on.
        brief: the one for clearing up after an error, which must not take long.
        traits: what was learned of the service, by name.
    """

    quick: Any
    patient: Any
    brief: Any
    traits: dict[str, bool] = field(default_factory=dict)

    def hurried(self) -> Client:
        """The same service, with few attempts."""
        return replace(self, quick=self.brief, patient=self.brief)


_clients: list[Client] = []
_lock = threading.Lock()


def connected() -> Client:
    """The client of this process.

    Raises: MissingExtra (LF029): boto3 is not installed. StorageError: the configuration of boto3 is not usable.
    """
    with _lock:
        if not _clients:
            _clients.append(_connected())
        return _clients[0]


def _connected() -> Client:
    try:
        return _made()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("boto3", "botocore", "s3transfer"):
            raise
        raise MissingExtra("an s3:// address needs boto3", hint="pip install 'loraformat[s3]'") from None


def _made() -> Client:
    import boto3
    from botocore.config import Config

    options: dict[str, Any] = {
        "connect_timeout": _CONNECT_S,
        "max_pool_connections": _MOST_CONNECTIONS,
        # Sums in trailers are not understood everywhere; parts carry sums of their own.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    with as_storage_error("s3://"):
        session = boto3.Session()
        # Clients must be made by one thread; they may be used by many.
        made = [
            session.client(
                "s3",
                config=Config(
                    **options,
                    read_timeout=seconds,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                ),
            )
            for seconds, attempts in ((_SILENCE_S, ATTEMPTS), (_COPY_SILENCE_S, ATTEMPTS), (_SILENCE_S, _FEW))
        ]
    return Client(*made)


def code_of(error: BaseException) -> str:
    """What the service calls an error; "" where it is not one of the service."""
    response = getattr(error, "response", None)
    fields = response.get("Error") if isinstance(response, dict) else None
    return str(fields.get("Code", "")) if isinstance(fields, dict) else ""


def is_absent(error: BaseException) -> bool:
    """Whether there is no such object."""
    return code_of(error) in _ABSENT


def is_conflict(error: BaseException) -> bool:
    """Whether a condition of a write was not met."""
    return code_of(error) in CONFLICT


@contextmanager
def suppress_conflict() -> Iterator[None]:
    """A block whose condition need not be met."""
    try:
        yield
    except Exception as error:
        if not is_conflict(error):
            raise


def is_no_upload(error: BaseException) -> bool:
    """Whether there is no such upload (any more)."""
    return code_of(error) in _NO_UPLOAD


def refuses_copies(error: BaseException) -> bool:
    """Whether the service does not copy, or not for us."""
    return code_of(error) in _NO_COPIES


def is_cut(error: BaseException) -> bool:
    """Whether the body of an answer broke off."""
    return bool(_CUT & {type(each).__name__ for each in (error, error.__cause__, *error.args)})


@contextmanager
def as_storage_error(where: str) -> Iterator[None]:
    """A block in which errors of boto3 become a StorageError that names the address and the service's code.

    Their own texts are not repeated: they may quote headers, and with them what signs a request.
    """
    try:
        yield
    except StorageError as error:
        if error.where:
            raise
        raise StorageError(error.message, where=where, hint=error.hint) from error
    except MissingExtra:
        raise
    except Exception as error:
        is_theirs = type(error).__module__.startswith(_LIBRARIES) or isinstance(error, (OSError, ValueError))
        if not is_theirs:
            raise
        raise _translated(error, where) from None


def _translated(error: Exception, where: str) -> StorageError:
    code, kind = code_of(error), type(error).__name__
    if code:
        return _of_service(code, where)
    if kind in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"):
        return StorageError(f"no credentials ({kind})", where=where, hint=_CREDENTIALS)
    if isinstance(error, ValueError):
        text = "boto3 cannot send the request: check its address, and the credentials for line breaks"
        return StorageError(f"{text} ({kind})", where=where)
    return StorageError(f"the store cannot be reached ({kind})", where=where, hint="check AWS_ENDPOINT_URL")


def _of_service(code: str, where: str) -> StorageError:
    said = show(code, 60)
    if code == "NoSuchBucket":
        return StorageError(f"no such bucket ({said})", where=where)
    if code in _ABSENT:
        return StorageError(f"no such object ({said})", where=where)
    if code in _CHANGED:
        return StorageError(f"the object changed while it was in use ({said})", where=where)
    if code in _REFUSED:
        return StorageError(f"the service rejected the credentials ({said})", where=where, hint=_CREDENTIALS)
    if code in _DENIED:
        return StorageError(f"access denied ({said})", where=where, hint=_CREDENTIALS)
    if code in _BUSY:
        return StorageError(f"the store is busy, tried {ATTEMPTS} times ({said})", where=where, hint="try again later")
    return StorageError(f"the store refused the request ({said})", where=where)
