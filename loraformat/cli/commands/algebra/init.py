"""loraformat init."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options
from loraformat.cli.commands.algebra import shared


@click.command("init")
@click.argument("base", shell_complete=completers.paths)
@click.option("--rank", type=int, required=True, metavar="N", help="Rank of every update.")
@click.option(
    "--alpha", type=options.finite, metavar="F", help="lora_alpha: the scale is alpha / rank. Default: the rank."
)
@click.option(
    "--target",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Modules by name or GLOB; all-linear for all linear layers except the output head. Repeatable.",
)
@click.option(
    "--init",
    type=options.Choice(["kaiming", "gaussian", "orthogonal", "pissa", "olora"]),
    default="kaiming",
    show_default=True,
    help="How to initialize the factors, as PEFT does; pissa and olora derive them from the weight.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
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
    """Create an untrained adapter for BASE: it changes nothing yet."""
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
