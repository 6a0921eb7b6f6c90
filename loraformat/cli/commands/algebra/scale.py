"""loraformat scale."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options
from loraformat.cli.commands.algebra import shared


@click.command("scale")
@click.argument("adapter", shell_complete=completers.paths, metavar="ADAPTER=WEIGHT")
@click.option(
    "--bake",
    is_flag=True,
    help="Multiply lora_B and leave alpha unchanged, for programs that interpret alpha differently.",
)
@options.source_format
@shared.output
def scale(
    adapter: str,
    out: str,
    assume: tuple[tuple[str, Any], ...],
    container: str | None,
    source_format: str | None,
    output_format: str,
    **chosen: Any,  # noqa: ANN401 - as the function of the library has them
) -> None:
    """Multiply the updates of an adapter by WEIGHT through alpha, so that all tensors keep their bytes."""
    from loraformat.jobs.algebra.scale import scale as run
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
