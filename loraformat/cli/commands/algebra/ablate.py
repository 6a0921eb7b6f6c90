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
    help="A vector, or vectors as rows, in .safetensors, .pt or .npy. Repeatable; their span is removed.",
)
@click.option(
    "--direction-from",
    nargs=2,
    multiple=True,
    metavar="A B",
    help="Two files of activations (samples, features): the direction is the difference of their means.",
)
@shared.select("Weights to change. Repeatable.")
@shared.drop("Of these, weights to leave unchanged. Repeatable.")
@click.option(
    "--strength",
    multiple=True,
    metavar="[GLOB=]F",
    help="How much of the directions to remove, 1 by default; GLOB=F for some weights. Repeatable; the last wins.",
)
@click.option(
    "--side",
    type=options.Choice(["output", "input"]),
    default="output",
    show_default=True,
    help="Remove the directions from the outputs of the weights, or from their inputs.",
)
@click.option("--keep-norms", is_flag=True, help="Restore the norm of every row of a weight; needs --rank.")
@click.option("--rank", type=int, metavar="N", help="With --keep-norms: rank of the update.")
@click.option("--merge", is_flag=True, help="Write the changed model instead of an adapter.")
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
    """Remove directions from the selected weights of BASE, W − λ·D·Dᵀ·W, and write the change as an adapter."""
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
