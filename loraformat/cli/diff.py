"""loraformat diff."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import options


@click.command("diff")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option(
    "--group",
    type=click.Choice(["auto", "module", "layer", "none"]),
    default="auto",
    help="Weights in text: by module where they are many (auto), by layer, or each.",
)
@click.option(
    "--tol",
    "tolerance",
    type=options.tolerance,
    default="0",
    help="|B - A| / |A| up to which a weight counts as equal.  [default: 0]",
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 where anything differs.")
@options.alpha
@options.assume
@options.jobs
@options.output_format
def command(
    before: str,
    after: str,
    group: str,
    tolerance: float,
    exit_code: bool,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    jobs: int | None,
    output_format: str,
) -> None:
    """Compare two adapters, or two checkpoints: config, names, values, and of how low a rank the change is.

    Adapters are compared by what they add to each weight, whatever their factors and formats.
    """
    from loraformat.jobs.diff import diff
    from loraformat.report.text import progress

    with progress(f"comparing {before}") as advance:
        report = diff(
            before,
            after,
            tolerance=tolerance,
            group=group,
            alpha=alpha,
            assumptions=options.assumptions(assume),
            jobs=options.threads(jobs),
            progress=advance,
        )
    options.present(report, output_format)
    if exit_code and not getattr(report.data, "is_equal", False):
        click.get_current_context().exit(1)
