"""Project settings of `validate`: loraformat.toml, or [tool.loraformat] in pyproject.toml."""

from __future__ import annotations

import fnmatch
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraformat.diagnostics import show
from loraformat.errors import ConfigError, UsageError
from loraformat.storage import is_local
from loraformat.storage.platform import READ_FLAGS, is_same_file

# In a project's root the first of them decides.
NAMES = ("loraformat.toml", "pyproject.toml")
_LARGEST = 1 << 20
_FAIL_ON = ("error", "warning", "never")


@dataclass(frozen=True, slots=True, kw_only=True)
class PathIgnores:
    """What is not told of the adapters below some paths.

    Attributes:
        path: a glob, relative to the folder of the settings; `**` crosses folders.
        reasons: code or prefix → why.
    """

    path: str
    reasons: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The table `[validate]`.

    Attributes:
        source: the file; "" where there is none.
    """

    source: str = ""
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    max_lora_rank: int | None = None
    fail_on: str = "error"
    per_path: tuple[PathIgnores, ...] = field(default=())

    def reasons_for(self, adapter: str) -> dict[str, str]:
        """Code or prefix → why it is not told about the adapter at a path."""
        root = os.path.dirname(os.path.abspath(self.source)) if self.source else os.getcwd()
        try:
            path = os.path.relpath(os.path.abspath(adapter), root).replace(os.sep, "/")
        except ValueError:  # on another drive of Windows
            return {}
        found: dict[str, str] = {}
        for ignores in self.per_path:
            if _matches(path, ignores.path):
                found.update(ignores.reasons)
        return found


def find_settings(start: str, judged: Sequence[str] = ()) -> Settings:
    """The settings of the project that `start` lies in; those of nobody where there are none.

    Roots of projects are folders with `.git` or `pyproject.toml`. From `start` upward the first root with settings
    decides, and none above a `.git` is looked at. What is judged has no say: a root in the folder of a judged adapter
    is passed over, and its `.git` ends nothing.

    Args:
        judged: paths of the adapters; addresses among them lie nowhere here.

    Raises: ConfigError (LF103): a file that is no TOML. UsageError (LF021): an unknown key or code, a value of the
        wrong kind, a file that is not regular or is too large, or that is a link into the checked adapters.
    """
    theirs = [path for path in judged if is_local(path)]
    for folder in _upward(os.path.realpath(start)):
        if any(_brings(path, folder) for path in theirs):
            continue
        is_repository = os.path.lexists(os.path.join(folder, ".git"))
        if is_repository or os.path.lexists(os.path.join(folder, "pyproject.toml")):
            for name in NAMES:
                found = _found(os.path.join(folder, name), name, theirs)
                if found is not None:
                    return found
        if is_repository:
            break
    return Settings()


def read_settings(path: str) -> Settings:
    """The settings of one file. Raises: as `find_settings`."""
    try:
        table = _table(path, os.path.basename(path))
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=path) from error
    if table is None:
        raise UsageError("expected a table [tool.loraformat]", where=path)
    return _settings(table, path)


def passed_over(start: str, settings: Settings) -> str:
    """The nearest loraformat.toml upward that is not obeyed, below the settings that are; "" where there is none."""
    for folder in _upward(os.path.realpath(start)):
        path = os.path.join(folder, NAMES[0])
        if settings.source and folder == os.path.dirname(settings.source):
            break
        if os.path.lexists(path):
            return path
        if os.path.lexists(os.path.join(folder, ".git")):
            break
    return ""


def _upward(folder: str) -> Iterator[str]:
    """The folder and all above it."""
    while True:
        yield folder
        parent = os.path.dirname(folder)
        if parent == folder:
            return
        folder = parent


def _brings(path: str, folder: str) -> bool:
    """Whether a folder comes with what is judged: it lies in the judged folder, or is that of the judged file."""
    real = os.path.realpath(path)
    if os.path.isdir(real):
        return _is_inside(folder, real)
    return folder in (os.path.realpath(os.path.dirname(path)), os.path.dirname(real))


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _found(path: str, name: str, judged: Sequence[str]) -> Settings | None:
    """The settings of a file of a project's root; None where it is not there, or says nothing about this tool."""
    try:
        table = _table(path, name)
    except FileNotFoundError:
        return None
    if table is None:
        return None
    real = os.path.realpath(path)
    if any(_is_inside(real, os.path.realpath(each)) for each in judged):
        raise UsageError(
            "a link into the checked adapters", where=path, hint="pass a file with --config, or use --isolated"
        )
    return _settings(table, path)


