"""loraformat inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loraformat.cli import completers, options
from loraformat.cli.refusals import exit_code_of_all, judge_each, say_errors

if TYPE_CHECKING:
    from loraformat.report import Report

# As loraformat.jobs.measure.figures.SORT_KEYS, which help must not import.
SORT_KEYS = (
    "weight",
    "norm",
    "relative_norm",
    "spectral_norm",
    "effective_rank",
    "stable_rank",
    "parameters",
    "retained_bf16",
)


@click.command("inspect")
@click.argument("adapters", shell_complete=completers.paths, nargs=-1, required=True, metavar="ADAPTER...")
@options.recursive
@options.base_values
@click.option("--norms", is_flag=True, help="Show ‖ΔW‖ of each weight; reads the factors.")
@click.option("--spectrum", is_flag=True, help="Show singular values and effective ranks; implies --norms.")
@click.option("--heat", is_flag=True, help="Draw a heat map in characters, module × layer; implies --norms.")
@click.option(
    "--sort",
    type=options.Choice(SORT_KEYS),
    default="weight",
    help="Order of the weights: by name, least retained first, or largest value first.",
)
@click.option(
    "--group",
    type=options.Choice(["auto", "module", "layer", "block", "none"]),
    default="auto",
    help="How to group weights in text output: by module if there are many (auto), by layer, by block of an image "
    "model (IN04, double 7), or not.",
)
@click.option(
    "--fail-on",
    type=options.Choice(["error", "warning", "never"]),
    default="never",
    help="Exit with 1 on findings of this severity or worse.  [default: never]",
)
@click.option(
    "--metadata", is_flag=True, help="Show the whole header of an image adapter, including its author's paths."
)
@options.partial
@options.alpha
@options.assume
@options.source_format
@options.jobs
@options.output_format
def command(
    adapters: tuple[str, ...],
    recursive: bool,
    base: str | None,
    norms: bool,
    spectrum: bool,
    heat: bool,
    sort: str,
    group: str,
    fail_on: str,
    metadata: bool,
    partial: bool,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    source_format: str | None,
    jobs: int | None,
    output_format: str,
) -> None:
    """Show what is in each ADAPTER (a folder or a file): format, ranks, scales, targets, parameters.

    Without --norms or --spectrum it reads only headers. A folder includes the adapters below it: checkpoints of a run,
    PEFT's subfolders. JSON about several adapters is a list of reports.

    inspect does not judge: it prints findings, including errors, and exits with 0. With --fail-on it exits with 1;
    `validate` runs every rule.
    """
    from loraformat.jobs.inputs.discovery import discover
    from loraformat.jobs.inspect import View, inspect
    from loraformat.report.terminal.text import progress

    view = View(sort=sort, group=group, heat=heat, metadata=metadata)

    def judge(adapter: str) -> Report:
        with progress(f"reading {base}") as advance:
            return inspect(
                adapter,
                base=base,
                norms=norms or heat,
                spectrum=spectrum,
                view=view,
                alpha=alpha,
                assumptions=options.assumptions(assume),
                format=source_format,
                partial=partial,
                jobs=options.threads(jobs),
                progress=advance,
            )

    discovery = discover(adapters, recursive=recursive, format=source_format)
    options.note(discovery.notes)
    reports, errors = judge_each("inspect", discovery.adapters, judge, discovery.errors)
    if errors and len(reports) == 1:
        raise errors[0]
    options.present_all(reports, output_format)
    if errors:
        if output_format != "text":
            say_errors(errors)
        click.get_current_context().exit(exit_code_of_all(errors))
    if fail_on != "never":
        from loraformat.diagnostics import Severity

        if any(report.reaches(Severity(fail_on)) for report in reports):
            click.get_current_context().exit(1)
