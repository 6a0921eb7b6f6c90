"""loraformat convert."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import options


@click.command("convert")
@click.argument("source")
@click.option("--to", required=True, metavar="FORMAT", help="Format to write: peft or native.")
@options.out
@options.source_format
@options.base
@options.alpha
@options.assume
@options.container
@click.option("--strict", is_flag=True, help="Refuse where anything would be lost.")
@options.force
@options.overwrite
@options.output_format
def command(
    source: str,
    to: str,
    out: str,
    source_format: str | None,
    base: str | None,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    container: str | None,
    strict: bool,
    force: bool,
    overwrite: bool,
    output_format: str,
) -> None:
    """Write the adapter SOURCE (a folder or a file) in another format. Losses are told before anything is written."""
    from loraformat.jobs.convert import convert
    from loraformat.report.text import progress

    with progress(f"writing {out}") as advance:
        report = convert(
            source,
            out,
            to=to,
            format=source_format,
            base=base,
            alpha=alpha,
            assumptions=options.assumptions(assume),
            container=options.CONTAINERS[container],
            strict=strict,
            force=force,
            overwrite=overwrite,
            announce=options.announce,
            progress=advance,
        )
    options.present(report, output_format, findings=False)
