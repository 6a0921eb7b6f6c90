"""explain: the page of a code, from the docstring of the rule, finding or error that has it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraformat import errors, rules
from loraformat.diagnostics import Severity, closest, show
from loraformat.errors import UsageError
from loraformat.formats.kit import findings, losses, repairs
from loraformat.merger.plan.findings import FINDINGS as MERGER_FINDINGS
from loraformat.rules import targets

_LONGEST = 40
_CODE_LENGTH = 5  # LF105


@dataclass(frozen=True, slots=True)
class Page:
    """What is known about one code."""

    code: str
    name: str
    severity: Severity
    text: str

    def markdown(self) -> str:
        """The page as docs/rules has it and `loraformat explain` prints it."""
        return f"# {self.code} {self.name}\n\nSeverity: {self.severity.value}\n\n{self.text}\n"


def pages() -> dict[str, Page]:
    """All pages by code, sorted: rules, notes and losses of formats, errors."""
    found = [*_rule_pages(), *_finding_pages(), *_error_pages()]
    by_code: dict[str, Page] = {}
    for page in found:
        by_code.setdefault(page.code, page)
    return dict(sorted(by_code.items()))


def explain(code: str) -> str | None:
    """The page of a code as Markdown, or None for an unknown code.

    >>> import loraformat
    >>> print(loraformat.explain("LF202").splitlines()[0])
    # LF202 rank-mismatch
    """
    page = pages().get(code)
    return page.markdown() if page else None


def known_codes() -> list[tuple[str, str, str]]:
    """(code, name, severity) of every page, sorted."""
    return [(page.code, page.name, page.severity.value) for page in pages().values()]


def checked_codes(texts: Sequence[str], where: str) -> tuple[str, ...]:
    """Codes and prefixes of codes in capitals: "lf105" is LF105, "LF2" stands for all that begin with it.

    Args:
        where: the option or setting, for the message.

    Raises: UsageError: no code is or begins like a text; the hint has the most similar one.
    """
    return tuple(_checked(text, where) for text in texts)


def _checked(text: str, where: str) -> str:
    code = text.upper()
    if code.startswith("LF") and any(each.startswith(code) for each in pages()):
        return code
    hint = nearest_to(text) or "`loraformat explain` lists all codes"
    raise UsageError(f'expected a code or its beginning, found "{show(text, _LONGEST)}"', where=where, hint=hint)


def nearest_to(text: str) -> str:
    """The code most similar to a text, "did you mean LF105 (missing-base-model)?", by code or name; "" for none."""
    known = pages()
    spelled = {page.name: page.code for page in known.values()} | {each: each for each in known}
    # Nobody means a code by its number: of one with another number only the beginning says something.
    is_code = re.fullmatch(r"(?i)lf\d+", text[:_LONGEST]) is not None
    near = text[:_CODE_LENGTH].upper() if is_code else closest(text[:_LONGEST].replace("_", "-"), spelled, 0.65)
    meant = spelled.get(near, "")
    return f"did you mean {meant} ({known[meant].name})?" if meant else ""


def known_targets() -> list[tuple[str, str]]:
    """(name, title and version) of every runtime of `--target`, sorted."""
    return [(name, targets.parse(name).label) for name in targets.names()]


def explain_target(name: str) -> str | None:
    """What a runtime refuses or ignores, as Markdown; None for an unknown name."""
    try:
        target = targets.parse(name)
    except ValueError:
        return None
    names = {rule.code: rule.name for rule in rules.RULES}
    rows = [
        " | ".join(
            (
                f"| {line.rule} {names[line.rule]}",
                line.verdict,
                _span(line),
                line.message,
                line.help,
                f"{line.source} |",
            )
        )
        for line in target.lines
    ]
    head = ["| rule | verdict | versions | message or behavior | what helps | source |", "|---|---|---|---|---|---|"]
    page = [f"# {target.label}", "", f"Reads: {', '.join(target.reads)}", "", *head, *rows]
    return "\n".join([*page, *_spelled(target)]) + "\n"


def _spelled(target: targets.Target) -> list[str]:
    """How well a program for image models loads each naming scheme; [] for another program."""
    if target.spellings is None:
        return []
    head = [
        "",
        "A spelling is the prefix of the module names, whose names they are (diffusers' or the original's), and the",
        "suffixes of the tensors. Spellings in neither column are rejected or load no module (LF622), or are untested",
        "(LF625).",
        "",
        "| model | loaded completely | loaded in part, or wrongly |",
        "|---|---|---|",
    ]
    rows = []
    for family, lines in target.spellings.lines.items():
        read = {key: line for key, line in lines.items() if not line.refuses and not line.ignores_all}
        whole = [key for key, line in read.items() if line == targets.SpellingLine()]
        part = [key for key in read if key not in whole]
        rows.append(f"| {family} | {_cell(whole)} | {_cell(part)} |")
    return [*head, *rows]


def _cell(keys: Sequence[str]) -> str:
    return "<br>".join(f"`{key}`" for key in keys) or "none"


def _span(line: targets.Line) -> str:
    bounds = [f"from {line.since}" if line.since else "", f"before {line.before}" if line.before else ""]
    return " ".join(bound for bound in bounds if bound) or "all"


def _rule_pages() -> Iterator[Page]:
    for rule in rules.RULES:
        yield Page(rule.code, rule.name, rule.severity, inspect.getdoc(rule.check) or "")


def _finding_pages() -> Iterator[Page]:
    for found in (*findings.FINDINGS, *losses.LOSSES, *repairs.REPAIRS, *MERGER_FINDINGS):
        yield Page(found.code, found.name, found.severity, found.page)


def _error_pages() -> Iterator[Page]:
    for error in _subclasses(errors.LoraFormatError):
        yield Page(error.code, error.name, Severity.ERROR, (inspect.getdoc(error) or "").partition("\n\nArgs:")[0])


def _subclasses(kind: type[errors.LoraFormatError]) -> Iterator[type[errors.LoraFormatError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _subclasses(each)
