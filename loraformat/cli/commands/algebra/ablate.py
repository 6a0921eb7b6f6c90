"""loraformat ablate."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options
from loraformat.cli.commands.algebra import shared


@click.command("ablate")
@click.argument("base", shell_complete=completers.paths)
@click.option(
    "--direction",
    multiple=True,
    metavar="FILE[:TENSOR]",
    shell_complete=completers.paths,
    help="A vector, or vectors as rows, in .safetensors, .pt or .npy. Repeatable: what they span is taken out.",
)
@click.option(
    "--direction-from",
    nargs=2,
    multiple=True,
    metavar="A B",
    help="Two files of activations (samples, features): the direction is the difference of their means.",
)
@shared.select("The weights. Repeatable.")
@shared.drop("Those that stay as they are, of these. Repeatable.")
@click.option(
    "--strength",
    multiple=True,
    metavar="[GLOB=]F",
    help="How much of the directions goes, 1 by default; GLOB=F for some weights. Repeatable, the last holds.",
)
@click.option(
    "--side",
    type=options.Choice(["output", "input"]),
    default="output",
    show_default=True,
    help="Directions of what the weights write, or of what they read.",
)
@click.option("--keep-norms", is_flag=True, help="Give every row of a weight its length back; needs --rank.")
@click.option("--rank", type=int, metavar="N", help="Of the update, with --keep-norms.")
@click.option("--merge", is_flag=True, help="Write the model without the directions, in place of an adapter.")
@shared.dtype
@shared.jobs
@shared.output_of_models
def ablate(
    base: str,
    out: str,
    container: str | None,
    jobs: int | None,
    output_format: str,
    **chosen: Any,  # noqa: ANN401 - as the function of the library has them
) -> None:
    """Write what takes directions out of the selected weights of BASE: W − λ·D·Dᵀ·W, an adapter of a small rank."""
    from loraformat.jobs.weights.ablate import ablate as run
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