def _table(path: str, name: str) -> Mapping[str, Any] | None:
    """The table of loraformat in a file; None where pyproject.toml has none.

    Raises: FileNotFoundError: there is no such file.
    """
    content = _content(path)
    if name == "pyproject.toml" and b"loraformat" not in content:
        return None
    document = _parsed(content, path)
    if name != "pyproject.toml":
        return document
    tool = document.get("tool")
    found = tool.get("loraformat") if isinstance(tool, dict) else None
    return found if isinstance(found, dict) else None


def _content(path: str) -> bytes:
    """The bytes of a regular file of at most 1 MiB.

    Asked before it is opened, since opening a device may act and opening a pipe waits, and again afterwards.
    """
    try:
        status = os.stat(path)
        _require_regular(status, path)
        if _is_stdin(status):
            raise UsageError("settings are not read from standard input", where=path)
        with open(path, "rb", opener=_open_without_waiting) as file:
            _require_regular(os.fstat(file.fileno()), path)
            content = file.read(_LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(path) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path) from error
    except ValueError as error:  # a NUL in the path
        raise UsageError("not a path", where=path) from error
    if len(content) > _LARGEST:
        raise UsageError(f"more than {_LARGEST} bytes", where=path)
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | READ_FLAGS)


def _require_regular(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UsageError("settings must be in a regular file", where=path)


def _is_stdin(status: os.stat_result) -> bool:
    try:
        return is_same_file(status, os.fstat(0))
    except OSError:  # there is none
        return False


def _parsed(content: bytes, path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document: dict[str, Any] = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of an integer of thousands of digits
        raise ConfigError(f"not valid TOML: {show(error)}", where=path) from error
    return document


def _settings(document: Mapping[str, Any], path: str) -> Settings:
    _require_keys(document, {"validate"}, path)
    table = document.get("validate", {})
    if not isinstance(table, dict):
        raise UsageError("validate: expected a table", where=path)
    _require_keys(table, {"select", "ignore", "target", "max-lora-rank", "fail-on", "per-path"}, path)
    rank = table.get("max-lora-rank")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise UsageError("max-lora-rank: expected a positive integer", where=path)
    fail_on = table.get("fail-on", "error")
    if fail_on not in _FAIL_ON:
        raise UsageError(f"fail-on: expected one of {', '.join(_FAIL_ON)}", where=path)
    per_path = table.get("per-path", [])
    if not isinstance(per_path, list):
        raise UsageError("per-path: expected a list of tables", where=path)
    return Settings(
        source=path,
        select=_codes(table.get("select", []), "select", path),
        ignore=_codes(table.get("ignore", []), "ignore", path),
        target=_texts(table.get("target", []), "target", path),
        max_lora_rank=rank,
        fail_on=fail_on,
        per_path=tuple(_ignores(each, number, path) for number, each in enumerate(per_path)),
    )


def _ignores(table: object, number: int, path: str) -> PathIgnores:
    where = f"per-path[{number}]"
    if not isinstance(table, dict) or not isinstance(table.get("path"), str):
        raise UsageError(f"{where}: expected a table with a path", where=path)
    _require_keys(table, {"path", "ignore"}, path)
    reasons = table.get("ignore")
    if not isinstance(reasons, dict) or not reasons:
        raise UsageError(f'{where}.ignore: expected {{ LF105 = "the reason" }}', where=path)
    codes = _codes(list(reasons), f"{where}.ignore", path)
    twice = next((code for code in codes if codes.count(code) > 1), None)
    if twice:
        raise UsageError(f"{where}.ignore: {twice} appears twice", where=path)
    for code, reason in zip(codes, reasons.values(), strict=True):
        if not isinstance(reason, str) or not reason.strip():
            raise UsageError(f"{where}.ignore.{code}: expected the reason as a string", where=path)
    return PathIgnores(path=table["path"], reasons=dict(zip(codes, reasons.values(), strict=True)))


def _require_keys(table: Mapping[str, Any], known: set[str], path: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise UsageError(f'unknown key "{show(unknown[0], 60)}", expected {", ".join(sorted(known))}', where=path)


def _texts(value: object, name: str, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UsageError(f"{name}: expected a list of strings", where=path)
    return tuple(value)


def _codes(value: object, name: str, path: str) -> tuple[str, ...]:
    from loraformat.jobs.explain import checked_codes

    return checked_codes(_texts(value, name, path), f"{path}: {name}")


def _matches(path: str, glob: str) -> bool:
    """Whether a path lies below a glob: `adapters/legacy/**` has the folder itself and all below it."""
    pattern = glob.rstrip("/")
    if pattern.endswith("/**") and fnmatch.fnmatchcase(path, pattern[:-3]):
        return True
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")
