"""Options of the commands that make adapters from adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from loraformat.cli import completers, options

F = TypeVar("F", bound=Callable[..., Any])


def _stacked(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for each in reversed(decorators):
            function = each(function)
        return function

    return decorate


def _option_of_weights(name: str, text: str) -> Callable[[F], F]:
    return click.option(name, multiple=True, metavar="GLOB", help=text)


def select(text: str) -> Callable[[F], F]:
    """--select GLOB."""
    return _option_of_weights("--select", text)


def drop(text: str) -> Callable[[F], F]:
    """--drop GLOB."""
    return _option_of_weights("--drop", text)


to = click.option(
    "--to",
    metavar="FORMAT",
    shell_complete=completers.formats,
    help="Format to write; default: the source's, or PEFT if that format is read-only.",
)
dtype = click.option(
    "--dtype",
    type=options.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Dtype of the new factors.",
)
dry_run = click.option("--dry-run", is_flag=True, help="Compute and report; write nothing.")
strict = click.option("--strict", is_flag=True, help="Stop if a bound is not met or anything would be lost.")

# What every one of them takes, in the order of the help.
output = _stacked(
    options.out,
    to,
    options.container,
    options.base,
    options.alpha,
    options.assume,
    dry_run,
    strict,
    options.force,
    options.overwrite,
    options.output_format,
)

ranks = _stacked(
    click.option("--rank", type=int, metavar="N", help="Keep N singular values of each update."),
    click.option("--energy", type=options.finite, metavar="F", help="Smallest rank that keeps this share of ‖ΔW‖²."),
    click.option("--error", type=options.finite, metavar="F", help="Smallest rank with ‖ΔW − kept‖ ≤ F·‖ΔW‖."),
    click.option("--sv-ratio", type=options.finite, metavar="F", help="Keep singular values of at least σ₁/F."),
    click.option(
        "--sv-cumulative", type=options.finite, metavar="F", help="Smallest rank that keeps this share of Σσ."
    ),
    click.option("--sv-fro", type=options.finite, metavar="F", help="Smallest rank that keeps this share of ‖ΔW‖."),
    click.option(
        "--size", type=options.size, metavar="SIZE", help="Choose ranks so that all tensors together take at most SIZE."
    ),
    click.option(
        "--max-rank", type=int, metavar="N", help="Limit every rank to N, whatever the other options ask for."
    ),
)

_to_peft = click.option(
    "--to",
    metavar="FORMAT",
    default="peft",
    show_default=True,
    shell_complete=completers.formats,
    help="Format to write.",
)

# What those take that make an adapter of models.
output_of_models = _stacked(
    options.out, _to_peft, options.container, dry_run, strict, options.overwrite, options.output_format
)
jobs = click.option(
    "--jobs",
    type=click.IntRange(1, options.MOST_JOBS),
    default=None,
    help="Threads; default: one per CPU that the process may use.",
)
