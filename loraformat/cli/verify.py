"""loraformat verify."""

from __future__ import annotations

import click

from loraformat.cli import options


@click.command("verify")
@click.argument("out")
@options.output_format
@click.pass_context
def command(ctx: click.Context, out: str, output_format: str) -> None:
    """Compare the merged checkpoint OUT with the manifest that was written into it. Exit code 1 where it differs."""
    from loraformat.jobs.verify import verify

    report = verify(out)
    options.present(report, output_format)
    if not report.ok:
        ctx.exit(1)
