"""loraformat verify and loraformat card: what stands beside an output, for programs and for people."""

from __future__ import annotations

import sys

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


@click.command("card")
@click.argument("path", shell_complete=completers.paths)
@click.option("-o", "--out", metavar="FILE", shell_complete=completers.paths, help="File to write; stdout by default.")
@click.option(
    "--base",
    metavar="BASE",
    shell_complete=completers.paths,
    help="The base: its name, license, language and task are those of the card.",
)
@click.option("--name", metavar="OWNER/NAME", help="Under which others load it; by default that of the address.")
@options.output_format
def card(path: str, out: str | None, base: str | None, name: str | None, output_format: str) -> None:
    """Write the model card (README.md) of the adapter, merged or quantized model PATH.

    What a person wrote outside of the marked part, and fields of the front matter that a person set, stay.
    """
    from loraformat.diagnostics import show
    from loraformat.jobs.card.verb import card as run
    from loraformat.model.results.verbs import CardResult

    report = run(path, out, base=base, name=name)
    if out is not None or output_format == "json":
        options.present(report, output_format)
        return
    assert isinstance(report.data, CardResult)
    options.announce(report.findings)
    # It may hold what a stranger wrote: a pipe gets its bytes, a terminal nothing that it would act on.
    text = report.data.text
    lines = (f"{show(line, len(line) + 1)}\n" for line in text.splitlines())
    options.say("".join(lines) if sys.stdout.isatty() else text)
