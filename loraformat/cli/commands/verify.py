"""loraformat verify."""

from __future__ import annotations

import click

from loraformat.cli import completers, options


@click.command("verify")
@click.argument("out", shell_complete=completers.paths)
@click.option(
    "--base",
    metavar="BASE",
    shell_complete=completers.paths,
    help="The base of the merge; what was copied from it is compared with it.",
)
@options.jobs
@options.output_format
@click.pass_context
def command(ctx: click.Context, out: str, base: str | None, jobs: int | None, output_format: str) -> None:
    """Compare the merged checkpoint OUT with what merge wrote about it. Exit code 1 where it differs.

    Every byte is compared with a digest that was made while it was written, or counted as not compared.
    """
    from loraformat.jobs.verify import verify

    report = verify(out, base=base, jobs=options.threads(jobs))
    options.present(report, output_format)
    if not report.ok:
        ctx.exit(1)
