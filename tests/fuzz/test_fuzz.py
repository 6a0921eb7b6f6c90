"""A short run of every fuzz target, and all that was ever found, again. Long runs: tests/fuzz/run.py."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_targets import TARGETS, call, seeds
from run import FOUND, mutated

PAST = sorted(path for path in FOUND.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_read(name: str) -> None:
    assert seeds(name)
    for data in seeds(name):
        call(name, data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_mutation_of_a_good_input_is_read_or_refused(name: str, seed: int) -> None:
    chance, pool = random.Random(seed), seeds(name)
    call(name, mutated(chance.choice(pool), pool, chance))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    call(name, data)


@pytest.mark.parametrize("path", PAST, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_once_is_mended(path: Path) -> None:
    call(path.parent.name, path.read_bytes())
