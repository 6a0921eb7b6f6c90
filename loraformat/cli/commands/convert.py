"""loraformat convert and loraformat stamp: an adapter written again, in another format or with the name of its base."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options

_OUT = "Folder to write, s3://bucket/prefix, or hf://owner/name[@branch]; it appears whole or not at all."


@click.command("convert")
@click.argument("source", shell_complete=completers.paths)
@click.option(
    "--to",
    metavar="FORMAT",
    shell_complete=completers.formats,
    help="Format to write: native, peft, mlx, gguf, loralib, diffusers, kohya, comfy or lycoris.",
)
@click.option("-o", "--out", metavar="OUT", shell_complete=completers.paths, help=_OUT)
@options.publishing
@options.source_format
@options.base
@click.option(
    "--map",
    "maps",
    nargs=2,
    multiple=True,
    metavar="OLD NEW",
    help="Rename tensors first: a regular expression and its replacement, as for re.sub. Repeatable, in order.",
)
@click.option(
    "--propose-map",
    is_flag=True,
    help="Print the --map options by which the names would be the base's, as far as shapes tell. Writes nothing.",
)
@options.alpha
@options.assume
@click.option(
    "--base-model",
    metavar="NAME[@REVISION]",
    help="What the adapter was trained on, as the Hub calls it; written into the config.",
)
@options.container
@click.option(
    "--dtype", type=options.Choice(["float32", "float16", "bfloat16"]), help="Write all values so; kept by default."
)
@click.option("--plain", is_flag=True, help="Bake rsLoRA and patterns into one rank and one alpha / rank.")
@click.option("--peft-version", metavar="VERSION", help="The oldest PEFT that must read the output, from 0.5 on.")
@click.option("--modelfile", metavar="BASE", help="Write a Modelfile for Ollama beside a GGUF adapter, on this base.")
@click.option("--strip-metadata", is_flag=True, help="Leave out free settings, other files and local paths.")
@click.option(
    "--to-lora",
    is_flag=True,
    help="Write updates of other tuners as LoRA: exactly where they are one, else by their best factors. DoRA, IA3, "
    "OFT and what else depends on the base need --base.",
)
@click.option("--rank", type=int, metavar="N", help="With --to-lora: the rank of those factors.")
@click.option("--error", type=options.finite, metavar="F", help="With --to-lora: the least rank of so small an error.")
@click.option("--check-roundtrip", is_flag=True, help="Read the output back and compare every update before it stays.")
@options.partial
@click.option("--dry-run", is_flag=True, help="Report repairs and losses, write nothing.")
@click.option("--strict", is_flag=True, help="Refuse where anything would be lost.")
@options.force
@options.overwrite
@options.output_format
def command(
    source: str,
    to: str | None,
    out: str | None,
    source_format: str | None,
    base: str | None,
    maps: tuple[tuple[str, str], ...],
    propose_map: bool,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    base_model: str | None,
    container: str | None,
    dtype: str | None,
    plain: bool,
    peft_version: str | None,
    modelfile: str | None,
    strip_metadata: bool,
    to_lora: bool,
    rank: int | None,
    error: float | None,
    check_roundtrip: bool,
    partial: bool,
    dry_run: bool,
    strict: bool,
    force: bool,
    overwrite: bool,
    output_format: str,
) -> None:
    """Write the adapter SOURCE (a folder or a file) in another format, or in its own without its damages.

    Repairs and losses are told before anything is written.
    """
    from loraformat.jobs.convert import convert
    from loraformat.jobs.convert import propose_map as proposal
    from loraformat.report.terminal.text import progress

    if propose_map:
        if base is None:
            raise click.UsageError("--propose-map needs the base: --base BASE")
        options.present(proposal(source, base, format=source_format, maps=maps), output_format)
        return
    if to is None or out is None:
        raise click.UsageError(f"Missing option '{'--to' if to is None else '-o'}'.")
    with progress(f"writing {out}") as advance:
        report = convert(
            source,
            out,
            to=to,
            format=source_format,
            base=base,
            alpha=alpha,
            assumptions=options.assumptions(assume),
            base_model=base_model,
            container=options.CONTAINERS[container],
            dtype=dtype,
            plain=plain,
            peft_version=peft_version,
            maps=maps,
            modelfile=modelfile or "",
            strip_metadata=strip_metadata,
            to_lora=to_lora,
            rank=rank,
            error=error,
            check_roundtrip=check_roundtrip,
            partial=partial,
            dry_run=dry_run,
            strict=strict,
            force=force,
            overwrite=overwrite,
            publication=options.publication(out),
            announce=options.announce,
            announce_names=options.announce_names if output_format == "text" else None,
            progress=advance,
        )
    options.present(report, output_format, findings=False)


@click.command("stamp")
@click.argument("adapter", shell_complete=completers.paths)
@click.option(
    "--base", required=True, metavar="BASE", shell_complete=completers.paths, help="What the adapter was trained on."
)
@click.option("-o", "--out", metavar="OUT", shell_complete=completers.paths, help="Folder to write a copy to.")
@options.publishing
@click.option("--in-place", is_flag=True, help="Replace the one file that changes; nothing else is touched.")
@click.option(
    "--base-model",
    metavar="NAME[@REVISION]",
    help="What the Hub calls the base; by default that of an hf:// address, else what the adapter says.",
)
@options.source_format
@options.alpha
@options.assume
@options.force
@options.overwrite
@options.output_format
def stamp(
    adapter: str,
    base: str,
    out: str | None,
    in_place: bool,
    base_model: str | None,
    source_format: str | None,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    force: bool,
    overwrite: bool,
    output_format: str,
) -> None:
    """Write name, revision and fingerprint of the base into ADAPTER.

    validate, merge and diff then notice another base. The fingerprint covers names, shapes and some values of every
    weight, and does not depend on shards, container or dtype.
    """
    from loraformat.jobs.stamp import stamp as run
    from loraformat.report.terminal.text import progress

    with progress(f"writing {out or adapter}") as advance:
        report = run(
            adapter,
            base,
            out,
            in_place=in_place,
            base_model=base_model,
            format=source_format,
            alpha=alpha,
            assumptions=options.assumptions(assume),
            force=force,
            overwrite=overwrite,
            publication=options.publication(out),
            progress=advance,
        )
    options.present(report, output_format)
