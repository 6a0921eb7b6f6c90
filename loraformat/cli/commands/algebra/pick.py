"""loraformat pick."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options
from loraformat.cli.commands.algebra import shared


def _names(value: str) -> tuple[str, str]:
    """OLD=NEW as (old, new)."""
    old, separator, new = value.partition("=")
    if not separator or not old or not new:
        raise click.BadParameter(f"{value!r}: expected OLD=NEW")
    return old, new


@click.command("pick")
@click.argument("adapter", shell_complete=completers.paths)
@click.option("--select", multiple=True, metavar="GLOB", help="Updates to keep; default: all. Repeatable.")
@click.option("--drop", multiple=True, metavar="GLOB", help="Of these, updates to drop. Repeatable.")
@click.option(
    "--rename",
    type=_names,
    multiple=True,
    metavar="OLD=NEW",
    help="Rename components in all names: model.layers=language_model.layers. Repeatable, applied in order.",
)
@options.source_format
@shared.output
def pick(
    adapter: str,
    out: str,
    assume: tuple[tuple[str, Any], ...],
    container: str | None,
    source_format: str | None,
    output_format: str,
    **chosen: Any,  # noqa: ANN401 - as the function of the library has them
) -> None:
    """Keep some of the updates of ADAPTER, bit for bit; the config names the remaining modules.

    GLOB matches the path of a module, its last components, or the name of a weight, and * matches dots too:
    'model.layers.1.*', q_proj, 'self_attn.*'. layers=0-7,12 means layers by number.
    """
    from loraformat.jobs.algebra.pick import pick as run
    from loraformat.report.terminal.text import progress

    with progress(f"writing {out}") as advance:
        report = run(
            adapter,
            out,
            assumptions=options.assumptions(assume),
            container=options.CONTAINERS[container],
            format=source_format,
            publication=options.publication(out),
            announce=options.announce,
            progress=advance,
            **chosen,
        )
    options.present(report, output_format, findings=False)
