"""loraformat plot."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options


@click.command("plot")
@click.argument("adapters", shell_complete=completers.paths, nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="FILE",
    shell_complete=completers.paths,
    help="File to write: .html, or .svg, .png, .pdf with the extra [plot]. It appears complete or not at all.",
)
@options.base_values
@click.option(
    "--made-by",
    multiple=True,
    metavar="REPORT",
    shell_complete=completers.paths,
    help="JSON report of the command that wrote ADAPTER (resize, combine or extract with --format json): adds the "
    "error of each weight. Repeat for each ADAPTER, in the same order.",
)
@options.alpha
@options.assume
@options.source_format
@options.jobs
@options.overwrite
@options.output_format
def command(
    adapters: tuple[str, ...],
    out: str,
    base: str | None,
    made_by: tuple[str, ...],
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    source_format: str | None,
    jobs: int | None,
    overwrite: bool,
    output_format: str,
) -> None:
    """Plot each ADAPTER: norms by layer and module, singular values, a table; with --base, changes of the weights.

    Checkpoints of one run (checkpoint-100, checkpoint-200, …) are plotted over their steps.
    """
    from loraformat.jobs.plot import plot
    from loraformat.report.terminal.text import progress

    with progress(f"reading {base}") as advance:
        report = plot(
            adapters,
            out,
            base=base,
            alpha=alpha,
            assumptions=options.assumptions(assume),
            format=source_format,
            made_by=made_by,
            overwrite=overwrite,
            jobs=options.threads(jobs),
            progress=advance,
        )
    options.present(report, output_format)
