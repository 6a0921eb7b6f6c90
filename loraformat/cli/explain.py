"""loraformat explain."""

from __future__ import annotations

import click


@click.command("explain")
@click.argument("code", required=False)
def command(code: str | None) -> None:
    """Explain CODE, such as LF202: why it matters, an example, what to use instead. Without CODE, list all."""
    from loraformat.jobs.explain import explain, known_codes

    if code is None:
        for each, name, severity in known_codes():
            click.echo(f"{each}  {severity:<8} {name}")
        return
    page = explain(code.upper())
    if page is None:
        raise click.UsageError(f"{code} is no code; `loraformat explain` lists them")
    click.echo(page, nl=False)
