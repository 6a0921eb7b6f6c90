"""loraformat formats."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from loraformat.cli import options

if TYPE_CHECKING:
    from loraformat.jobs.formats import FormatRecord

_INDENT = 10


@click.command("formats")
@options.output_format
def command(output_format: str) -> None:
    """List the formats: what each is, what loraformat reads and writes of it, and what a conversion to it loses."""
    from loraformat.diagnostics import json_text
    from loraformat.formats.kit.base import CONTENTS
    from loraformat.jobs.formats import formats, matrix

    found = formats()
    if output_format == "json":
        said = {"formats": [asdict(each) for each in found], "kinds": CONTENTS, "refused": matrix()}
        click.echo(json_text(said, indent=2))
        return
    for each in found:
        for line in _lines(each):
            click.echo(line)


def _lines(each: FormatRecord) -> Iterator[str]:
    verbs = f"reads and writes ({', '.join(each.containers)})" if each.writes else "reads"
    yield f"{each.name:<{_INDENT}}{verbs}"
    yield from _wrapped(each.title)
    yield from _wrapped(f"reads {', '.join(each.reads)}")
    if each.writes:
        yield from _wrapped(f"writes {', '.join(each.holds)}")
    if each.families:
        yield from _wrapped(f"models {', '.join(each.families)}; others with --base")
    if each.loses:
        yield from _wrapped(f"loses {each.loses}")


def _wrapped(text: str) -> Iterator[str]:
    indent = " " * _INDENT
    yield from textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=f"{indent}  ")
