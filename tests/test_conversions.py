"""The conversion matrix: every fixture into every format that writes, read again, equal, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundles import bundle, loaded
from oracle import dense
from samples import IMAGES, SAMPLES, image_sample, sample
from strategies import lazy
from test_every_format import CASES, GOOD, WRITERS, options_of, read

from loraformat import formats
from loraformat.containers import open_bundle
from loraformat.diagnostics import Severity
from loraformat.formats import native
from loraformat.formats.kit.base import CONTENTS, Hints
from loraformat.formats.kit.image.canonical import pipeline_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.updates import LowRank, Magnitude, Replace, Rows

NAMES = [each.NAME for each in formats.FORMATS if each.WRITES]
OTHERS = [name for name in NAMES if name not in IMAGES]
WITH_SCALE = [case for case in CASES if "version-0-no-alpha" not in case]
SAME = [
    *("native/tiny-llama-pt", "native/version-0", "peft/tiny-llama", "mlx/tiny-llama", "loralib/tiny-llama"),
    *("litgpt/tiny-llama", "minlora/tiny-llama", "raschka/tiny-llama", "minimind/tiny-llama", "dump/tiny-llama"),
    *("tinker/tiny-llama", "torchtune/tiny-llama", "nemo/tiny-llama"),
]
FEWER = {"minimind": 2, "torchtune": 6}  # square layers only; all but q, whose order of rows depends on the base
FOLDED = 2.0**-22  # a float32 factor is rounded once when it is folded, and sums of two ranks follow


def assert_same_model(found: Adapter, wanted: Adapter, *, rtol: float = 1e-14) -> None:
    """Equal changes of every weight, in float64; what adds nothing changes none."""
    assert [weight for weight in found.updates if weight in wanted.updates] == list(wanted.updates)
    added = [update for weight in found.updates.keys() - wanted.updates.keys() for update in found.updates[weight]]
    assert not any(update.up.load().any() for update in added)
    for weight, updates in wanted.updates.items():
        for one, other in zip(found.updates[weight], updates, strict=True):
            assert type(one) is type(other)
            if isinstance(other, (Replace, Rows)):
                values = "value" if isinstance(other, Replace) else "values"
                assert torch.equal(getattr(one, values).torch(), getattr(other, values).torch())
                assert one.follows_tie == other.follows_tie
                continue
            exact = dense(other)
            torch.testing.assert_close(dense(one), exact, rtol=rtol, atol=rtol * float(exact.abs().max()))
            if isinstance(other, LowRank) and other.magnitude is not None:
                assert torch.equal(one.magnitude.vector.torch(), other.magnitude.vector.torch())


@pytest.mark.parametrize(("target", "container"), WRITERS)
@pytest.mark.parametrize("case", WITH_SCALE)
def test_a_fixture_survives_every_format_or_is_refused_by_name(case: str, target: str, container: str) -> None:
    adapter, each = read(case), formats.get(target)
    losses = list(each.losses(adapter, options_of(container)))
    errors = [loss for loss in losses if loss.severity is Severity.ERROR]
    if errors:
        lacking = set(formats.get(case.partition("/")[0]).READS) - set(each.HOLDS)
        is_image = pipeline_of(adapter) is not None
        is_stranger = (target in ("gguf", "litgpt")) if is_image else (target in IMAGES)
        assert lacking or target == "peft" or is_stranger, errors
        assert all(loss.code == "LF702" and loss.where in ("", *adapter.updates) for loss in errors)
        return
    written = bundle(loaded(each.write(adapter, options_of(container))))
    found, _ = formats.detect(written)
    assert target == found.NAME
    is_folded = any(loss.code in ("LF701", "LF704") for loss in losses)
    assert_same_model(found.read(written), adapter, rtol=FOLDED if is_folded else 1e-14)


@pytest.mark.parametrize("case", SAME)
def test_the_same_adapter_in_every_format(case: str) -> None:
    wanted, found = read("native/tiny-llama"), read(case)
    if case.partition("/")[0] not in ("native", "peft"):
        updates = {weight: each for weight, each in wanted.updates.items() if weight in found.updates}
        assert len(updates) == FEWER.get(case.partition("/")[0], 8)
        wanted = Adapter(config=wanted.config, updates=updates)
    assert_same_model(found, wanted)


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("target", NAMES)
def test_a_writer_holds_the_kinds_that_the_matrix_says(target: str, kind: str) -> None:
    each, adapter = formats.get(target), sample(kind)
    if target in IMAGES:
        adapter = image_sample(kind)
    errors = [loss for loss in each.losses(adapter, options_of()) if loss.severity is Severity.ERROR]
    assert not errors if kind in each.HOLDS else [loss.code for loss in errors] == ["LF702"]
    if not errors:
        assert_same_model(each.read(bundle(loaded(each.write(adapter, options_of())))), adapter)


def test_dora_of_an_embedding_has_another_axis_in_mlx() -> None:
    """MLX-LM takes norms of rows, PEFT of columns: neither can stand for the other."""
    factors = (lazy(9, 2), lazy(2, 3), 1.5)
    by_row = LowRank(*factors, Magnitude(lazy(9, seed=3), axis=1), is_embedding=True)
    by_column = LowRank(*factors, Magnitude(lazy(3, seed=3), axis=0), is_embedding=True)
    for update, holders in ((by_row, {"mlx"}), (by_column, {"native", "peft"})):
        adapter = Adapter(config=AdapterConfig(), updates={"model.embed_tokens.weight": (update,)})
        refused = {
            name
            for name in OTHERS
            if any(loss.code == "LF702" for loss in formats.get(name).losses(adapter, options_of()))
        }
        assert set(OTHERS) - refused == holders


def test_every_kind_has_a_sample_and_is_read_by_some_format() -> None:
    assert set(SAMPLES) == set(CONTENTS) == {kind for each in formats.FORMATS for kind in each.READS}
    assert all(set(each.HOLDS) <= set(each.READS) for each in formats.FORMATS)


def test_a_scale_that_nobody_states_is_not_written() -> None:
    case = "native/version-0-no-alpha"
    low_rank = read(case)
    kept = {weight: chain for weight, chain in low_rank.updates.items() if isinstance(chain[0], LowRank)}
    for target in OTHERS:
        found = list(formats.get(target).losses(replace(low_rank, updates=kept), options_of()))
        assert [each.code for each in found if each.severity is Severity.ERROR] == ["LF705"]
    hinted = native.read(open_bundle(str(GOOD / case)), hints=Hints(alpha=3))
    assert_same_model(hinted, read("native/version-0"))


@pytest.mark.parametrize("first", ["native", "peft"])
@pytest.mark.parametrize("second", ["native", "peft"])
def test_going_on_and_coming_back(first: str, second: str) -> None:
    adapter = read("native/version-0")
    for target in (first, second, "native"):
        adapter = formats.get(target).read(bundle(loaded(formats.get(target).write(adapter, options_of()))))
    assert_same_model(adapter, read("native/tiny-llama"))
    config = loaded(native.write(adapter))["lora_config.json"]
    assert (config["rank"], config["alpha"], config["vocab_size"]) == (2, 3, 20)


@pytest.mark.parametrize("first", OTHERS)
@pytest.mark.parametrize("second", OTHERS)
def test_two_conversions_give_what_one_gives(first: str, second: str) -> None:
    adapter = read("peft/rslora")
    for target in (first, second):
        adapter = formats.get(target).read(bundle(loaded(formats.get(target).write(adapter, options_of()))))
    rounds = "gguf" in (first, second)  # alpha is a float32 there
    assert_same_model(adapter, read("peft/rslora"), rtol=FOLDED if rounds else 1e-14)


@pytest.mark.parametrize("first", IMAGES)
@pytest.mark.parametrize("second", IMAGES)
def test_two_conversions_between_image_formats_give_what_one_gives(first: str, second: str) -> None:
    wanted = adapter = read("kohya/tiny-flux")
    for target in (first, second):
        adapter = formats.get(target).read(bundle(loaded(formats.get(target).write(adapter))))
    assert_same_model(adapter, wanted)


def test_the_matrix_covers_every_format() -> None:
    assert {Path(case).parts[0] for case in WITH_SCALE} == {each.NAME for each in formats.FORMATS}
