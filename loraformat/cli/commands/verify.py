"""loraformat verify and loraformat card: the manifest and the model card of an output."""

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
    help="The base of the merge, to compare the copied tensors with.",
)
@options.jobs
@options.output_format
@click.pass_context
def command(ctx: click.Context, out: str, base: str | None, jobs: int | None, output_format: str) -> None:
    """Check the merged checkpoint OUT against the manifest that merge wrote. Exit code 1 if it differs.

    Every byte is compared with a digest taken while it was written; bytes without a digest are reported.
    """
    from loraformat.jobs.verify import verify

    report = verify(out, base=base, jobs=options.threads(jobs))
    options.present(report, output_format)
    if not report.ok:
        ctx.exit(1)


@click.command("card")
@click.argument("path", shell_complete=completers.paths)
@click.option("-o", "--out", metavar="FILE", shell_complete=completers.paths, help="File to write; default: stdout.")
@click.option(
    "--base",
    metavar="BASE",
    shell_complete=completers.paths,
    help="The base; the card takes over its name, license, language and task.",
)
@click.option("--name", metavar="OWNER/NAME", help="Name under which others load it; default: the one in the address.")
@options.output_format
def card(path: str, out: str | None, base: str | None, name: str | None, output_format: str) -> None:
    """Write the model card (README.md) of the adapter, merged or quantized model PATH.

    Text outside the marked part stays, and so do fields of the front matter that a person set.
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
