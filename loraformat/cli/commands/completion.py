"""loraformat completion."""

from __future__ import annotations

import click

from loraformat.cli import options

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=options.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options, paths, formats, runtimes and codes.

    For bash add the line eval "$(loraformat completion bash)" to ~/.bashrc, for zsh the same with zsh to ~/.zshrc; for
    fish write the output into ~/.config/fish/completions/loraformat.fish.
    """
    from click.shell_completion import ShellComplete, get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    # Not its own `source`: for bash that starts a bash, to ask for its version.
    script = ShellComplete.source(kind(ctx.find_root().command, {}, "loraformat", "_LORAFORMAT_COMPLETE"))
    click.echo(script.strip())
