"""loraformat validate."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import options


@click.command("validate")
@click.argument("adapter")
@options.base
@click.option("--deep", is_flag=True, help="Also run the rules that read values.")
@click.option(
    "--select", multiple=True, metavar="CODE", help="Run only rules with this code or prefix (LF2); repeatable."
)
@click.option("--ignore", multiple=True, metavar="CODE", help="Leave out rules with this code or prefix; repeatable.")
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "never"]),
    default="error",
    show_default=True,
    help="Least severity that makes the exit code 1.",
)
@options.alpha
@options.assume
@options.source_format
@options.output_format
@click.pass_context
def command(
    ctx: click.Context,
    adapter: str,
    base: str | None,
    deep: bool,
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    fail_on: str,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    source_format: str | None,
    output_format: str,
) -> None:
    """Check ADAPTER (a folder or a file), alone or against its base. Exit code 1 where errors are found."""
    from loraformat.diagnostics import Severity
    from loraformat.jobs.validate import validate

    report = validate(
        adapter,
        base=base,
        deep=deep,
        alpha=alpha,
        assumptions=options.assumptions(assume),
        select=select,
        ignore=ignore,
        format=source_format,
    )
    options.present(report, output_format)
    if fail_on != "never" and report.reaches(Severity(fail_on)):
        ctx.exit(1)
