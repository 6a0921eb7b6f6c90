"""Tasks on a Ray cluster: each in a worker process on some node, done again where the worker or its node dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from loraformat._version import __version__
from loraformat.diagnostics import show_address
from loraformat.errors import EngineError, StorageError, UsageError
from loraformat.extras import import_ray
from loraformat.machine import ENDING

if TYPE_CHECKING:
    from types import ModuleType

T = TypeVar("T")
R = TypeVar("R")

_CONNECT_S = 5.0
_RETRIES = 3
_POLL_S = 1.0
_STOP_S = 60.0
_IDLE_S = 600.0  # so long may a cluster have no node on which a task fits; one that grows by itself needs minutes
_ADDRESS = re.compile(r"(?:ray://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+):(?P<port>[0-9]{1,5})")
# What a client of HTTP/2 begins with, and an empty frame of settings (RFC 9113, 3.4 and 4.1).
_SETTINGS = 4
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])
# Names of variables that workers get, with commas; an asterisk at the end of one stands for any letters. Without it
# they get those by which boto3 and the Hub's tools reach a place as this process does: nodes have none of their own as
# a rule. Paths, such as that of a file of credentials, mean nothing on another machine.
_SENT = "LORAFORMAT_RAY_ENV"
_USUAL = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HF_ENDPOINT", "HF_TOKEN"),
)
_ITSELF = ("auto", "local")


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Workers of a Ray cluster, or of one that is started on this machine and ended with the run.

    Attributes:
        address: HOST:PORT, ray://HOST:PORT, "auto", or "local" for one of this machine.
    """

    address: str

    @classmethod
    def open(cls, address: str) -> RayEngine:
        """The cluster at an address; "" for that of RAY_ADDRESS, or else of this machine.

        Raises: MissingExtra (LF029): Ray is not installed. UsageError (LF021): not an address. EngineError (LF025):
            nothing listens there.
        """
        where = address or os.environ.get("RAY_ADDRESS", "") or "local"
        found = check_address(where)
        _settings()
        import_ray("--engine ray")
        if found is not None:
            _require_listener(where, found["host"].strip("[]"), int(found["port"]))
        return cls(where)

    def map_unordered(
        self, function: Callable[[T], R], items: Iterable[T], *, threads: int = 1, gpus: int = 0
    ) -> Generator[R, None, None]:
        """Results as they come. The first exception, or closing, cancels all tasks and waits until none runs.

        A task is done again, up to three times, where its worker or node dies; what it raises ends the run.

        Args:
            threads: processors that a task asks for, as far as any node has so many.
            gpus: GPUs that a task asks for.

        Raises: what a task raises; EngineError (LF025): no cluster, no node for a task, or workers that keep dying.
        """
        ray = import_ray("--engine ray")
        with _connected(ray, self.address):
            cpus = max(1, min(threads, _largest(ray, "CPU") or threads))
            if gpus and not _largest(ray, "GPU"):
                raise EngineError("no node of the cluster has a GPU", where=self._where, hint="--device cpu")
            call = ray.remote(_on_worker).options(
                name="loraformat.merge",
                num_cpus=cpus,
                num_gpus=gpus,
                max_retries=_RETRIES,
                scheduling_strategy="SPREAD",
            )
            settings = _settings_for_workers()
            pending = [call.remote(function, item, __version__, settings) for item in items]
            try:
                while pending:
                    done, pending = self._next(ray, pending, cpus, gpus)
                    with _signals_after():
                        results = [self._result(ray, one) for one in done]
                    yield from results
            finally:
                _cancel(ray, pending)

    @property
    def _where(self) -> str:
        return f"--engine ray={self.address}"

    def _next(self, ray: ModuleType, pending: list[Any], cpus: int, gpus: int) -> tuple[list[Any], list[Any]]:
        """At least one task that is done, and the others."""
        since = time.monotonic()
        while True:
            with _signals_after():
                done, left = ray.wait(pending, num_returns=1, timeout=_POLL_S)
                fits = bool(done) or (_largest(ray, "CPU") >= cpus and _largest(ray, "GPU") >= gpus)
            if done:
                return done, left
            if fits:
                since = time.monotonic()
            elif time.monotonic() - since > _IDLE_S:
                text = f"for {_IDLE_S:.0f} s no node had the {cpus} processors and {gpus} GPUs of a task"
                raise EngineError(text, where=self._where, hint="lower --jobs, or add nodes")

    def _result(self, ray: ModuleType, done: Any) -> Any:  # noqa: ANN401 - a reference, and what it leads to
        try:
            return ray.get(done)
        except ray.exceptions.RayTaskError as error:
            self._raise_cause(error)
        except ray.exceptions.RayError as error:
            first = str(error).strip().partition("\n")[0]
            text = f"a task failed {1 + _RETRIES} times because its worker died: {type(error).__name__}: {first}"
            raise EngineError(text, where=self._where, hint="the nodes may be short of memory") from None

    def _raise_cause(self, error: Any) -> NoReturn:  # noqa: ANN401 - of a library that may be absent
        cause = getattr(error, "cause", None)
        if isinstance(cause, ModuleNotFoundError) and (cause.name or "").partition(".")[0] == "loraformat":
            hint = f"install loraformat {__version__} on all of them"
            raise EngineError(
                "loraformat is not installed on the nodes of the cluster", where=self._where, hint=hint
            ) from None
        if isinstance(cause, Exception):
            raise cause from None
        raise EngineError(f"a task failed: {error}", where=self._where) from None


