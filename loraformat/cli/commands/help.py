"""loraformat help and loraformat version: about the tool itself."""

from __future__ import annotations

import click

from loraformat._version import __version__
from loraformat.cli import completers


@click.command("help")
@click.argument("name", required=False, metavar="[COMMAND]", shell_complete=completers.commands)
@click.pass_context
def command(ctx: click.Context, name: str | None) -> None:
    """Show the commands, or the options of COMMAND, as `loraformat COMMAND --help` does."""
    root = ctx.find_root()
    group = root.command
    assert isinstance(group, click.Group)
    if name is None:
        click.echo(group.get_help(root))
        return
    named, found, _ = group.resolve_command(root, [name])
    assert found is not None
    with click.Context(found, info_name=named, parent=root) as inner:
        click.echo(found.get_help(inner))


@click.command("version")
def version() -> None:
    """Show the version, as `loraformat --version` does."""
    click.echo(f"loraformat, version {__version__}")
