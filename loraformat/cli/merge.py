"""loraformat merge."""

from __future__ import annotations

import os
from typing import Any

import click

from loraformat.cli import options


@click.command("merge")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=STRENGTH]...")
@options.out
@options.alpha
@options.assume
@options.container
@click.option(
    "--jobs", type=click.IntRange(1, 256), default=None, help="Threads; by default as many as processors, at most 8."
)
@click.option(
    "--memory",
    type=options.size,
    metavar="SIZE",
    default="64MiB",
    show_default=True,
    help="For windows of the base; Python, torch and the adapters come on top.",
)
@click.option("--dry-run", is_flag=True, help="Plan and report, write nothing.")
@options.force
@options.overwrite
@options.output_format
def command(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    container: str | None,
    jobs: int | None,
    memory: int,
    dry_run: bool,
    force: bool,
    overwrite: bool,
    output_format: str,
) -> None:
    """Write BASE with every ADAPTER merged into it: W + Σ s·BA, in windows of rows, rounded once.

    ADAPTER=0.7 merges an adapter at that strength; a path that exists is taken as it is.

    BASE is a folder with safetensors, .bin shards or one .pt file. The output keeps its files, names and container.
    """
    from loraformat.jobs.merge import merge
    from loraformat.report.text import progress

    with progress(f"merging into {out}") as advance:
        report = merge(
            base,
            adapters,
            out,
            alpha=alpha,
            assumptions=options.assumptions(assume),
            container=options.CONTAINERS[container],
            jobs=jobs or min(8, os.cpu_count() or 1),
            memory_nbytes=memory,
            dry_run=dry_run,
            force=force,
            overwrite=overwrite,
            announce=options.announce,
            progress=advance,
        )
    options.present(report, output_format, findings=False)
