"""Every pair of the conversion matrix, over adapters of every kind: they agree, or the refusal says what hinders it."""

from __future__ import annotations

import pytest
from bundles import bundle, loaded
from samples import IMAGES
from sources import BY_HAND, KINDS, adapters, needs_of, options_for, spelled
from test_conversions import FOLDED, assert_same_model
from test_every_format import read

from loraformat import formats
from loraformat.diagnostics import Severity
from loraformat.formats.kit.image.canonical import pipeline_of
from loraformat.jobs.formats import matrix
from loraformat.model.adapter import Adapter

MATRIX = matrix()
TARGETS = list(next(iter(MATRIX.values())))
# What a target refuses besides the kinds of the matrix, by words of its refusal.
BESIDES = {
    ("gguf", "tied head"): "a tied table that llama.cpp loads only once",
    ("gguf", "fused"): "GPTNeoXForCausalLM",
}
OTHER_MODEL = {
    **dict.fromkeys(IMAGES, "image or video model"),
    **dict.fromkeys(("gguf", "litgpt"), "cannot be written as"),
}


def read_source(source: str, kind: str, adapter: Adapter) -> Adapter | None:
    """The adapter as it comes out of a format's reader; None where the format has no way to say it."""
    files = spelled(source, kind, adapter)
    if files is None:
        return None
    found, _ = formats.detect(files)
    assert source == found.NAME
    return found.read(files)


@pytest.mark.parametrize("source", [name for name in MATRIX if name != "xlabs"])
def test_every_pair_agrees_or_says_what_hinders_it(source: str) -> None:
    said = set()
    for kind, wanted in adapters(source).items():
        found = read_source(source, kind, wanted)
        if found is not None:
            said.add(kind)
            assert_same_model(found, wanted, rtol=FOLDED)
            for target in TARGETS:
                check_pair(source, target, kind, found)
    held = set(formats.get(source).HOLDS)
    expected = {kind for kind in adapters(source) if needs_of(kind) <= held and (source, kind) not in BESIDES}
    assert expected <= said
    assert said & {"LoRA", "LoRA without q and k", "square"}


def check_pair(source: str, target: str, kind: str, adapter: Adapter) -> None:
    """That a conversion agrees, or is refused where the matrix says so, with the weight and the kind of update."""
    each, options, case = formats.get(target), options_for(kind), (source, target, kind)
    errors = [loss for loss in each.losses(adapter, options) if loss.severity is Severity.ERROR]
    is_for_images = pipeline_of(adapter) is not None
    is_stranger = target in (("gguf", "litgpt") if is_for_images else IMAGES)
    refused = MATRIX[source][target]
    assert refused is not None or is_stranger, case
    hinders = OTHER_MODEL[target] if is_stranger else BESIDES.get((target, kind), "")
    if is_stranger or hinders or needs_of(kind) & set(refused or ()):
        assert {loss.code for loss in errors} == {"LF702"}, case
        assert all(loss.where in ("", *adapter.updates) for loss in errors), case
        assert hinders in " ".join(loss.message for loss in errors), (case, errors)
        return
    assert not errors, (case, errors)
    written = bundle(loaded(each.write(adapter, options)))
    found, _ = formats.detect(written)
    assert target == found.NAME, case
    assert_same_model(found.read(written), adapter, rtol=2 * FOLDED)


def test_every_format_is_a_source() -> None:
    assert MATRIX.keys() == {each.NAME for each in formats.FORMATS}
    assert BY_HAND.keys() == {each.NAME for each in formats.FORMATS if not each.WRITES} - {"xlabs"}
    assert len(KINDS) == 10
    for target in TARGETS:
        check_pair("xlabs", target, "LoRA", read("xlabs/tiny-flux"))
