"""How many threads a command takes when nobody says."""

from __future__ import annotations

import os

import pytest

from loraformat.cli import options


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU sets")
@pytest.mark.parametrize(("usable", "threads"), [(1, 1), (3, 3), (100, 100), (1000, 256)])
def test_a_merge_takes_the_processors_it_may_use(monkeypatch: pytest.MonkeyPatch, usable: int, threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)))
    assert options.processors() == threads


@pytest.mark.parametrize(("count", "threads"), [(16, 16), (None, 1)])
def test_without_cpu_sets_all_processors_count(
    monkeypatch: pytest.MonkeyPatch, count: int | None, threads: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert options.processors() == threads
