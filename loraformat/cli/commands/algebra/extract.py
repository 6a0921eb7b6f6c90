"""loraformat extract."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options
from loraformat.cli.commands.algebra import shared


@click.command("extract")
@click.argument("base", shell_complete=completers.paths)
@click.argument("tuned", shell_complete=completers.paths)
@click.option("--rank", type=int, metavar="N", help="Keep N singular values of each difference.")
@click.option("--energy", type=options.finite, metavar="F", help="Smallest rank that keeps this share of ‖ΔW‖².")
@click.option("--error", type=options.finite, metavar="F", help="Smallest rank with ‖ΔW − kept‖ ≤ F·‖ΔW‖.")
@click.option(
    "--size", type=options.size, metavar="SIZE", help="Choose ranks so that all factors together take at most SIZE."
)
@click.option("--max-rank", type=int, metavar="N", help="Limit every rank to N, whatever the other options ask for.")
@shared.select("Weights to extract; default: all linear layers and convolutions. Repeatable.")
@shared.drop("Of these, weights to leave out. Repeatable.")
@click.option(
    "--rest",
    type=options.Choice(["refuse", "save", "drop"]),
    default="refuse",
    show_default=True,
    help="If anything else changed (norms, biases, tables, new tokens): stop, save it in the adapter, or leave it out.",
)
@click.option(
    "--passes",
    type=click.IntRange(2, 8),
    default=3,
    show_default=True,
    help="Passes over each difference: 3 come within 0.6 % of the smallest error, 4 within 0.2 %.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the randomized SVD.")
@shared.dtype
@shared.jobs
@click.option(
    "--memory",
    "memory_nbytes",
    type=options.size,
    metavar="SIZE",
    default="256MiB",
    show_default=True,
    help="Memory for differences kept between passes; larger ones are read again.",
)
@shared.output_of_models
def extract(
    base: str,
    tuned: str,
    out: str,
    container: str | None,
    jobs: int | None,
    output_format: str,
    **chosen: Any,  # noqa: ANN401 - as the function of the library has them
) -> None:
    """Extract the LoRA closest to what changed from BASE to TUNED, a fine-tuned version of it.

    Both are folders or files of models with the same names; shards, containers and quantization may differ.
    """
    from loraformat.jobs.weights.extract import extract as run
    from loraformat.report.terminal.text import progress

    with progress(f"comparing {tuned}") as advance:
        report = run(
            base,
            tuned,
            out,
            container=options.CONTAINERS[container],
            jobs=jobs or options.processors(),
            publication=options.publication(out),
            announce=options.announce,
            progress=advance,
            **chosen,
        )
    options.present(report, output_format, findings=False)
