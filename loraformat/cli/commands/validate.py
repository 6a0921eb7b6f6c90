"""loraformat validate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loraformat.cli import completers, options
from loraformat.cli.refusals import exit_code_of_all, judge_each, say_errors
from loraformat.errors import AssumptionContradicted, NothingChecked, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraformat.jobs.inputs.settings import Settings
    from loraformat.report import Report

# Findings that are mistakes on the command line.
_MISTAKES = (AssumptionContradicted.code, NothingChecked.code)
# As loraformat.report.FORMS has them; written out so that --help imports no report.
FORMS = ("text", "concise", "json", "jsonl", "github", "gitlab", "junit", "sarif", "markdown")


def report_file(value: str) -> tuple[str, str]:
    """FORM=FILE as (form, path)."""
    form, separator, path = value.partition("=")
    if not separator or form not in FORMS or not path:
        raise click.BadParameter(
            f"{value!r}: write FORM=FILE with one of the formats {', '.join(FORMS)}.{options.nearest_to(form, FORMS)}"
        )
    return form, path


def runtime(value: str) -> str:
    """NAME or NAME==VERSION of a runtime in the table."""
    from loraformat.rules.targets import names, parse

    try:
        parse(value)
    except ValueError as error:
        near = options.nearest_to(value.partition("==")[0], names())
        raise click.BadParameter(f"{value!r}: {error}.{near}") from error
    return value


@click.command("validate")
@click.argument("adapters", shell_complete=completers.paths, nargs=-1, required=True, metavar="ADAPTER...")
@options.recursive
@options.base
@click.option("--deep", is_flag=True, help="Also run the rules that read values.")
@click.option(
    "--target",
    type=runtime,
    multiple=True,
    metavar="RUNTIME",
    shell_complete=completers.runtimes,
    help="Runtime that must load it: vllm, peft==0.10 …; repeatable. `loraformat explain targets` lists all.",
)
@click.option(
    "--max-lora-rank", type=click.IntRange(min=1), help="Highest rank that the runtime is configured to allow."
)
@click.option(
    "--select",
    multiple=True,
    metavar="CODE",
    shell_complete=completers.codes,
    help="Run only rules with these codes or prefixes (LF2,LF301); repeatable.",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="CODE",
    shell_complete=completers.codes,
    help="Leave out rules with these codes or prefixes (LF503,LF105); repeatable.",
)
@click.option(
    "--fail-on",
    type=options.Choice(["error", "warning", "never"]),
    help="Exit with 1 on findings of this severity or worse.  [default: error]",
)
@options.alpha
@options.assume
@options.source_format
@click.option(
    "--format",
    "output_format",
    type=options.Choice(FORMS),
    default="text",
    is_eager=True,
    callback=options.remember,
    help="Format of the report on stdout.",
)
@click.option(
    "--report",
    "reports",
    type=report_file,
    metavar="FORM=FILE",
    shell_complete=completers.reports,
    multiple=True,
    help="Also write the report to a file, in any of the formats; repeatable.",
)
@click.option(
    "--config",
    metavar="FILE",
    shell_complete=completers.paths,
    help="Settings file; default: loraformat.toml or pyproject.toml of the project's root, never inside the adapters.",
)
@click.option("--isolated", is_flag=True, help="Ignore all settings files.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    adapters: tuple[str, ...],
    recursive: bool,
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    target: tuple[str, ...],
    max_lora_rank: int | None,
    fail_on: str | None,
    output_format: str,
    reports: tuple[tuple[str, str], ...],
    config: str | None,
    isolated: bool,
    **judged: Any,  # noqa: ANN401 - what is handed on to the job
) -> None:
    """Check each ADAPTER (a folder or a file), alone or against its base. Exit code 1 if there are errors.

    A config or weight file stands for its folder, so that hooks can pass the changed files. A folder includes the
    adapters below it: checkpoints of a run, PEFT's subfolders. If no rule ran on an adapter, for example because all
    selected rules need --base, the exit code is 2.
    """
    from loraformat.diagnostics import Severity
    from loraformat.jobs.inputs.discovery import discover

    discovery = discover(adapters, recursive=recursive, format=judged["source_format"])
    settings = _settings(config, isolated, (*adapters, *discovery.adapters))
    options.note(discovery.notes)
    with options.gc_paused():
        from loraformat.jobs.validate import validate

        def judge(adapter: str) -> Report:
            return validate(
                adapter,
                base=judged["base"],
                deep=judged["deep"],
                alpha=judged["alpha"],
                assumptions=options.assumptions(judged["assume"]),
                select=_each(select) or settings.select,
                ignore=(*settings.ignore, *_each(ignore)),
                reasons=settings.reasons_for(adapter),
                target=target or settings.target,
                max_lora_rank=max_lora_rank or settings.max_lora_rank,
                format=judged["source_format"],
            )

        found, errors = judge_each("validate", discovery.adapters, judge, discovery.errors)
    least = fail_on or settings.fail_on
    severity = None if least == "never" else Severity(least)
    unwritten = [error for form, path in reports if (error := _write_report(path, _rendered(found, form, severity)))]
    if errors and output_format == "text" and len(found) == 1:
        raise errors[0]
    if output_format in ("text", "json") and len(found) == 1:
        options.present(found[0], output_format)
    else:
        options.say(_rendered(found, output_format, severity))
    if unwritten:
        raise unwritten[0]
    if errors:
        if output_format != "text":
            say_errors(errors)
        ctx.exit(exit_code_of_all(errors))
    if any(finding.code in _MISTAKES for report in found for finding in report.findings):
        ctx.exit(2)
    if severity is not None and any(report.reaches(severity) for report in found):
        ctx.exit(1)


def _each(codes: Sequence[str]) -> tuple[str, ...]:
    """The codes of an option that was given several times, or once with commas."""
    return tuple(code for text in codes for code in text.split(","))


def _write_report(path: str, text: str) -> StorageError | None:
    """Write a report file; the error where that fails, so that the other reports are written all the same."""
    try:
        options.write_text(path, text)
    except StorageError as error:
        return error
    return None


def _settings(config: str | None, isolated: bool, judged: Sequence[str]) -> Settings:
    """The settings that hold; they are named on stderr, so that nobody takes a verdict for one without them."""
    from loraformat.diagnostics import show
    from loraformat.jobs.inputs.settings import Settings, find_settings, passed_over, read_settings

    if isolated:
        return Settings()
    if config is not None:
        settings = read_settings(config)
    else:
        settings = find_settings(".", judged)
        other = passed_over(".", settings)
        if other:
            said = "ignored: it is inside the adapters or outside of a project's root (--config names it)"
            click.echo(f"settings: {show(other)}: {said}", err=True)
    if settings.source:
        click.echo(f"settings: {show(settings.source)}", err=True)
    return settings


def _rendered(found: Sequence[Report], form: str, fail_on: Any) -> str:  # noqa: ANN401 - a Severity or None
    from loraformat.report import render_all

    pages = None
    if form == "sarif":
        from loraformat.jobs.explain import pages as known

        pages = known()
    return render_all(found, form, fail_on=fail_on, pages=pages)
