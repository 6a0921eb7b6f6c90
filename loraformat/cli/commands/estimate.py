"""loraformat estimate."""

from __future__ import annotations

import click

from loraformat.cli import completers, options


@click.command("estimate")
@click.argument("base", shell_complete=completers.paths, metavar="BASE_OR_CONFIG")
@click.option("--rank", type=click.IntRange(1, 1 << 16), required=True, help="Rank of every factor pair.")
@click.option(
    "--targets",
    required=True,
    metavar="NAMES",
    help='Module names as in PEFT\'s target_modules, separated by commas, or "all-linear".',
)
@options.output_format
def command(base: str, rank: int, targets: str, output_format: str) -> None:
    """Estimate what a LoRA adapter for BASE_OR_CONFIG would cost: parameters, file size, training memory.

    BASE_OR_CONFIG is a checkpoint, of which only headers are read, or the config.json of a known decoder model.
    """
    from loraformat.jobs.estimate import estimate

    names = [name.strip() for name in targets.split(",") if name.strip()]
    if not names:
        raise click.UsageError("--targets names no module")
    options.present(estimate(base, rank=rank, targets=names), output_format)
