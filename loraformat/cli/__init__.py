"""The command line: a lazy group of commands, and the one place where errors become text and exit codes."""

from __future__ import annotations

import _thread
import importlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any

import click

from loraformat._version import __version__
from loraformat.cli.refusals import (
    INTERNAL_ERROR,
    LONGEST_FAULT,
    WANTS_JSON,
    asks_for_json,
    exit_code_of,
    finding_of,
    print_json,
    say_error,
)
from loraformat.diagnostics import show
from loraformat.errors import AdapterRefused, LoraFormatError, UsageError
from loraformat.machine import ENDING, require_little_endian, send

__all__ = ["COMMANDS", "KEPT", "LazyGroup", "Terminated", "main"]

# Command → one line of help. The module of a command has its name; none is imported until it is chosen.
COMMANDS = {
    "inspect": "Show what is in an adapter: format, ranks, scales, parameters, norms.",
    "diff": "Compare two adapters or two checkpoints: which weights changed, how much, at what rank.",
    "plot": "Plot adapters as one self-contained HTML page, or as a figure.",
    "estimate": "Estimate what an adapter for a base would cost: parameters, file size, training memory.",
    "validate": "Check an adapter for errors, alone or against its base.",
    "convert": "Convert an adapter to another format.",
    "merge": "Merge adapters into a base model.",
    "dequantize": "Write a quantized model with all of its weights dense.",
    "resize": "Change the ranks of an adapter, by truncated SVD.",
    "combine": "Combine several adapters into one.",
    "scale": "Multiply the updates of an adapter by a number.",
    "pick": "Keep only some of an adapter's updates, or rename them.",
    "extract": "Extract a LoRA from a fine-tuned model and its base.",
    "unmerge": "Undo a merge: remove adapters from a merged model.",
    "ablate": "Remove directions from the weights of a model, as an adapter or merged.",
    "init": "Create an untrained adapter for a base.",
    "stamp": "Record in an adapter which base it was trained on.",
    "card": "Write the model card of an adapter or a model for the Hub.",
    "verify": "Check a merged model against the manifest that merge wrote.",
    "formats": "List the formats: what each can read, write and not express.",
    "explain": "Explain a code such as LF202.",
    "demo": "Inspect, validate, convert and merge a small generated example.",
    "completion": "Print the completion script for bash, zsh or fish.",
    "help": "Show this list, or the options of a command.",
    "version": "Show the version.",
}

# Commands that stand in the module of another: the version of the tool itself, like help; a merge of no adapter; an
# adapter that is written again in its own format; adapters that are made of others, or of models.
_BESIDE = {
    "version": "help",
    "dequantize": "merge",
    "stamp": "convert",
    "card": "verify",
    "resize": "algebra.resize",
    "combine": "algebra.combine",
    "scale": "algebra.scale",
    "pick": "algebra.pick",
    "extract": "algebra.extract",
    "unmerge": "algebra.unmerge",
    "ablate": "algebra.ablate",
    "init": "algebra.init",
}
_IMPORT_POLL_S = 0.05

# In the context's meta: how one goes on with what a command keeps when a signal ends it; empty where it keeps nothing.
KEPT = "loraformat.kept"


