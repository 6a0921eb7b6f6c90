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
    help="Threads; by default as many as processors that the command may use.",
)
_memory = click.option(
    "--memory",
    type=options.size,
    metavar="SIZE",
    default="64MiB",
    show_default=True,
    help="For windows of the base; Python and the adapters come on top.",
)
_dtype = click.option(
    "--dtype",
    type=options.Choice(["float32", "bfloat16", "float16"]),
    help="Write every floating tensor in this dtype; by default each keeps the base's.",
)
_max_shard_size = click.option(
    "--max-shard-size",
    type=options.size,
    metavar="SIZE",
    help="Divide the output into safetensors files of at most this size; by default it has the base's files.",
)
_verify = click.option(
    "--verify",
    type=options.Choice(["none", "sample", "full"]),
    default="sample",
    show_default=True,
    help="How much of the output is compared with a reference computed anew before it is moved into place.",
)
_hash = click.option(
    "--hash",
    "digests",
    type=options.Choice(["blake3", "sha256"]),
    default="blake3",
    show_default=True,
    help="Digests in loraformat.digests.json: BLAKE3 of every byte written; sha256 adds that of whole files, as the "
    "Hub has it.",
)
_no_hash = click.option("--no-hash", is_flag=True, help="No digests of copied bytes: verify cannot compare them.")


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
    help="Where products of LoRA factors are computed; all else on the CPU. Other devices may differ in the last bit.",
)
@_memory
@_dtype
@click.option(
    "--rounding",
    type=options.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="Stochastic, for outputs of 16 bits: keeps small updates on average; the same --seed gives the same bytes.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of --rounding stochastic and of dare.")
@click.option(
    "--method",
    type=options.Choice(["ties", "dare", "dare-ties"]),
    help="How the updates of several adapters become one, as in combine; by default they are added. No rank is cut.",
)
@click.option("--density", type=float, metavar="SHARE", help="Of the values of each update, for --method.")
@click.option(
    "--sign",
    type=options.Choice(["total", "frequency"]),
    default="total",
    show_default=True,
    help="Of ties: the sign of the sum of what stays, or that of most.",
)
@_max_shard_size
@click.option("--dequantize", is_flag=True, help="Write all weights of a quantized base dense.")
@click.option(
    "--keep-quantized",
    is_flag=True,
    help="Write only those weights of a quantized base dense that change; the codes of all others are copied.",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Put those weights that change into the codes of the base again (NF4, FP4, INT8, FP8 in blocks), which costs "
    "part of the update.",
)
@click.option(
    "--least-kept",
    type=click.FloatRange(0, 1),
    metavar="S",
    default=0.9,
    show_default=True,
    help="With --requantize: the share S of the update that must be kept; less than S or more than 2 - S is not "
    "written.",
)
@click.option(
    "--as-trained",
    metavar="nf4|fp4|int8[,double][,block=64]",
    help="For an adapter of QLoRA and the base in 16 bits: merge into what bitsandbytes makes of it on loading, "
    "quantized and decoded.",
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
@click.option("--resume", is_flag=True, help="Go on where an interrupted merge into OUT stopped.")
@options.distribution
@click.option("--dry-run", is_flag=True, help="Plan and report, write nothing.")
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
    """Write BASE with every ADAPTER merged into it: W + Σ s·BA, in windows of rows, rounded once.

    ADAPTER=0.7 merges an adapter at that strength; a path that exists is taken as it is.

    BASE is a folder with safetensors, .bin shards or one .pt file, or a pipeline of diffusers. The output keeps its
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
@click.option("--resume", is_flag=True, help="Go on where an interrupted run to OUT stopped.")
@options.distribution
@click.option("--dry-run", is_flag=True, help="Plan and report, write nothing.")
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
    """Write BASE, a quantized model, with all weights dense, in windows of rows, rounded once.

    A weight is what the library of its scheme computes. Without --dtype the output has the dtype that the scheme or
    config.json states.
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
