"""Signals are held back while outputs are made and removed, and handled afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraformat.storage import stage
from loraformat.storage.local.interrupts import Deferral


class Struck(Exception):
    """Raised by the handler."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    def strike(number: int, frame: object) -> None:
        raise Struck(number)

    before = {number: signal.signal(number, strike) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_until_the_end(number: int) -> None:
    steps = []

    def held() -> None:
        with Deferral():
            os.kill(os.getpid(), number)
            steps.append("went on")

    with pytest.raises(Struck):
        held()
    assert steps == ["went on"]
    with pytest.raises(Struck):
        os.kill(os.getpid(), number)


def test_inside_delivered_it_strikes_at_once_and_one_that_waited_strikes_first() -> None:
    steps = []

    def delivered(signals: Deferral, step: str, *numbers: int) -> None:
        with signals.delivered():
            for number in numbers:
                os.kill(os.getpid(), number)
            steps.append(step)

    with Deferral() as signals:
        with pytest.raises(Struck):
            delivered(signals, "not reached", signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Struck):
            delivered(signals, "not reached either")
        delivered(signals, "reached")
    assert steps == ["reached"]


@pytest.mark.parametrize("when", range(40))
def test_no_moment_leaves_anything_behind(tmp_path: Path, when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal at the n-th call that stage() makes, for each n: the output is whole or absent, nothing beside it."""
    calls = 0

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            result = real(*args, **kwargs)
            calls += 1
            if calls == when + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("open", "mkdir", "rename", "unlink", "fsync", "close", "listdir", "pwrite"):
        counted(name)
    struck = False
    try:
        with stage(str(tmp_path / "out"), overwrite=False) as store:
            for name in ("a", "b"):
                with store.create(name, 3) as writer:
                    writer.write(b"abc")
    except Struck:
        struck = True
    monkeypatch.undo()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left in ([], ["out"])
    if left:
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert struck or left == ["out"]
