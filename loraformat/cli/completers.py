"""Shell completion of paths, names of formats and runtimes, and codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def paths(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Files and folders, which the shell knows best."""
    from click.shell_completion import CompletionItem

    del ctx, param
    return [CompletionItem(incomplete, type="file")]


def formats(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """All formats; for `--to` those that are written."""
    from loraformat.formats import FORMATS

    del ctx
    known = [each for each in FORMATS if each.WRITES or param.name != "to"]
    return _starting(incomplete, ((each.NAME, each.TITLE) for each in known))


def runtimes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Names for `--target`."""
    from loraformat.jobs.explain import known_targets

    del ctx, param
    return _starting(incomplete, known_targets())


def codes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Codes with their names, in any case; for `explain` the runtimes as well."""
    from loraformat.jobs.explain import known_codes

    found = _starting(incomplete.upper(), ((code, name) for code, name, _ in known_codes()))
    return found + (runtimes(ctx, param, incomplete) if ctx.info_name == "explain" else [])


def commands(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The commands."""
    from loraformat.cli import COMMANDS

    del ctx, param
    return _starting(incomplete, COMMANDS.items())


def reports(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """`json=` and the like for `--report`."""
    from loraformat.report import FORMS

    del ctx, param
    return _starting(incomplete, ((f"{form}=", "") for form in FORMS))


def _starting(begin: str, words: Iterable[tuple[str, str]]) -> list[CompletionItem[str]]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(word, help=line or None) for word, line in words if word.startswith(begin)]
