"""loraformat resize."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options
from loraformat.cli.commands.algebra import shared


@click.command("resize")
@click.argument("adapter", shell_complete=completers.paths)
@shared.ranks
@shared.dtype
@options.source_format
@shared.output
def resize(
    adapter: str,
    out: str,
    assume: tuple[tuple[str, Any], ...],
    container: str | None,
    source_format: str | None,
    output_format: str,
    **chosen: Any,  # noqa: ANN401 - as the function of the library has them
) -> None:
    """Reduce each update of ADAPTER to the smallest rank that the options allow, with the smallest possible error.

    Only the factors are decomposed, never ΔW. If several options set a rank, the largest wins; --size must be the only
    one.
    """
    from loraformat.jobs.algebra.resize import resize as run
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
