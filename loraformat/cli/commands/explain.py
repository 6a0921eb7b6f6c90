"""loraformat explain."""

from __future__ import annotations

import click

from loraformat.cli import completers, options


@click.command("explain")
@click.argument("code", required=False, shell_complete=completers.codes)
def command(code: str | None) -> None:
    """Explain CODE, such as LF202: why it matters, an example, what to do. Without CODE, list all.

    `explain LF2` lists the codes that begin with it. `explain targets` lists the runtimes of `validate --target`,
    `explain vllm` shows what is known about one.
    """
    from loraformat.jobs.explain import explain, explain_target, known_codes, known_targets, nearest_to

    prefix = "" if code is None else code.upper()
    listed = [line for line in known_codes() if line[0].startswith(prefix) and line[0] != prefix]
    if listed:
        for each, name, severity in listed:
            click.echo(f"{each}  {severity:<8} {name}")
        return
    assert code is not None
    if code == "targets":
        for name, title in known_targets():
            click.echo(f"{name:<13} {title}")
        return
    page = explain(code.upper()) or explain_target(code)
    if page is None:
        near = nearest_to(code)
        runtime = options.nearest_to(code, [name for name, _ in known_targets()])
        meant = f" {near[0].upper()}{near[1:]}" if near and not runtime else runtime
        raise click.UsageError(f"{code} is not a code.{meant} `loraformat explain` lists them.")
    click.echo(page, nl=False)