class Terminated(BaseException):
    """SIGTERM, SIGHUP or SIGBREAK arrived: clean up and leave with 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, and whose errors are reported in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of COMMANDS."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"loraformat.cli.commands.{_BESIDE.get(cmd_name, cmd_name)}")
        command = getattr(module, cmd_name if cmd_name in _BESIDE else "command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> Any:  # noqa: ANN401 - click's own
        """As click has it; once a process of our own is done, an interrupt has nothing left to interrupt."""
        if args is None:
            from loraformat.engine.resources import guard_imports

            guard_imports()
        # A stream that the caller closed takes what is printed, and keeps nothing.
        sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it lasts as long as we do
        sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped; nothing fails for a name
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(args, *more, **named)
        finally:
            if args is None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **named: Any) -> click.Context:  # noqa: ANN401 - click's own
        """As click has it; what it quotes of the command line is safe to print."""
        wants_json = asks_for_json(args)  # click takes from `args` what it has parsed
        try:
            ctx = super().make_context(info_name, args, *more, **named)
        except click.UsageError as error:
            if error.ctx is not None:
                error.ctx.meta[WANTS_JSON] = wants_json
            raise _Fault(error) from error
        ctx.meta[WANTS_JSON] = wants_json
        return ctx

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click has it; a path that looks like an option is never taken for one.

        Hooks and globs put names that strangers chose on the command line, and may have left out the `--` before them.
        """
        if args[0] not in COMMANDS and args[0][:1] != "-" and not ctx.resilient_parsing:
            ctx.fail(_no_command(args[0]))
        name, command, rest = super().resolve_command(ctx, args)
        options = rest[: rest.index("--")] if "--" in rest else rest
        path = next((each for each in options if each[:1] == "-" and len(each) > 1 and os.path.lexists(each)), None)
        if path is not None and not ctx.resilient_parsing:
            ctx.fail(f"{path!r} is an option and also the name of a file; put -- before paths, or write ./{path}")
        return name, command, rest

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; whatever it raises becomes a message on stderr and an exit code."""
        try:
            require_little_endian()
            with _signals():
                return super().invoke(ctx)
        except click.UsageError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            if error.ctx is None and command is not None:  # click's parser does not know of which command it is
                error.ctx = click.Context(command, ctx, ctx.invoked_subcommand)
            raise _Fault(error) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            if ctx.parent is not None:  # a command of the demo, which ends as well
                raise
            # The reader of stdout has gone: nobody is left to tell, and Python must not complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except Terminated as signalled:
            click.echo(_interrupted(ctx), err=True)
            ctx.exit(128 + signalled.number)
        except BaseException as error:  # noqa: BLE001 - the outermost frame: nobody else could tell it
            ctx.exit(_told(error, ctx))


class _Fault(click.UsageError):
    """What click has to say, in text that is safe to print whatever was on the command line."""

    def __init__(self, error: click.UsageError) -> None:
        self._is_help = isinstance(error, click.exceptions.NoArgsIsHelpError)
        self._said = error.format_message()
        said = error.format_message()
        if not self._is_help:
            said = "\n".join(show(line, LONGEST_FAULT) for line in said.splitlines())
        super().__init__(said, error.ctx)

    def show(self, file: IO[Any] | None = None) -> None:
        """The message as click prints it; of a command without arguments its help."""
        if self._is_help:
            click.echo(self.format_message(), file=file, err=True)
        else:
            super().show(file)
            print_json(self.ctx, [UsageError(self._said).finding()])


def _no_command(name: str) -> str:
    """What is said of a first word that is not a command: a path is one that was meant for some command."""
    from loraformat.diagnostics import did_you_mean

    if "://" in name:
        from loraformat.storage import uri_of

        try:
            uri_of(name)
        except LoraFormatError as error:  # it may hold a password, which must not be repeated
            return str(error)
    if os.path.lexists(name) or "://" in name:
        return f"{name!r} is a path, not a command. Did you mean loraformat inspect {name}?"
    near = did_you_mean(name, COMMANDS).strip()
    return f"{name!r} is not a command.{f' {near[0].upper()}{near[1:]}' if near else ''}"


def _interrupted(ctx: click.Context) -> str:
    if ctx.meta.get(KEPT):
        return f"interrupted: finished files are kept; {ctx.meta[KEPT]}"
    return "interrupted: no partial output is left"


def _told(error: BaseException, ctx: click.Context) -> int:
    """Print an error the way users see it and return its exit code."""
    if not isinstance(error, LoraFormatError):
        from loraformat.engine.resources import as_out_of_resources

        error = as_out_of_resources(error) or error
    code = exit_code_of(error)
    if os.environ.get("LORAFORMAT_DEBUG"):
        import traceback

        for line in "".join(traceback.format_exception(error)).splitlines():
            click.echo(show(line, LONGEST_FAULT), err=True)
    if isinstance(error, LoraFormatError):
        say_error(error)
    elif isinstance(error, KeyboardInterrupt):
        click.echo(_interrupted(ctx), err=True)
    elif isinstance(error, OSError):
        click.echo(f"error: {show(error)}", err=True)
    elif isinstance(error, SystemExit):
        raise error
    if not isinstance(error, KeyboardInterrupt):
        more = error.findings if isinstance(error, AdapterRefused) else ()
        print_json(ctx, [finding_of(error, f"{type(error).__name__}: {error}"), *more])
    if code is not None:
        return code
    kind = show(type(error).__name__)
    click.echo(f"internal error: {kind}: {show(error)} (LORAFORMAT_DEBUG=1 shows where; please report it)", err=True)
    return INTERNAL_ERROR


@contextmanager
def _signals() -> Iterator[None]:
    """The signals of `ENDING` as exceptions, so that partial output is removed; only in the main thread.

    Not in the middle of an import: compiled modules that call back into Python while they start, torch's for one, abort
    the process when that raises. The signal comes again when the import may have ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            _thread.start_new_thread(_send_later, (number,))  # takes no lock that the import may hold
            return
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    numbers = [number for number in ENDING if number != signal.SIGINT]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or not ours to handle
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send_later(number: int) -> None:
    time.sleep(_IMPORT_POLL_S)
    send(number)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in one of the frames from `frame` up to the begin of the command."""
    while frame is not None and frame.f_code is not LazyGroup.invoke.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loraformat")
def main() -> None:
    """LoRA adapters on disk: inspect, validate, convert and merge them without loading a model."""
