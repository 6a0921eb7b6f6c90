"""loraformat convert and loraformat stamp."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options

_OUT = "Folder to write, s3://bucket/prefix, or hf://owner/name[@branch]; it appears complete or not at all."


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
    help="Rename tensors first: a regular expression and its replacement, as in re.sub. Repeatable, applied in order.",
)
@click.option(
    "--propose-map",
    is_flag=True,
    help="Suggest --map options that turn the names into the base's, judging by shapes; write nothing.",
)
@options.alpha
@options.assume
@click.option(
    "--base-model",
    metavar="NAME[@REVISION]",
    help="Name of the base on the Hub, to be written into the config.",
)
@options.container
@click.option(
    "--dtype", type=options.Choice(["float32", "float16", "bfloat16"]), help="Dtype of all values; default: unchanged."
)
@click.option("--plain", is_flag=True, help="Fold rsLoRA and per-module patterns into one rank and one alpha.")
@click.option("--peft-version", metavar="VERSION", help="Oldest PEFT version that must read the output; 0.5 or later.")
@click.option("--modelfile", metavar="BASE", help="With --to gguf: also write an Ollama Modelfile for this base.")
@click.option("--strip-metadata", is_flag=True, help="Leave out free-form settings, other files and local paths.")
@click.option(
    "--to-lora",
    is_flag=True,
    help="Write updates of other tuners as LoRA: exactly if they are low-rank, otherwise approximated by SVD. DoRA, "
    "IA3, OFT and all others that depend on the base need --base.",
)
@click.option("--rank", type=int, metavar="N", help="With --to-lora: the rank of the approximation.")
@click.option(
    "--error", type=options.finite, metavar="F", help="With --to-lora: the smallest rank with ‖ΔW − kept‖ ≤ F·‖ΔW‖."
)
@click.option(
    "--check-roundtrip", is_flag=True, help="Read the output back and compare every update before moving it into place."
)
@options.partial
@click.option("--dry-run", is_flag=True, help="Report repairs and losses; write nothing.")
@click.option("--strict", is_flag=True, help="Stop if anything would be lost.")
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
    """Convert the adapter SOURCE (a folder or a file) to another format, or repair it in its own.

    Before it writes, convert reports every repair and everything that the format cannot express.
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
    "--base",
    required=True,
    metavar="BASE",
    shell_complete=completers.paths,
    help="The base that the adapter was trained on.",
)
@click.option("-o", "--out", metavar="OUT", shell_complete=completers.paths, help="Folder to write a copy to.")
@options.publishing
@click.option("--in-place", is_flag=True, help="Replace the one file that changes; leave all others untouched.")
@click.option(
    "--base-model",
    metavar="NAME[@REVISION]",
    help="Name of the base on the Hub; default: the one in an hf:// address, otherwise the adapter's.",
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
    """Record name, revision and fingerprint of the base in ADAPTER.

    validate, merge and diff then notice a different base. The fingerprint covers names, shapes and some values of every
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
