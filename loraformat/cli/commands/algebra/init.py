"""loraformat init."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options
from loraformat.cli.commands.algebra import shared


@click.command("init")
@click.argument("base", shell_complete=completers.paths)
@click.option("--rank", type=int, required=True, metavar="N", help="Of every update.")
@click.option("--alpha", type=options.finite, metavar="F", help="The scale is alpha / rank; by default the rank.")
@click.option(
    "--target",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Modules by name or GLOB; all-linear for all linear layers but the output head. Repeatable.",
)
@click.option(
    "--init",
    type=options.Choice(["kaiming", "gaussian", "orthogonal", "pissa", "olora"]),
    default="kaiming",
    show_default=True,
    help="The first factors, as PEFT draws them; pissa and olora are a part of the weight.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random numbers.")
@shared.dtype
@shared.jobs
@shared.output_of_models
def init(
    base: str,
    out: str,
    container: str | None,
    jobs: int | None,
    output_format: str,
    **chosen: Any,  # noqa: ANN401 - as the function of the library has them
) -> None:
    """Write an adapter for BASE that changes nothing yet, to be trained."""
    from loraformat.jobs.weights.init import init as run
    from loraformat.report.terminal.text import progress

    with progress(f"writing {out}") as advance:
        report = run(
            base,
            out,
            container=options.CONTAINERS[container],
            jobs=jobs or options.processors(),
            publication=options.publication(out),
            announce=options.announce,
            progress=advance,
            **chosen,
        )
    options.present(report, output_format, findings=False)
