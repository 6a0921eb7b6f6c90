"""loraformat convert."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli import completers, options


@click.command("convert")
@click.argument("source", shell_complete=completers.paths)
@click.option(
    "--to",
    required=True,
    metavar="FORMAT",
    shell_complete=completers.formats,
    help="Format to write: native, peft, mlx, loralib, diffusers, kohya, comfy or lycoris.",
)
@options.out
@options.source_format
@options.base
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
@click.option("--strip-metadata", is_flag=True, help="Leave out free settings, other files and local paths.")
@click.option("--check-roundtrip", is_flag=True, help="Read the output back and compare every update before it stays.")
@options.partial
@click.option("--dry-run", is_flag=True, help="Report repairs and losses, write nothing.")
@click.option("--strict", is_flag=True, help="Refuse where anything would be lost.")
@options.force
@options.overwrite
@options.output_format
def command(
    source: str,
    to: str,
    out: str,
    source_format: str | None,
    base: str | None,
    alpha: float | None,
    assume: tuple[tuple[str, Any], ...],
    base_model: str | None,
    container: str | None,
    dtype: str | None,
    plain: bool,
    peft_version: str | None,
    strip_metadata: bool,
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
    from loraformat.report.terminal.text import progress

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
            strip_metadata=strip_metadata,
            check_roundtrip=check_roundtrip,
            partial=partial,
            dry_run=dry_run,
            strict=strict,
            force=force,
            overwrite=overwrite,
            announce=options.announce,
            progress=advance,
        )
    options.present(report, output_format, findings=False)
