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
    help="cat by default: the exact sum, ranks add up; svd where a rule of ranks is given.",
)
@click.option("--density", type=options.finite, metavar="F", help="Share of the values of each ΔW that stay.")
@click.option(
    "--sign",
    type=options.Choice(["total", "frequency"]),
    default="total",
    show_default=True,
    help="Who elects the sign of a value in ties and its like: the sum of all, or most of them.",
)
@click.option(
    "--gamma",
    type=options.finite,
    default="0.01",
    show_default=True,
    metavar="F",
    help="Of breadcrumbs: share of the largest values that goes.",
)
@click.option(
    "--epsilon",
    type=options.finite,
    default="0.1",
    show_default=True,
    metavar="F",
    help="Of della: how far the chance of a value to stay may be from the density.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of dare, dare-ties and della.")
@click.option(
    "--like-peft",
    type=options.Choice(_PEFT),
    metavar="TYPE",
    help="What PEFT's add_weighted_adapter makes by this combination_type: linear, ties, ties_svd …",
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
    """Write one adapter that changes each weight by Σ WEIGHT · ΔW, or by what another method makes of the ΔW.

    A path that exists is taken as it is, and has the weight 1.
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
