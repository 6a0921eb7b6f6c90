"""Options shared by several commands, and how a command presents its report.

--alpha, --assume   inspect validate convert merge
--base              inspect validate convert
--jobs              inspect
--from              inspect validate convert
--format            all
--force, --overwrite, --container   convert merge
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loraformat.cli import completers
from loraformat.cli.refusals import ANNOUNCED, COMMAND, PRINTED
from loraformat.model.assumptions import KEYS, USAGE, parse_value

if TYPE_CHECKING:
    from loraformat.diagnostics import Finding
    from loraformat.model.assumptions import Assumptions
    from loraformat.model.results.verbs import RenamedTensor
    from loraformat.report import Report
    from loraformat.storage import Publication

F = TypeVar("F", bound=Callable[..., Any])

_LONGEST_NOTE = 1000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


class Choice(click.Choice[str]):
    """One of some words; of one that is none, the nearest is named."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ANN401 - click's own
        """As click has it."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            words = list(map(str, self.choices))
            raise click.BadParameter(f"{error.message}{nearest_to(str(value), words)}", ctx=ctx, param=param) from error


def nearest_to(text: str, words: Iterable[str]) -> str:
    """` Did you mean json?`, to end a message with; "" where no word is like the text."""
    from loraformat.diagnostics import did_you_mean

    found = did_you_mean(text, words).strip()
    return f" {found[0].upper()}{found[1:]}" if found else ""


def size(value: str) -> int:
    """A number of bytes: 1500000, 200MB (10⁶), 64MiB (2²⁰), 1G."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]I?)?B?\s*", value.upper(), re.ASCII)
    count = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if count < 1:
        raise click.BadParameter(f"{value!r} is not a size of at least 1 byte; write 500MB or 1GiB")
    return count


def finite(value: str) -> float:
    """A number that is neither NaN nor infinite, nor written so large that it would become infinite."""
    from loraformat.jobs.inputs.strength import number_of

    number = number_of(value)
    if number is None:
        reason = " (the option before it needs a value)" if value.startswith("-") else ""
        raise click.BadParameter(f"{value!r}: expected a finite number{reason}")
    return number


def tolerance(value: str) -> float:
    """A finite number that is not negative."""
    number = finite(value)
    if number < 0:
        raise click.BadParameter(f"{value!r}: expected zero or more")
    return number


def assumption(value: str) -> tuple[str, float | bool | str | tuple[bool, ...] | tuple[str, ...]]:
    """KEY=VALUE, the value as JSON, as (key, value)."""
    key, separator, text = value.partition("=")
    if not separator or key not in KEYS:
        raise click.BadParameter(
            f"{value!r}: write KEY=VALUE with one of the keys {', '.join(KEYS)}.{nearest_to(key, KEYS)}"
        )
    try:
        return key, parse_value(key, text)
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected {KEYS[key].expected}") from None


alpha = click.option("--alpha", type=finite, help="Alpha, for files that do not state it; short for --assume alpha=A.")
_assume = click.option(
    "--assume",
    "assume",
    type=assumption,
    metavar="KEY=VALUE",
    multiple=True,
    help=f"What the files leave out: {USAGE}. Fills gaps, never contradicts the files.",
)
_COMPONENT = "loraformat.component"


