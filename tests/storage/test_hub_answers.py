"""What a Hub may answer: busy, cut, endless, encoded, bytes differ, a login page; the pauses are noted, not made."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import struct
from collections.abc import Callable

import pytest
from hub_server import COMMIT, Answer, Hub

from loraformat.errors import StorageError
from loraformat.storage.hub import HubStore


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def opened(hub: Hub, online: None, pauses: list[float]) -> HubStore:
    return HubStore("hf://org/base", endpoint=hub.endpoint, wait=pauses.append)


def status(code: int, **headers: str) -> Callable[[Answer], None]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer: answer.answer(code, b"busy", named)


def reset(answer: Answer) -> None:
    answer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answer.connection.close()
    answer.close_connection = True


def cut(answer: Answer) -> None:
    """Announces more bytes than it sends."""
    answer.send_response(206)
    answer.send_header("Content-Length", "10")
    answer.end_headers()
    answer.wfile.write(b"x" * 5)
    answer.close_connection = True


def part(body: bytes, **headers: str) -> Callable[[Answer], None]:
    return status_with(206, body, **headers)


def status_with(code: int, body: bytes, **headers: str) -> Callable[[Answer], None]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer: answer.answer(code, body, named)


BUSY = {
    "too many requests": status(429),
    "internal error": status(500),
    "bad gateway": status(502),
    "unavailable": status(503),
    "reset": reset,
    "cut": cut,
}


@pytest.mark.parametrize("fault", BUSY)
def test_what_passes_is_asked_for_again(hub: Hub, opened: HubStore, pauses: list[float], fault: str) -> None:
    hub.for_files = [BUSY[fault]] * 3
    assert opened.read("big.bin", 1_000_000, 10) == bytes(10)
    assert pauses == [1, 2, 4]


@pytest.mark.parametrize("fault", BUSY)
def test_what_does_not_pass_is_an_error_after_some_attempts(
    hub: Hub, opened: HubStore, pauses: list[float], fault: str
) -> None:
    hub.for_files = [BUSY[fault]] * 99
    with pytest.raises(StorageError, match="tried 8 times"):
        opened.read("big.bin", 1_000_000, 10)
    assert pauses == [1, 2, 4, 8, 8, 8, 8]


def test_the_list_of_files_is_asked_for_again_too(hub: Hub, online: None, pauses: list[float]) -> None:
    hub.faults = [status(503), reset, status(429, Retry_After="7")]
    assert "big.bin" in HubStore("hf://org/base", endpoint=hub.endpoint, wait=pauses.append).files()
    assert pauses == [1, 2, 7]


def test_the_pause_is_what_the_server_asks_for_up_to_a_minute(hub: Hub, opened: HubStore, pauses: list[float]) -> None:
    hub.for_files = [status(429, Retry_After="31"), status(503, Retry_After="Thu, 01 Jan 1970 00:00:00 GMT")]
    assert opened.read("big.bin", 1_000_000, 10) == bytes(10)
    assert pauses == [31, 0]
    hub.for_files = [status(429, Retry_After="3600")]
    with pytest.raises(StorageError, match="asks to wait 3600 s"):
        opened.read("big.bin", 1_000_000, 10)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 416])
def test_what_does_not_change_is_not_asked_for_again(
    hub: Hub, opened: HubStore, pauses: list[float], code: int
) -> None:
    hub.for_files = [status(code)]
    with pytest.raises(StorageError):
        opened.read("big.bin", 1_000_000, 10)
    assert pauses == []


def endless(answer: Answer) -> None:
    """A body without a length, as long as somebody reads."""
    answer.send_response(206)
    answer.send_header("Content-Range", "bytes 1000000-1000009/5000000")
    answer.end_headers()
    answer.close_connection = True
    with contextlib.suppress(OSError):
        while not answer.server.done.is_set():
            answer.wfile.write(bytes(1 << 16))


RANGE = "bytes 1000000-1000009/5000000"
WRONG = {
    "endless body": (endless, "more than the 10 bytes"),
    "bytes differ": (part(bytes(10), Content_Range="bytes 0-9/5000000"), "were requested, but the server sent"),
    "no range": (part(bytes(10)), "an unnamed range"),
    "no sense": (part(bytes(10), Content_Range="bytes ten"), "the server sent bytes ten"),
    "another size": (part(bytes(10), Content_Range="bytes 1000000-1000009/77"), "the Hub listed 5000000 bytes"),
    "gzip": (part(gzip.compress(bytes(10)), Content_Range=RANGE, Content_Encoding="gzip"), "encoded as gzip"),
    "a bomb": (
        part(gzip.compress(bytes(1 << 20)), Content_Range=RANGE, Content_Encoding="gzip"),
        "encoded as gzip",
    ),
    "login page": (status_with(200, b"<html>log in</html>", Content_Type="text/html; charset=utf-8"), "login page"),
    "whole file": (status_with(200, bytes(5_000_000)), "does not support range requests"),
    "redirection to itself": (None, "redirections"),
    "redirection to a file": (status(302, Location="file:///etc/passwd"), "redirection to file://"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_an_answer_to_something_else_is_refused(hub: Hub, opened: HubStore, pauses: list[float], fault: str) -> None:
    answer, message = WRONG[fault]
    hub.for_files = [answer] if answer else [status(302, Location=f"/org/base/resolve/{COMMIT}/big.bin")] * 99
    with pytest.raises(StorageError, match=message):
        opened.read("big.bin", 1_000_000, 10)
    assert pauses == []


def test_the_body_of_a_redirection_is_not_read(hub: Hub, opened: HubStore) -> None:
    def lengthy(answer: Answer) -> None:
        answer.send_response(302)
        answer.send_header("Location", f"/org/base/resolve/{COMMIT}/big.bin")
        answer.end_headers()
        answer.close_connection = True
        with contextlib.suppress(OSError):
            while not answer.server.done.is_set():
                answer.wfile.write(bytes(1 << 16))

    hub.for_files = [lengthy]
    assert opened.read("big.bin", 1_000_000, 10) == bytes(10)


def test_the_token_goes_to_no_other_host(hub: Hub, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "hf_secret", raising=False)
    tokens: list[str | None] = []

    def noted(answer: Answer) -> None:
        tokens.append(answer.headers.get("Authorization"))
        answer.answer(206, bytes(10), {"Content-Range": RANGE})

    def elsewhere(answer: Answer) -> None:
        tokens.append(answer.headers.get("Authorization"))
        port = answer.server.server_address[1]
        answer.answer(302, b"", {"Location": f"http://localhost:{port}/org/base/resolve/{COMMIT}/big.bin"})

    store = HubStore("hf://org/base", endpoint=hub.endpoint)
    hub.for_files = [elsewhere, noted]
    assert store.read("big.bin", 1_000_000, 10) == bytes(10)
    assert tokens == ["Bearer hf_secret", None]


@pytest.mark.parametrize("piece", [b"HTTP/1.1 206 Partial Content\r\nContent-Le", b"HTTP/1.1 206 OK\r\n\r\nxxx"])
def test_an_answer_that_does_not_come_to_its_end_is_given_up(hub: Hub, online: None, piece: bytes) -> None:
    """Within its headers or its body: what is limited is the time of the whole, not that between two bytes."""

    def stalled(answer: Answer) -> None:
        answer.wfile.write(piece)
        answer.server.done.wait()
        answer.close_connection = True

    store = HubStore("hf://org/base", endpoint=hub.endpoint, patience_s=0.2)
    hub.for_files = [stalled]
    with pytest.raises(StorageError, match="not complete after"):
        store.read("big.bin", 1_000_000, 10)


LISTS = {
    "a page": (b"<html>log in</html>", "text/html", "login page"),
    "no JSON": (b"log in", "text/plain", "not valid JSON"),
    "a key twice": (b'{"sha": "%s", "sha": "x"}' % COMMIT.encode(), "application/json", "twice"),
    "a list": (b"[]", "application/json", "did not name the commit"),
    "no commit": (b'{"sha": "main", "siblings": []}', "application/json", "did not name the commit"),
    "a commit that is none": (b'{"sha": ["a"]}', "application/json", "did not name the commit"),
    "deep": (b"[" * 100_000, "application/json", "not valid JSON"),
}


@pytest.mark.parametrize("fault", LISTS)
def test_a_list_of_files_that_is_none_is_refused(hub: Hub, online: None, fault: str) -> None:
    body, kind, message = LISTS[fault]
    hub.faults = [status_with(200, body, Content_Type=kind)]
    with pytest.raises(StorageError, match=message) as caught:
        HubStore("hf://org/base", endpoint=hub.endpoint)
    assert caught.value.where == "hf://org/base"


def test_entries_of_the_list_that_are_no_files_are_no_files(hub: Hub, online: None) -> None:
    siblings = [None, 3, {}, {"rfilename": "a"}, {"rfilename": 1, "size": 1}, {"rfilename": "b", "size": -1}]
    siblings += [{"rfilename": "c", "size": True}, {"rfilename": "d", "size": 4}]
    hub.faults = [status_with(200, json.dumps({"sha": COMMIT, "siblings": siblings}).encode())]
    assert HubStore("hf://org/base", endpoint=hub.endpoint).files() == {"d": 4}
