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
    """Write ADAPTER with each update at the least rank that meets the rules, at the least possible error.

    The factors are decomposed, never ΔW. Of several rules the largest rank holds; --size stands alone.
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
