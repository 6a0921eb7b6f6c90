"""loraformat merge."""

from __future__ import annotations

import math
from typing import Any

import click

from loraformat.cli import completers, options

# Options that both commands of this module have.
_jobs = click.option(
    "--jobs",
    type=click.IntRange(1, options.MOST_JOBS),
    default=None,
    help="Threads; default: one per CPU that the process may use.",
)
_memory = click.option(
    "--memory",
    type=options.size,
    metavar="SIZE",
    default="64MiB",
    show_default=True,
    help="Memory for windows of the base; Python and the adapters need more on top.",
)
_dtype = click.option(
    "--dtype",
    type=options.Choice(["float32", "bfloat16", "float16"]),
    help="Write every floating-point tensor in this dtype; default: the base's.",
)
_max_shard_size = click.option(
    "--max-shard-size",
    type=options.size,
    metavar="SIZE",
    help="Split the output into safetensors files of at most this size; default: the same files as the base.",
)
_verify = click.option(
    "--verify",
    type=options.Choice(["none", "sample", "full"]),
    default="sample",
    show_default=True,
    help="How much of the output to compare with an independent computation before moving it into place.",
)
_hash = click.option(
    "--hash",
    "digests",
    type=options.Choice(["blake3", "sha256"]),
    default="blake3",
    show_default=True,
    help="Digests in loraformat.digests.json: BLAKE3 of every byte written; sha256 adds SHA-256 of whole files, as the "
    "Hub shows it.",
)
_no_hash = click.option("--no-hash", is_flag=True, help="Skip digests of copied bytes; verify cannot check those.")


def _strengths(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    del ctx, param
    found: dict[str, float] = {}
    for value in values:
        name, equals, number = value.partition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not name or not equals or not math.isfinite(factor) or name in found:
            raise click.BadParameter(f"{value!r}: expected COMPONENT=NUMBER, each component once")
        found[name] = factor
    return found


@click.command("merge")
@click.argument("base", shell_complete=completers.paths)
@click.argument("adapters", shell_complete=completers.paths, nargs=-1, required=True, metavar="ADAPTER[=STRENGTH]...")
@options.out
@options.alpha
@options.assume
@options.container
@_jobs
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda[:N]",
    help="Device for the products of LoRA factors; the rest runs on the CPU. Devices may differ in the last bit.",
)
@_memory
@_dtype
@click.option(
    "--rounding",
    type=options.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="stochastic, for 16-bit outputs: keeps small updates on average; the same --seed gives the same bytes.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed of --rounding stochastic and of dare."
)
@click.option(
    "--method",
    type=options.Choice(["ties", "dare", "dare-ties"]),
    help="How to combine the updates of several adapters, as in combine; default: add them. Ranks are not reduced.",
)
@click.option(
    "--density", type=float, metavar="SHARE", help="With --method: share of the values of each update to keep."
)
@click.option(
    "--sign",
    type=options.Choice(["total", "frequency"]),
    default="total",
    show_default=True,
    help="For ties: elect the sign of each value by the sum of the kept values, or by majority.",
)
@_max_shard_size
@click.option("--dequantize", is_flag=True, help="Dequantize all weights of a quantized base.")
@click.option(
    "--keep-quantized",
    is_flag=True,
    help="Dequantize only the weights that change; copy the quantized codes of all others.",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Quantize the changed weights again in the base's scheme (NF4, FP4, INT8, block FP8), which loses "
    "part of the update.",
)
@click.option(
    "--least-kept",
    type=click.FloatRange(0, 1),
    metavar="S",
    default=0.9,
    show_default=True,
    help="With --requantize: the share S of the update that must survive; less than S or more than 2 - S stops it.",
)
@click.option(
    "--as-trained",
    metavar="nf4|fp4|int8[,double][,block=64]",
    help="For a QLoRA adapter and its 16-bit base: merge into the weights as bitsandbytes sees them on loading, "
    "quantized and dequantized.",
)
@click.option(
    "--strength",
    "strengths",
    multiple=True,
    metavar="COMPONENT=W",
    callback=_strengths,
    help="For a pipeline, or an image model in one file: the factor for the updates of one component, such as "
    "text_encoder=0.5. Repeatable.",
)
@_verify
@_hash
@_no_hash
@click.option("--resume", is_flag=True, help="Continue an interrupted merge into OUT.")
@options.distribution
@click.option("--dry-run", is_flag=True, help="Plan and report; write nothing.")
@options.force
@options.overwrite
@options.output_format
def command(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    container: str | None,
    jobs: int | None,
    device: str,
    memory: int,
    dtype: str | None,
    rounding: str,
    seed: int,
    max_shard_size: int | None,
    dequantize: bool,
    keep_quantized: bool,
    requantize: bool,
    least_kept: float,
    as_trained: str | None,
    method: str | None,
    density: float | None,
    sign: str,
    strengths: dict[str, float],
    verify: str,
    digests: str,
    no_hash: bool,
    resume: bool,
    engine: str,
    rank: int | None,
    world: int | None,
    finish: bool,
    dry_run: bool,
    force: bool,
    overwrite: bool,
    output_format: str,
) -> None:
    """Merge every ADAPTER into BASE: W + Σ s·BA, in windows of rows, rounded once.

    ADAPTER=0.7 merges an adapter at that strength; an existing path is never split at "=".

    BASE is a folder with safetensors, .bin shards or one .pt file, or a diffusers pipeline. The output keeps its
    files, names and container.
    """
    from loraformat.jobs.merge import merge
    from loraformat.report.terminal.text import progress

    divided = finish or rank is not None
    options.keep_partial_output(options.keeping(resume=resume, dry_run=dry_run, divided=divided))
    with progress(f"merging into {out}") as advance:
        report = merge(
            base,
            adapters,
            out,
            alpha=alpha,
            assumptions=options.assumptions(assume),
            container=options.CONTAINERS[container],
            jobs=options.jobs_for(engine, jobs),
            device=device,
            memory_nbytes=memory,
            dtype=dtype,
            rounding=rounding,
            seed=seed,
            max_shard_nbytes=max_shard_size,
            dequantize=dequantize,
            keep_quantized=keep_quantized,
            requantize=requantize,
            least_kept=least_kept,
            as_trained=as_trained,
            method=method,
            density=density,
            sign=sign,
            component_strengths=strengths,
            verify=verify,
            digests="none" if no_hash else digests,
            resume=resume,
            engine=engine,
            rank=rank,
            world=world,
            finish=finish,
            dry_run=dry_run,
            force=force,
            overwrite=overwrite,
            publication=options.publication(out),
            announce=options.announce,
            progress=advance,
        )
    options.present(report, output_format, findings=False)