def check_address(address: str) -> re.Match[str] | None:
    """The host and port of an address; None for a cluster without. Raises: UsageError (LF021): not an address."""
    found = _ADDRESS.fullmatch(address)
    if address not in ("", *_ITSELF) and (found is None or not 0 < int(found["port"]) < 1 << 16):
        text = f"expected HOST:PORT, ray://HOST:PORT or auto, found {show_address(address)!r}"
        raise UsageError(text, where="--engine ray")
    return found


def _on_worker(function: Callable[[T], R], item: T, version: str, settings: dict[str, str]) -> R:
    """One task, in a worker; its errors name the node."""
    os.environ.update(settings)
    if version != __version__:
        text = f"the node has loraformat {__version__}, this is {version}"
        raise EngineError(text, where=socket.gethostname(), hint="install the same version on all nodes")
    try:
        return function(item)
    except StorageError as error:
        text = f"{error.message}, on node {socket.gethostname()}"
        hint = error.hint or "every node must see the inputs and the folder of the output: a shared folder, or a bucket"
        if "credentials" in error.message and not settings:
            hint += f"; if {_SENT} is set but names no variables, each node uses its own credentials"
        raise StorageError(text, where=error.location, hint=hint) from None


def _settings_for_workers() -> dict[str, str]:
    """The variables of the environment that workers get.

    They go with each task, and not by Ray's `runtime_env`, which the dashboard of a cluster shows.
    """
    named = os.environ.get(_SENT)
    wanted = _USUAL if named is None else [name.strip() for name in named.split(",") if name.strip()]
    return {
        name: value
        for name, value in os.environ.items()
        if any(name == one or (one.endswith("_*") and name.startswith(one[:-1])) for one in wanted)
    }


def _settings() -> None:
    """What Ray reads from the environment when it is imported or started."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def _require_listener(address: str, host: str, port: int) -> None:
    """Raises: EngineError (LF025): nothing listens there, or no server of gRPC; Ray itself would wait for minutes."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "1":
                connection.sendall(_GREETING)
                _require_settings(connection)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "start a cluster with `ray start --head`, or leave the address out to start one on this machine"
        raise EngineError(f"no Ray cluster answers at {address}: {reason}", where="--engine ray", hint=hint) from None


def _require_settings(connection: socket.socket) -> None:
    """Raises: OSError: what answers does not speak HTTP/2, whose servers begin with a frame of settings."""
    answer = b""
    while len(answer) < 9:
        more = connection.recv(9 - len(answer))
        if not more:
            raise OSError("something else listens there")
        answer += more
    if answer[3] != _SETTINGS:
        raise OSError("something else listens there")


@contextmanager
def _connected(ray: ModuleType, address: str) -> Iterator[None]:
    """A block in which this process drives a cluster; a connection that the caller has is used and kept."""
    if ray.is_initialized():
        yield
        return
    import logging

    more = {"include_dashboard": False} if address == "local" else {}
    where, is_ended = f"--engine ray={address}", False
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="loraformat", **more)
    except Exception as error:  # noqa: BLE001 - whatever its many layers raise
        first = str(error).strip().partition("\n")[0]
        raise EngineError(f"no connection to the Ray cluster: {first or type(error).__name__}", where=where) from None
    except SystemExit:  # what Ray's handler of SIGTERM raises
        is_ended = True
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
    try:
        if is_ended:
            signal.raise_signal(signal.SIGTERM)
            raise EngineError("no connection to the Ray cluster: Ray ended this process", where=where)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _signals_after() -> Iterator[None]:
    """A block of calls of Ray, after which signals are handled: what a handler raises inside of them is lost.

    Source: ray 2.60.0, `CoreWorker.wait` returns although a handler has raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    before: dict[int, Any] = {}
    for number in map(int, ENDING):
        handler = signal.getsignal(number)
        if handler is not None:
            before[number] = handler
            signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in noted:
            signal.raise_signal(number)


def _largest(ray: ModuleType, resource: str) -> int:
    """The most of a resource that any living node has."""
    return max((int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]), default=0)


def _cancel(ray: ModuleType, pending: list[Any]) -> None:
    """Stop tasks, and wait until none can write any more.

    Not by force: where a task ends while its worker is killed for it, Ray ends the driver.
    Source: ray 2.60.0, task_manager.cc, `CompletePendingTask`.
    """
    with suppress(Exception):
        for one in pending:
            ray.cancel(one)
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=_STOP_S)
