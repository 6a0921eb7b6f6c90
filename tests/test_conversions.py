"""The conversion matrix: every fixture into every format that writes, read again, equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import bundle, loaded
from oracle import dense
from test_every_format import CASES, GOOD, read

from loraformat import formats
from loraformat.containers import open_bundle
from loraformat.diagnostics import Severity
from loraformat.formats import native
from loraformat.formats.base import Hints, WriteOptions
from loraformat.model.adapter import Adapter
from loraformat.model.updates import LowRank, Replace, Rows

WRITERS = [each.NAME for each in formats.FORMATS if each.WRITES]
WITH_SCALE = [case for case in CASES if "no-alpha" not in case]
SAME = ["native/tiny-llama-pt", "native/version-0", "peft/tiny-llama", "dump/tiny-llama"]


def assert_same_model(found: Adapter, wanted: Adapter) -> None:
    """Equal changes of every weight, in float64."""
    assert list(found.updates) == list(wanted.updates)
    for weight, updates in wanted.updates.items():
        for one, other in zip(found.updates[weight], updates, strict=True):
            assert type(one) is type(other)
            if isinstance(other, (Replace, Rows)):
                values = "value" if isinstance(other, Replace) else "values"
                assert torch.equal(getattr(one, values).load(), getattr(other, values).load())
                assert one.follows_tie == other.follows_tie
                continue
            torch.testing.assert_close(dense(one), dense(other), rtol=1e-14, atol=0)
            if isinstance(other, LowRank) and other.magnitude is not None:
                assert torch.equal(one.magnitude.vector.load(), other.magnitude.vector.load())


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize("target", WRITERS)
@pytest.mark.parametrize("case", WITH_SCALE)
def test_a_fixture_survives_every_format(case: str, target: str, container: str) -> None:
    adapter, each = read(case), formats.get(target)
    assert [found for found in each.losses(adapter) if found.severity > Severity.INFO] == []
    written = bundle(loaded(each.write(adapter, WriteOptions(container=container))))
    found, _ = formats.detect(written)
    assert target == found.NAME
    assert_same_model(found.read(written), adapter)


@pytest.mark.parametrize("case", SAME)
def test_the_same_adapter_in_every_format(case: str) -> None:
    wanted, found = read("native/tiny-llama"), read(case)
    if case.startswith("dump/"):
        updates = {weight: each for weight, each in wanted.updates.items() if weight in found.updates}
        assert len(updates) == 8
        wanted = Adapter(config=wanted.config, updates=updates)
    assert_same_model(found, wanted)


def test_a_scale_that_nobody_states_is_not_written() -> None:
    case = "native/version-0-no-alpha"
    for target in WRITERS:
        found = list(formats.get(target).losses(read(case)))
        assert [each.code for each in found] == ["LF705"]
    hinted = native.read(open_bundle(str(GOOD / case)), hints=Hints(alpha=3))
    assert_same_model(hinted, read("native/version-0"))


@pytest.mark.parametrize("first", WRITERS)
@pytest.mark.parametrize("second", WRITERS)
def test_going_on_and_coming_back(first: str, second: str) -> None:
    adapter = read("native/version-0")
    for target in (first, second, "native"):
        adapter = formats.get(target).read(bundle(loaded(formats.get(target).write(adapter))))
    assert_same_model(adapter, read("native/tiny-llama"))
    config = loaded(native.write(adapter))["lora_config.json"]
    assert (config["rank"], config["alpha"], config["vocab_size"]) == (2, 3, 20)


def test_the_matrix_covers_every_format() -> None:
    assert {Path(case).parts[0] for case in WITH_SCALE} == {each.NAME for each in formats.FORMATS}