@click.command("dequantize")
@click.argument("base", shell_complete=completers.paths)
@options.out
@options.container
@_jobs
@_memory
@_dtype
@_max_shard_size
@_verify
@_hash
@_no_hash
@click.option("--resume", is_flag=True, help="Continue an interrupted run to OUT.")
@options.distribution
@click.option("--dry-run", is_flag=True, help="Plan and report; write nothing.")
@options.overwrite
@options.output_format
def dequantize(
    base: str,
    out: str,
    container: str | None,
    jobs: int | None,
    memory: int,
    dtype: str | None,
    max_shard_size: int | None,
    verify: str,
    digests: str,
    no_hash: bool,
    resume: bool,
    engine: str,
    rank: int | None,
    world: int | None,
    finish: bool,
    dry_run: bool,
    overwrite: bool,
    output_format: str,
) -> None:
    """Write the quantized model BASE with all of its weights dense, in windows of rows, rounded once.

    Each weight has the value that the library of its scheme computes. Without --dtype the output has the dtype that the
    scheme or config.json states.
    """
    from loraformat.jobs.merge import dequantize as run
    from loraformat.report.terminal.text import progress

    divided = finish or rank is not None
    options.keep_partial_output(options.keeping(resume=resume, dry_run=dry_run, divided=divided))
    with progress(f"writing {out}") as advance:
        report = run(
            base,
            out,
            container=options.CONTAINERS[container],
            jobs=options.jobs_for(engine, jobs),
            memory_nbytes=memory,
            dtype=dtype,
            max_shard_nbytes=max_shard_size,
            verify=verify,
            digests="none" if no_hash else digests,
            resume=resume,
            engine=engine,
            rank=rank,
            world=world,
            finish=finish,
            dry_run=dry_run,
            overwrite=overwrite,
            publication=options.publication(out),
            announce=options.announce,
            progress=advance,
        )
    options.present(report, output_format, findings=False)
