"""loraformat demo."""

from __future__ import annotations

import shlex
import tempfile

import click


@click.command("demo")
@click.option("-o", "--out", metavar="FOLDER", help="Where to make the example; by default a new temporary folder.")
@click.pass_context
def command(ctx: click.Context, out: str | None) -> None:
    """Inspect, validate, convert and merge a small example that is made on the spot, and check the result."""
    from loraformat.jobs.demo import compare, make_example, steps

    folder = out or tempfile.mkdtemp(prefix="loraformat-demo-")
    make_example(folder)
    click.echo(f"made {folder}/base (a small Llama, bfloat16) and {folder}/adapter (a hand-written .pt folder)")
    group = ctx.find_root().command
    for step in steps(folder):
        click.echo(f"\n# {step.says}\n$ loraformat {shlex.join(step.arguments)}")
        code = group.main(list(step.arguments), prog_name="loraformat", standalone_mode=False) or 0
        if code != step.exit_code:
            raise click.ClickException(f"the demo expected exit code {step.exit_code}, found {code}")
    click.echo(f"\ndemo: OK: {compare(folder)}; the example stays in {folder}")
