"""What a writer of image formats writes is read back to the same deltas, for every family and every kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bundles import bundle, loaded
from image_models import FAMILIES, KINDS, adapter_of
from oracle import dense
from torch import Tensor

from loraformat import formats
from loraformat.diagnostics import Severity
from loraformat.formats.kit.base import Hints
from loraformat.model.adapter import Adapter
from loraformat.model.updates import LowRank, Update
from loraformat.naming.families import ORIGINAL, family_named

# What each format must hold; all else must be refused.
HELD = {
    "diffusers": {"linear", "mixed scales", "convolution", "dora by output", "bias"},
    "kohya": {"linear", "mixed scales", "convolution", "dora by output", "dora by input"},
    "comfy": set(KINDS),
    "lycoris": set(KINDS),
    "peft": {"linear", "mixed scales", "convolution", "dora by output", "bias"},
}


def shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {weight: tuple(chain[0].shape) for weight, chain in adapter.updates.items()}


def total(chain: tuple[Update, ...]) -> Tensor:
    """What a chain adds, as a matrix or a vector."""
    every = [dense(update) for update in chain]
    return sum(one.flatten(1) if one.ndim > 1 else one for one in every)


def assert_same_deltas(found: Adapter, wanted: Adapter, rtol: float) -> None:
    assert list(found.updates) == list(wanted.updates)
    for weight, chain in wanted.updates.items():
        one, other = total(found.updates[weight]), total(chain)
        scale = float(abs(other).max())
        np.testing.assert_allclose(one.reshape(other.shape), other, rtol=rtol, atol=rtol * scale, err_msg=weight)
        magnitudes = [[u.magnitude for u in each if isinstance(u, LowRank)] for each in (found.updates[weight], chain)]
        for mine, theirs in zip(*magnitudes, strict=True):
            assert (mine is None) is (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.axis == theirs.axis
                assert np.array_equal(mine.vector.load(), theirs.vector.load())


@pytest.mark.parametrize("target", HELD)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_come_back(family: str, kind: str, target: str) -> None:
    adapter, each = adapter_of(family_named(family), kind), formats.get(target)
    losses = list(each.losses(adapter))
    errors = [loss for loss in losses if loss.severity is Severity.ERROR]
    assert bool(errors) is (kind not in HELD[target]), errors[:2]
    if errors:
        assert {loss.code for loss in errors} == {"LF702"}
        return
    written = bundle(loaded(each.write(adapter)))
    assert formats.detect(written)[0].NAME in (target, "kohya" if target == "lycoris" else target)
    hints = Hints(weights=shapes(adapter), components=tuple({name.partition(".")[0] for name in adapter.updates}))
    # Scales that differ within a fused module, and products that do not part by rows, are rounded once to float32.
    rtol = 1e-6 if kind in ("mixed scales", "LoKr", "bias") else 1e-12
    assert_same_deltas(each.read(written, hints=hints), adapter, rtol)


@pytest.mark.parametrize("target", ["diffusers", "kohya", "comfy", "lycoris", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_with_all_modules_needs_no_base(family: str, target: str) -> None:
    adapter = adapter_of(family_named(family), "linear", is_whole_model=True)
    each = formats.get(target)
    found = each.read(bundle(loaded(each.write(adapter))))
    assert_same_deltas(found, adapter, 1e-12)
    assert found.config.pipeline is not None
    assert found.config.pipeline.family == family


@pytest.mark.parametrize("family", [name for name in FAMILIES if family_named(name).comfy == ORIGINAL])
def test_a_fused_module_that_was_split_gets_its_rank_back(family: str) -> None:
    """original → diffusers → original: the same shapes, and not three times the rank."""
    source = formats.get("comfy").write(adapter_of(family_named(family), "linear"))
    once = formats.get("comfy").read(bundle(loaded(source)))
    again = formats.get("comfy").read(bundle(loaded(formats.get("comfy").write(once))))
    assert_same_deltas(again, once, 1e-12)
    [first], [second] = (
        [file.open() for file in formats.get("comfy").write(one).files.values()] for one in (once, again)
    )
    assert {n: t.shape for n, t in first.entries.items()} == {n: t.shape for n, t in second.entries.items()}


def test_two_experts_need_a_format_with_components() -> None:
    one = adapter_of(family_named("wan"), "linear")
    both = dict(one.updates) | {f"transformer_2.{w.partition('.')[2]}": chain for w, chain in one.updates.items()}
    assert one.config.pipeline is not None
    pipeline = replace(one.config.pipeline, components=("transformer", "transformer_2"))
    pair = replace(one, updates=dict(sorted(both.items())), config=replace(one.config, pipeline=pipeline))
    for target in ("diffusers", "peft"):
        found = formats.get(target).read(bundle(loaded(formats.get(target).write(pair))))
        assert_same_deltas(found, pair, 1e-12)
    for target in ("kohya", "comfy", "lycoris"):
        errors = [loss for loss in formats.get(target).losses(pair) if loss.severity is Severity.ERROR]
        assert [loss.code for loss in errors] == ["LF702"]


def test_the_low_noise_expert_is_in_the_file_s_name() -> None:
    one = adapter_of(family_named("wan"), "linear")
    low = {f"transformer_2.{weight.partition('.')[2]}": chain for weight, chain in one.updates.items()}
    assert one.config.pipeline is not None
    pipeline = replace(one.config.pipeline, components=("transformer_2",))
    adapter = replace(one, updates=low, config=replace(one.config, pipeline=pipeline))
    written = formats.get("kohya").write(adapter)
    assert list(written.files) == ["lora_low_noise.safetensors"]
    assert "LF709" in [loss.code for loss in formats.get("kohya").losses(adapter)]
    assert_same_deltas(formats.get("kohya").read(bundle(loaded(written))), adapter, 1e-12)
