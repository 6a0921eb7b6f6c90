"""Errors cross processes with all they know, and every one has a code and a page."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

from loraformat.diagnostics import Finding, FindingLocation, Severity
from loraformat.errors import AdapterRefused, LoraFormatError


def classes(kind: type[LoraFormatError] = LoraFormatError) -> Iterator[type[LoraFormatError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from classes(each)


@pytest.mark.parametrize("kind", list(classes()), ids=lambda kind: kind.__name__)
def test_it_pickles_with_all_fields(kind: type[LoraFormatError]) -> None:
    error = kind("expected a, found b", where="file.json", hint="do c")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.where, copy.hint) == (error.message, error.where, error.hint)
    assert str(copy) == "file.json: expected a, found b (do c)"


def test_a_refusal_keeps_its_findings() -> None:
    finding = Finding(
        code="LF202", name="rank-mismatch", severity=Severity.ERROR, location=FindingLocation(subject="x"), message="y"
    )
    assert pickle.loads(pickle.dumps(AdapterRefused("no", findings=(finding,)))).findings == (finding,)


def test_codes_are_unique_and_well_formed() -> None:
    codes = [kind.code for kind in classes()]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"LF\d{3}", code) for code in codes)


@pytest.mark.parametrize("kind", list(classes()), ids=lambda kind: kind.__name__)
def test_it_is_explained(kind: type[LoraFormatError]) -> None:
    assert kind.__doc__
    assert "code" in vars(kind)
    assert "name" in vars(kind)


def test_an_error_becomes_a_finding() -> None:
    found = LoraFormatError("m", where="w", hint="h").finding()
    assert (found.code, found.severity, found.where, found.message, found.hint) == (
        "LF000",
        Severity.ERROR,
        "w",
        "m",
        "h",
    )
