"""loraformat unmerge."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options
from loraformat.cli.commands.algebra import shared


@click.command("unmerge")
@click.argument("merged", shell_complete=completers.paths)
@click.argument("adapters", shell_complete=completers.paths, nargs=-1, required=True, metavar="ADAPTER[=STRENGTH]...")
@options.out
@click.option(
    "--base",
    metavar="BASE",
    shell_complete=completers.paths,
    help="The original base: repeat the merge, compare it with MERGED, and write BASE, bit for bit.",
)
@options.alpha
@options.assume
@options.container
@shared.jobs
@click.option(
    "--memory",
    "memory_nbytes",
    type=options.size,
    metavar="SIZE",
    default="64MiB",
    show_default=True,
    help="Memory for windows of the model; Python and the adapters need more on top.",
)
@click.option(
    "--verify",
    type=options.Choice(["none", "sample", "full"]),
    default="sample",
    show_default=True,
    help="How much of the output to compare with an independent computation before moving it into place.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run to OUT.")
@options.distribution
@click.option("--dry-run", is_flag=True, help="Report how many values can be recovered; write nothing.")
@click.option("--strict", is_flag=True, help="Stop unless the output is proven to be the base.")
@options.force
@options.overwrite
@options.output_format
def unmerge(
    merged: str,
    adapters: tuple[str, ...],
    out: str,
    assume: tuple[tuple[str, Any], ...],
    container: str | None,
    jobs: int | None,
    resume: bool,
    engine: str,
    rank: int | None,
    finish: bool,
    dry_run: bool,
    output_format: str,
    **chosen: Any,  # noqa: ANN401 - as the function of the library has them
) -> None:
    """Undo a merge: write MERGED without every ADAPTER, and report whether the result is proven.

    ADAPTER=0.7 was merged at that strength. Without --base the updates are subtracted, and the values that rounding
    made ambiguous are counted.
    """
    from loraformat.jobs.weights.unmerge import unmerge as run
    from loraformat.report.terminal.text import progress

    divided = finish or rank is not None
    options.keep_partial_output(options.keeping(resume=resume, dry_run=dry_run, divided=divided))
    with progress(f"writing {out}") as advance:
        report = run(
            merged,
            adapters,
            out,
            assumptions=options.assumptions(assume),
            container=options.CONTAINERS[container],
            jobs=options.jobs_for(engine, jobs),
            resume=resume,
            engine=engine,
            rank=rank,
            finish=finish,
            dry_run=dry_run,
            publication=options.publication(out),
            announce=options.announce,
            progress=advance,
            **chosen,
        )
    options.present(report, output_format, findings=False)
