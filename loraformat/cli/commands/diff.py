"""loraformat diff."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options

EXIT_ON = ("never", "values", "metadata", "any")


@click.command("diff")
@click.argument("before", shell_complete=completers.paths, metavar="A")
@click.argument("after", shell_complete=completers.paths, metavar="B")
@click.option(
    "--group",
    type=options.Choice(["auto", "module", "layer", "none"]),
    default="auto",
    help="How to group weights in text output: by module if there are many (auto), by layer, or not.",
)
@click.option(
    "--tol",
    "tolerance",
    type=options.tolerance,
    default="0",
    help="Weights are equal if |B - A| / |A| is at most this.  [default: 0]",
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 if anything differs; short for --exit-on any.")
@click.option(
    "--exit-on",
    type=options.Choice(EXIT_ON),
    default="never",
    help="Exit with 1 if values differ, if metadata differ, or in either case.  [default: never]",
)
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
    exit_on: str,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    jobs: int | None,
    output_format: str,
) -> None:
    """Compare two adapters or two checkpoints: config, names, values, and the effective rank of the change.

    Adapters are compared by what they add to each weight, whatever their factors and formats. Values and metadata (the
    config) are judged separately: after a lossless conversion the values are equal, while the metadata may differ.
    """
    from loraformat.jobs.diff import diff
    from loraformat.report.terminal.text import progress

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
    if _differs(report.data, "any" if exit_code else exit_on):
        click.get_current_context().exit(1)


def _differs(result: object, what: str) -> bool:
    from loraformat.model.results.differences import DiffResult

    assert isinstance(result, DiffResult)
    verdicts = {
        "never": True,
        "values": result.has_equal_values,
        "metadata": result.has_equal_metadata,
        "any": result.is_equal,
    }
    return not verdicts[what]
