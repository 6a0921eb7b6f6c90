"""What every rule is, against a list that is written by hand: severity, what it needs, what `--force` forgives."""

from __future__ import annotations

from loraformat.diagnostics import Severity
from loraformat.rules import RULES

ERRORS = {
    *("LF036", "LF103", "LF107", "LF108", "LF117"),
    *("LF202", "LF204", "LF205", "LF206", "LF210", "LF212", "LF213", "LF214", "LF220", "LF230", "LF231", "LF243"),
    *("LF301", "LF302", "LF305", "LF320", "LF402", "LF505"),
    *(f"LF{number}" for number in range(602, 627) if number != 625),
}
REMARKS = {
    *("LF031", "LF034", "LF109", "LF113", "LF114", "LF217"),
    *("LF252", "LF306", "LF310", "LF311", "LF314", "LF408", "LF502", "LF503", "LF508", "LF625"),
}
# What cannot be computed is not forgiven: no scale, no partner, factors or a weight of another shape, NaN, no weight.
UNFORGIVABLE = {
    "LF036",
    *("LF202", "LF205", "LF206", "LF212", "LF213", "LF220"),
    *("LF301", "LF302", "LF305", "LF402"),
}
PUBLISHING = {"LF106", "LF507", "LF509", "LF512"}
# By family: files, config and tensors, the base, values, metadata, runtimes.
NEEDS = {"LF0": "bundle", "LF1": "adapter", "LF2": "adapter", "LF3": "base", "LF4": "adapter", "LF5": "adapter"}
OTHER_NEEDS = {"LF038": "adapter", "LF305": "adapter", "LF406": "base", "LF501": "base", "LF506": "base"}


def test_severities() -> None:
    assert {rule.code for rule in RULES if rule.severity is Severity.ERROR} == ERRORS
    assert {rule.code for rule in RULES if rule.severity is Severity.INFO} == REMARKS


def test_force_forgives_errors_of_what_can_still_be_computed() -> None:
    assert {rule.code for rule in RULES if rule.forgivable} == ERRORS - UNFORGIVABLE


def test_four_rules_are_about_publishing() -> None:
    assert {rule.code for rule in RULES if rule.publishing} == PUBLISHING


def test_rules_about_values_are_the_slow_ones() -> None:
    assert {rule.code for rule in RULES if rule.slow} == {rule.code for rule in RULES if rule.code.startswith("LF4")}


def test_what_each_rule_needs() -> None:
    needs = {**NEEDS, "LF6": "target"}
    for rule in RULES:
        assert rule.needs == OTHER_NEEDS.get(rule.code, needs[rule.code[:3]]), rule.code
