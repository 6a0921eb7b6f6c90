"""loraformat inspect."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import options


@click.command("inspect")
@click.argument("adapter")
@options.base
@click.option("--norms", is_flag=True, help="Add ‖s·BA‖ of each weight; reads the factors.")
@options.alpha
@options.assume
@options.source_format
@options.output_format
def command(
    adapter: str,
    base: str | None,
    norms: bool,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    source_format: str | None,
    output_format: str,
) -> None:
    """Show what is in ADAPTER (a folder or a file): format, ranks, scales, targets, parameters. Reads headers only."""
    from loraformat.jobs.inspect import inspect

    report = inspect(
        adapter, base=base, norms=norms, alpha=alpha, assumptions=options.assumptions(assume), format=source_format
    )
    options.present(report, output_format)
