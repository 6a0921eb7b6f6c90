"""loraformat combine."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options
from loraformat.cli.commands.algebra import shared

_METHODS = ["cat", "svd", "ties", "dare", "dare-ties", "magnitude", "breadcrumbs", "della", "knots-ties", "core-ties"]
_PEFT = [
    *("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
]


@click.command("combine")
@click.argument("adapters", shell_complete=completers.paths, nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option(
    "--method",
    type=options.Choice(_METHODS),
    help="How to combine the updates. Default: cat (exact sum, ranks add up), or svd if an option limits the rank.",
)
@click.option("--density", type=options.finite, metavar="F", help="Share of the values of each ΔW to keep.")
@click.option(
    "--sign",
    type=options.Choice(["total", "frequency"]),
    default="total",
    show_default=True,
    help="How ties and related methods elect the sign of a value: by the sum, or by majority.",
)
@click.option(
    "--gamma",
    type=options.finite,
    default="0.01",
    show_default=True,
    metavar="F",
    help="For breadcrumbs: share of the largest values to drop.",
)
@click.option(
    "--epsilon",
    type=options.finite,
    default="0.1",
    show_default=True,
    metavar="F",
    help="For della: how far the probability of keeping a value may deviate from the density.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of dare, dare-ties and della.")
@click.option(
    "--like-peft",
    type=options.Choice(_PEFT),
    metavar="TYPE",
    help="Reproduce PEFT's add_weighted_adapter with this combination_type: linear, ties, ties_svd …",
)
@shared.ranks
@shared.dtype
@shared.output
def combine(
    adapters: tuple[str, ...],
    out: str,
    assume: tuple[tuple[str, Any], ...],
    container: str | None,
    output_format: str,
    **chosen: Any,  # noqa: ANN401 - as the function of the library has them
) -> None:
    """Combine adapters into one that changes each weight by Σ WEIGHT · ΔW, or as another method combines the ΔW.

    An existing path is never split at "=" and has weight 1.
    """
    from loraformat.jobs.algebra.combine import combine as run
    from loraformat.report.terminal.text import progress

    with progress(f"writing {out}") as advance:
        report = run(
            adapters,
            out,
            assumptions=options.assumptions(assume),
            container=options.CONTAINERS[container],
            publication=options.publication(out),
            announce=options.announce,
            progress=advance,
            **chosen,
        )
    options.present(report, output_format, findings=False)
