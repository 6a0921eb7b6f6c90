"""loraformat demo."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import click

from loraformat.cli import completers


@click.command("demo")
@click.option(
    "-o",
    "--out",
    metavar="FOLDER",
    shell_complete=completers.paths,
    help="Folder for the example; default: a new temporary folder.",
)
@click.pass_context
def command(ctx: click.Context, out: str | None) -> None:
    """Inspect, validate, convert and merge a small generated example, and check the result."""
    from loraformat.diagnostics import show
    from loraformat.jobs.demo import compare, make_example, steps

    folder = out or tempfile.mkdtemp(prefix="loraformat-demo-")
    os.makedirs(folder, exist_ok=True)
    make_example(folder)
    group = ctx.find_root().command
    with _inside(folder):
        click.echo(
            "created base/ (a small Llama, bfloat16) and adapter/ (a hand-written .pt folder); to repeat the commands:"
        )
        click.echo(f"$ cd {show(shlex.quote(folder))}")
        for step in steps():
            click.echo(f"\n# {step.says}\n$ loraformat {shlex.join(step.arguments)}")
            sys.stdout.flush()
            code = group.main(list(step.arguments), prog_name="loraformat", standalone_mode=False, parent=ctx) or 0
            if code != step.exit_code:
                raise click.ClickException(f"the demo expected exit code {step.exit_code}, found {code}")
        click.echo(f"\ndemo: OK: {compare()}; the example stays in {show(folder)}")


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    """The folder as working directory, so that the commands are short."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