def _remembered(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Keep --component for `assumptions`: it is another spelling of --assume."""
    del parameter
    if value is not None:
        context.meta[_COMPONENT] = assumption(f"component={value}")


_component = click.option(
    "--component",
    metavar="NAME",
    expose_value=False,
    callback=_remembered,
    help="The pipeline component that a file is for, if the file does not say; short for --assume component=NAME.",
)


def assume(command: Callable[..., Any]) -> Callable[..., Any]:
    """--assume and --component."""
    return _assume(_component(command))


base = click.option(
    "--base",
    metavar="BASE",
    shell_complete=completers.paths,
    help="The base model: a folder, one weight file, s3://bucket/prefix or hf://owner/name. Only headers are read.",
)
base_values = click.option(
    "--base",
    metavar="BASE",
    shell_complete=completers.paths,
    help="The base model: a folder or one weight file. Headers are read; for norms, also the adapted weights.",
)
MOST_JOBS = 256
_TASK_JOBS = 4  # threads of a task on a cluster, where nobody says how many
jobs = click.option(
    "--jobs",
    type=click.IntRange(1, MOST_JOBS),
    default=None,
    help="Threads; default: one per CPU, at most 8.",
)
recursive = click.option(
    "--recursive/--no-recursive",
    default=True,
    show_default=True,
    help="Also search folders for adapters in subfolders, down to 16 levels.",
)
source_format = click.option(
    "--from",
    "source_format",
    metavar="FORMAT",
    shell_complete=completers.formats,
    help="Read as this format instead of detecting it.",
)


def remember(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """The value as it is; a refusal in JSON names the command and its subject."""
    del param
    ctx.meta[COMMAND] = ctx
    return value


output_format = click.option(
    "--format",
    "output_format",
    type=Choice(["text", "json"]),
    default="text",
    is_eager=True,
    callback=remember,
    help="Format of the report on stdout.",
)
_PUBLICATION = "loraformat.publication"


def _kept(context: click.Context, parameter: click.Parameter, value: Any) -> None:  # noqa: ANN401 - click's own
    """Keep an option of the Hub for `publication`."""
    assert parameter.name is not None
    context.meta.setdefault(_PUBLICATION, {})[parameter.name] = value


_of_the_hub = (
    click.option(
        "--private",
        is_flag=True,
        expose_value=False,
        callback=_kept,
        help="With -o hf://: make a new repository private.",
    ),
    click.option(
        "--create-pr",
        is_flag=True,
        expose_value=False,
        callback=_kept,
        help="With -o hf://: open a pull request instead of committing.",
    ),
    click.option(
        "--commit-message",
        metavar="TEXT",
        expose_value=False,
        callback=_kept,
        help="With -o hf://: message of the commit.",
    ),
    click.option(
        "--no-card", is_flag=True, expose_value=False, callback=_kept, help="With -o hf://: write no model card."
    ),
)


def publishing(command: Callable[..., Any]) -> Callable[..., Any]:
    """--private, --create-pr, --commit-message and --no-card."""
    for each in reversed(_of_the_hub):
        command = each(command)
    return command


def publication(out: str | None) -> Publication:
    """The options of the Hub as one value.

    Raises: UsageError: one is given, and `out` is not an address of the Hub.
    """
    from loraformat.storage import Publication, check_publication, is_hub

    given = click.get_current_context().meta.get(_PUBLICATION, {})
    chosen = Publication(
        private=given.get("private", False),
        create_pr=given.get("create_pr", False),
        commit_message=given.get("commit_message"),
        card=not given.get("no_card", False),
    )
    check_publication(chosen, is_hub=out is not None and is_hub(out))
    return chosen


_out = click.option(
    "-o",
    "--out",
    required=True,
    metavar="OUT",
    shell_complete=completers.paths,
    help="Folder to write, s3://bucket/prefix, or hf://owner/name[@branch]; it appears complete or not at all.",
)


def out(command: Callable[..., Any]) -> Callable[..., Any]:
    """-o, and the options of outputs on the Hub."""
    return _out(publishing(command))


container = click.option(
    "--container",
    type=Choice(["safetensors", "pt"]),
    help="Container of the weight files; default: the source's, or the format's own.",
)
force = click.option("--force", is_flag=True, help="Downgrade errors about config and metadata to warnings.")
partial = click.option(
    "--partial",
    is_flag=True,
    help="Leave out the tensors of an image adapter that loraformat cannot interpret, and list them.",
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")

CONTAINERS = {"safetensors": "safetensors", "pt": "torch", None: None}


def assumptions(pairs: tuple[tuple[str, Any], ...]) -> Assumptions:
    """The pairs of --assume as one value; UsageError where a key comes twice."""
    from loraformat.model.assumptions import Assumptions

    context = click.get_current_context(silent=True)
    if context is not None and _COMPONENT in context.meta:
        pairs = (*pairs, context.meta[_COMPONENT])
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise click.UsageError(f"--assume sets {twice} twice")
    return Assumptions(**dict(pairs))


def threads(jobs: int | None) -> int:
    """The value of --jobs, or its default."""
    return jobs or min(8, os.cpu_count() or 1)


def processors() -> int:
    """How many processors this process may use: those of its container or CPU set; at most MOST_JOBS."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST_JOBS, usable or 1)


_ENGINE = click.option(
    "--engine",
    default="threads",
    show_default=True,
    metavar="threads|ray[=ADDRESS]",
    help="What computes the output's files: threads of this process, or workers of a Ray cluster at ADDRESS or "
    "RAY_ADDRESS, or else on this machine.",
)
_RANK = click.option(
    "--rank",
    type=int,
    metavar="I",
    help="Compute share I (from 0) of --world shares of the output's files; --finish then publishes the output.",
)
_WORLD = click.option(
    "--world", type=int, metavar="N", help="Number of shares; each process computes the one of its --rank."
)
_FINISH = click.option(
    "--finish",
    is_flag=True,
    help="After all ranks: check that every share is complete and consistent, then publish the output.",
)


def distribution(command: F) -> F:
    """--engine, --rank, --world, --finish: who computes the files of an output."""
    return _ENGINE(_RANK(_WORLD(_FINISH(command))))


def jobs_for(engine: str, jobs: int | None) -> int:
    """Threads: as asked for; else all processors, or a few in each task of an engine."""
    return jobs or (processors() if engine == "threads" else _TASK_JOBS)


def keep_partial_output(how: str) -> None:
    """Say what a user may do about what is done when a signal ends the command; "" where it is removed."""
    from loraformat.cli import KEPT

    click.get_current_context().meta[KEPT] = how


def keeping(*, resume: bool, dry_run: bool, divided: bool) -> str:
    """What `keep_partial_output` says for a command that writes large outputs."""
    if divided:
        return "run the same command again to continue"
    return "run the same command with --resume to continue" if resume and not dry_run else ""


def present(report: Report, output_format: str, *, findings: bool = True) -> None:
    """Print a report on stdout.

    Args:
        findings: whether the text form repeats them; a verb that announced them before it wrote does not.
    """
    if output_format == "text" and not findings:
        report = replace(report, findings=())
    present_all((report,), output_format)


@contextmanager
def gc_paused() -> Iterator[None]:
    """A block without garbage collection: hundreds of thousands of small objects come into being, and none is garbage.

    It is a quarter of the time that a file of 200,000 tensors takes.
    """
    import gc

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def present_all(reports: Sequence[Report], output_format: str) -> None:
    """Print the reports of a command on several subjects: in JSON one object for one report, else a list."""
    from loraformat.report import render_all

    terminal = sys.stdout.isatty()
    width = _columns() if terminal else None
    color = terminal and "NO_COLOR" not in os.environ
    say(render_all(reports, output_format, width=width, color=color))


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def say(text: str) -> None:
    """Print text on stdout as it is: no wrapping, no colors."""
    ctx = click.get_current_context(silent=True)
    if ctx is not None:
        ctx.meta[PRINTED] = True
    sys.stdout.write(text)
    sys.stdout.flush()


def write_text(path: str, text: str) -> None:
    """Text into a file, which is there whole or not at all, or through a link, a pipe or a device; see `write_to`.

    Raises: StorageError: it cannot be written.
    """
    from loraformat.storage import write_to

    write_to(path, text.encode("utf-8"))


def note(lines: Sequence[str]) -> None:
    """Say on stderr what was passed over."""
    from loraformat.diagnostics import show

    for line in lines:
        click.echo(f"note: {show(line, _LONGEST_NOTE)}", err=True)


def announce(findings: tuple[Finding, ...]) -> None:
    """Tell findings on stderr before anything is written."""
    if not findings:
        return
    from loraformat.report.terminal.text import render_findings

    ctx = click.get_current_context(silent=True)
    if ctx is not None:
        ctx.meta[ANNOUNCED] = (*ctx.meta.get(ANNOUNCED, ()), *findings)
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    sys.stderr.write(render_findings(findings, color=color))
    sys.stderr.flush()


def announce_names(renamed: tuple[RenamedTensor, ...], idle: tuple[str, ...]) -> None:
    """Print what `--map` makes of names, where nothing else of the adapter can be printed."""
    from loraformat.report.terminal.text import render_names

    say(render_names(renamed, idle, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
