"""loraformat version."""

from __future__ import annotations

import click

from loraformat._version import __version__


@click.command("version")
def command() -> None:
    """Show the version, as `loraformat --version` does."""
    click.echo(f"loraformat, version {__version__}")
