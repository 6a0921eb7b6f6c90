"""How rules are chosen, run and judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from loraformat.budget import Budget
from loraformat.diagnostics import Finding, FindingLocation, Severity
from loraformat.errors import AdapterRefused, InvalidHeader
from loraformat.formats.kit.findings import FINDINGS
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, RawFile
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import LowRank
from loraformat.rules import MOST_HITS, RULES, Hit, Subject, gate, is_selected, refuse, rule, run, select

EMPTY = Subject(bundle=Bundle("", {}), format="x", adapter=Adapter(config=AdapterConfig(), updates={}))


@rule("LF902", Severity.WARNING, since="0")
def two_hits(subject: Subject) -> Iterator[Hit]:
    """Two."""
    yield Hit("b", "second")
    yield Hit("a", "first", "hint")


@rule("LF901", Severity.ERROR, since="0", needs="base")
def wants_a_base(subject: Subject) -> Iterator[Hit]:
    """One."""
    yield Hit("", "never")


@rule("LF903", Severity.ERROR, since="0", slow=True)
def reads_values(subject: Subject) -> Iterator[Hit]:
    """One."""
    yield Hit("c", "deep")


MINE = (two_hits, wants_a_base, reads_values)


def zeros(*shape: int) -> LazyTensor:
    return LazyTensor(shape, DType.F32, lambda start, stop: pytest.fail("values are not needed"))


def error(code: str, severity: Severity = Severity.ERROR) -> Finding:
    return Finding(code=code, name="x", severity=severity, location=FindingLocation(subject="w"), message="m")


def test_findings_are_stamped_and_sorted_and_the_rest_is_explained() -> None:
    findings, skipped = run(EMPTY, MINE)
    assert [(found.where, found.code, found.name, found.hint) for found in findings] == [
        ("a", "LF902", "two-hits", "hint"),
        ("b", "LF902", "two-hits", ""),
    ]
    assert [(each.code, each.reason) for each in skipped] == [
        ("LF901", "no base was given"),
        ("LF903", "values are read only with --deep"),
    ]


def test_deep_runs_the_slow_ones_too() -> None:
    assert "LF903" in {found.code for found in run(EMPTY, MINE, deep=True)[0]}


def test_without_an_adapter_every_rule_about_one_is_skipped() -> None:
    findings, skipped = run(Subject(bundle=Bundle("", {}), format=""))
    assert not findings
    assert {each.reason for each in skipped} == {"the adapter could not be read"}


def test_rules_are_chosen_by_prefix() -> None:
    codes = {each.code for each in select(RULES, ["LF2", "LF301"], ["LF210"])}
    assert codes == {each.code for each in RULES if each.code.startswith("LF2")} - {"LF210"} | {"LF301"}
    assert select(RULES) == RULES
    assert is_selected("LF202", ["LF2"], [])
    assert not is_selected("LF202", [], ["LF20"])


def test_codes_are_unique_and_of_their_family() -> None:
    codes = [each.code for each in RULES]
    assert len(codes) == len(set(codes))


def finding_with(code: str) -> Finding:
    """One of the rule, the note or the error that has the code."""
    rules = {each.code: each for each in RULES}
    kinds = {each.code: each for each in FINDINGS}
    if code in rules:
        return rules[code].finding(Hit("w", "m"))
    if code in kinds:
        return replace(error(code), severity=kinds[code].severity, forgivable=kinds[code].forgivable)
    return InvalidHeader("m", where="w").finding()


@pytest.mark.parametrize("code", ["LF103", "LF204", "LF210", "LF225", "LF505", "LF602"])
def test_force_forgives(code: str) -> None:
    assert refuse([finding_with(code)], "a", force=True)[0].severity is Severity.WARNING
    with pytest.raises(AdapterRefused):
        refuse([finding_with(code)], "a")


@pytest.mark.parametrize(
    "code", ["LF201", "LF202", "LF205", "LF206", "LF212", "LF213", "LF220", "LF301", "LF302", "LF402", "LF003"]
)
def test_force_never_forgives_what_cannot_be_computed(code: str) -> None:
    with pytest.raises(AdapterRefused) as caught:
        refuse([finding_with("LF103"), finding_with(code)], "a", force=True)
    assert [found.code for found in caught.value.findings] == [code]


def test_what_is_about_publishing_is_left_to_validate() -> None:
    text = b"---\nbase_model: a/b\n---\n"
    card = Bundle("", {"README.md": RawFile("README.md", len(text), lambda: text)})
    adapter = Adapter(
        config=AdapterConfig(base_model="c/d"), updates={"m.weight": (LowRank(zeros(4, 2), zeros(2, 4), 1),)}
    )
    subject = Subject(bundle=card, format="x", adapter=adapter)
    assert "LF507" not in {found.code for found in gate(subject)}
    assert "LF507" in {found.code for found in run(subject)[0]}


def test_warnings_pass() -> None:
    assert refuse([error("LF105", Severity.WARNING)], "a") == (error("LF105", Severity.WARNING),)


def test_the_gate_knows_the_notes_of_the_reader() -> None:
    note = error("LF201")
    noted = Adapter(config=AdapterConfig(), updates={}, notes=(note,))
    assert note in gate(Subject(bundle=Bundle("", {}), format="x", adapter=noted))


@rule("LF904", Severity.ERROR, since="0")
def a_flood(subject: Subject) -> Iterator[Hit]:
    """Many."""
    yield from (Hit(f"{number:06}", "one of many") for number in range(100_000))


def test_a_flood_of_one_kind_is_counted_and_not_listed() -> None:
    findings, _ = run(EMPTY, (a_flood,))
    assert len(findings) == MOST_HITS + 1
    assert f"and {100_000 - MOST_HITS} more like this" in [finding.message for finding in findings]


def unfinished() -> Subject:
    names = {f"layers.{number}.q_proj.weight": (LowRank(zeros(4, 2), zeros(2, 4), 1.0),) for number in range(50)}
    config = AdapterConfig(targets="(.?){900}q_proj", raw={"rank_pattern": {"[a-f]+x": 4}})
    return Subject(
        bundle=Bundle("", {}), format="peft", adapter=Adapter(config=config, updates=names), budget=Budget(20_000)
    )


def test_what_the_budget_of_a_run_leaves_out_is_a_finding_with_numbers() -> None:
    findings, _ = run(unfinished())
    told = {found.where: found.message for found in findings if found.code == "LF216"}
    assert (
        told["adapter_config.json: target_modules"]
        == "the pattern was not compared with 50 of 50 modules because that would take too long"
    )
    assert "1 pattern was skipped" in told["adapter_config.json: rank_pattern"]
    assert not [found for found in findings if found.code in ("LF208", "LF211")]


def test_what_is_left_out_is_told_where_that_rule_was_not_asked_for_too() -> None:
    """Otherwise `--select LF208` would be OK without having looked at every module."""
    findings, skipped = run(unfinished(), select(RULES, ["LF208"]))
    assert findings == ()
    (left_out,) = skipped
    assert left_out.code == "LF216"
    assert "target_modules: the pattern was not compared with 50 of 50 modules" in left_out.reason


def test_a_refusal_names_what_the_adapter_lacks_itself_first() -> None:
    """That no weight matches a base may follow from it."""
    errors = [finding_with(code) for code in ("LF301", "LF201", "LF206")]
    with pytest.raises(AdapterRefused, match=r"3 errors, first \[LF201\]"):
        refuse(errors, "adapter")
