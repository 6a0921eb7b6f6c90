"""How commands report that they cannot do what was asked: exit codes, and refusals as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from loraformat.errors import (
    AdapterRefused,
    AssumptionContradicted,
    LoraFormatError,
    MergeError,
    OutOfResources,
    UnsupportedUpdate,
    UsageError,
)

if TYPE_CHECKING:
    from loraformat.diagnostics import Finding
    from loraformat.report import Report

# The first class that fits decides; the same in every output format.
EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (UsageError, 2),
    (AdapterRefused, 1),
    (MergeError, 1),
    (UnsupportedUpdate, 1),
    (LoraFormatError, 3),
    (OSError, 3),
    (KeyboardInterrupt, 130),
)
INTERNAL_ERROR = 70
LONGEST_FAULT = 2000

# In the context's meta: whether JSON was asked for, whether stdout has it already, and the context of the command.
WANTS_JSON = "loraformat.wants_json"
PRINTED = "loraformat.printed"
COMMAND = "loraformat.command"
# The findings that stderr has already.
ANNOUNCED = "loraformat.announced"


def exit_code_of(error: BaseException) -> int | None:
    """The exit code for an error; None for one that nobody expected."""
    return next((number for kind, number in EXIT_CODES if isinstance(error, kind)), None)


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether a command line has `--format json` before its `--`; the last `--format` decides, as click has it."""
    found = ""
    previous = ""
    for argument in arguments:
        if argument == "--":
            break
        if previous == "--format":
            found = argument
        elif argument.startswith("--format="):
            found = argument.partition("=")[2]
        previous = argument
    return found == "json"


def print_json(ctx: click.Context | None, findings: Iterable[Finding]) -> None:
    """A refusal on stdout as a report with its findings, where JSON was asked for and nothing else was printed."""
    meta = {} if ctx is None else ctx.find_root().meta
    if not meta.get(WANTS_JSON) or meta.get(PRINTED):
        return
    from loraformat.report import render

    command = meta.get(COMMAND) or (ctx if ctx is not None and ctx.parent else None)
    sys.stdout.write(render(_refusal(command, tuple(findings)), "json"))
    sys.stdout.flush()


def _refusal(command: click.Context | None, findings: tuple[Finding, ...]) -> Report:
    """A report of a command that came to nothing; its subject is the first argument."""
    from loraformat.report import Report

    if command is None:
        return Report(job="", subject="", findings=findings)
    arguments = [param.name for param in command.command.params if isinstance(param, click.Argument)]
    value = command.params.get(arguments[0] or "") if arguments else None
    subject = value[0] if isinstance(value, tuple) and value else value
    return Report(
        job=command.command.name or "", subject=subject if isinstance(subject, str) else "", findings=findings
    )


def finding_of(error: BaseException, text: str) -> Finding:
    """The finding of an error; `text` says it where the error is not one of ours."""
    known = error if isinstance(error, LoraFormatError) else LoraFormatError(text)
    return known.finding()


def judge_each(
    job: str, adapters: Iterable[str], judge: Callable[[str], Report], known: Mapping[str, LoraFormatError]
) -> tuple[list[Report], list[LoraFormatError]]:
    """The report of each adapter, and what could not be opened: that is a report with the error as its finding.

    Args:
        known: adapter → its error, for those that are not asked for any more.

    Raises: UsageError, OutOfResources: the rest would end the same way.
    """
    reports: list[Report] = []
    errors: list[LoraFormatError] = []
    for adapter in adapters:
        report, error = _judged(job, adapter, judge, known.get(adapter))
        reports.append(report)
        errors += [error] if error else []
    return reports, errors


def _judged(
    job: str, adapter: str, judge: Callable[[str], Report], known: LoraFormatError | None
) -> tuple[Report, LoraFormatError | None]:
    from loraformat.report import Report

    try:
        if known is not None:
            raise known
        return judge(adapter), None
    except (UsageError, OutOfResources) as error:
        if not isinstance(error, AssumptionContradicted):
            raise
        return Report(job=job, subject=adapter, findings=(error.finding(),)), error
    except LoraFormatError as error:
        return Report(job=job, subject=adapter, findings=(error.finding(),)), error


def say_errors(errors: Sequence[LoraFormatError]) -> None:
    """Each error in a line on stderr."""
    for error in errors:
        say_error(error)


def say_error(error: LoraFormatError) -> None:
    """An error in a line on stderr, safe to print; a finding that was announced is not repeated."""
    from loraformat.diagnostics import show

    ctx = click.get_current_context(silent=True)
    announced = () if ctx is None else ctx.meta.get(ANNOUNCED, ())
    if isinstance(error, AdapterRefused) and error.findings:
        worst = max(error.findings, key=lambda finding: finding.severity)
        if worst in announced:
            reason = f"refused because of {worst.code} above; nothing was written"
            click.echo(f"error[{error.code}] {show(error.where, LONGEST_FAULT)}: {reason}", err=True)
            return
    click.echo(f"error[{error.code}] {show(error, LONGEST_FAULT)}", err=True)


def exit_code_of_all(errors: Sequence[LoraFormatError]) -> int:
    """The exit code of the errors of several adapters: what could not be read weighs more than what was refused."""
    return max((exit_code_of(error) or INTERNAL_ERROR for error in errors), default=0)
