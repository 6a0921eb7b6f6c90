"""What a project says about how its adapters are checked: loraformat.toml, or [tool.loraformat] in pyproject.toml."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraformat.diagnostics import show
from loraformat.errors import ConfigError

_CODE = re.compile(r"LF\d{0,3}")
_LARGEST = 1 << 20
# The files of the formats that are folders, the one that a folder must have first.
_FOLDERS = (
    ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    ("lora_config.json", "lora_weights.safetensors", "lora_weights.pt", "embedding_weights.safetensors"),
)
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
        path = os.path.relpath(os.path.abspath(adapter), root).replace(os.sep, "/")
        found: dict[str, str] = {}
        for ignores in self.per_path:
            if _matches(path, ignores.path):
                found.update(ignores.reasons)
        return found


def find_settings(start: str) -> Settings:
    """The settings of the nearest folder from `start` upward that has some; those of nobody where none has.

    Raises: ConfigError (LF103): a file that is no TOML, an unknown key, or a value of the wrong kind.
    """
    folder = os.path.abspath(start)
    while True:
        for name in ("loraformat.toml", "pyproject.toml"):
            path = os.path.join(folder, name)
            table = _table(path, name)
            if table is not None:
                return _settings(table, path)
        parent = os.path.dirname(folder)
        if parent == folder:
            return Settings()
        folder = parent


def read_settings(path: str) -> Settings:
    """The settings of one file. Raises: ConfigError (LF103)."""
    table = _table(path, os.path.basename(path))
    if table is None:
        raise ConfigError("expected a table [tool.loraformat]", where=path)
    return _settings(table, path)


def folders_of(paths: Sequence[str]) -> tuple[str, ...]:
    """The adapters that paths stand for, each once, in their order: a file of a folder stands for the folder."""
    return tuple(dict.fromkeys(_folder_of(path) for path in paths))


def _folder_of(path: str) -> str:
    folder, name = os.path.split(path)
    is_part = any(name in files and os.path.isfile(os.path.join(folder, files[0])) for files in _FOLDERS)
    return (folder or ".") if is_part and os.path.isfile(path) else path


def _table(path: str, name: str) -> Mapping[str, Any] | None:
    """The table of loraformat in a file; None where the file, or the table in pyproject.toml, is missing."""
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path) from error
    if name == "pyproject.toml" and b"loraformat" not in content:
        return None
    document = _parsed(content, path)
    if name != "pyproject.toml":
        return document
    tool = document.get("tool")
    found = tool.get("loraformat") if isinstance(tool, dict) else None
    return found if isinstance(found, dict) else None


def _parsed(content: bytes, path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document: dict[str, Any] = tomllib.loads(content[:_LARGEST].decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"no TOML: {show(error)}", where=path) from error
    return document


def _settings(document: Mapping[str, Any], path: str) -> Settings:
    _require_keys(document, {"validate"}, path)
    table = document.get("validate", {})
    if not isinstance(table, dict):
        raise ConfigError("validate: expected a table", where=path)
    _require_keys(table, {"select", "ignore", "target", "max-lora-rank", "fail-on", "per-path"}, path)
    rank = table.get("max-lora-rank")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ConfigError("max-lora-rank: expected a positive integer", where=path)
    fail_on = table.get("fail-on", "error")
    if fail_on not in _FAIL_ON:
        raise ConfigError(f"fail-on: expected one of {', '.join(_FAIL_ON)}", where=path)
    per_path = table.get("per-path", [])
    if not isinstance(per_path, list):
        raise ConfigError("per-path: expected a list of tables", where=path)
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
        raise ConfigError(f"{where}: expected a table with a path", where=path)
    _require_keys(table, {"path", "ignore"}, path)
    reasons = table.get("ignore")
    if not isinstance(reasons, dict) or not reasons:
        raise ConfigError(f'{where}.ignore: expected {{ LF105 = "the reason" }}', where=path)
    _codes(list(reasons), f"{where}.ignore", path)
    for code, reason in reasons.items():
        if not isinstance(reason, str) or not reason.strip():
            raise ConfigError(f"{where}.ignore.{code}: expected the reason as a text", where=path)
    return PathIgnores(path=table["path"], reasons=reasons)


def _require_keys(table: Mapping[str, Any], known: set[str], path: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigError(f'unknown key "{show(unknown[0], 60)}", expected {", ".join(sorted(known))}', where=path)


def _texts(value: object, name: str, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{name}: expected a list of texts", where=path)
    return tuple(value)


def _codes(value: object, name: str, path: str) -> tuple[str, ...]:
    codes = _texts(value, name, path)
    for code in codes:
        if _CODE.fullmatch(code) is None:
            raise ConfigError(f'{name}: expected a code or its beginning, found "{show(code, 40)}"', where=path)
    return codes


def _matches(path: str, glob: str) -> bool:
    """Whether a path lies below a glob: `adapters/legacy/**` has the folder itself and all below it."""
    pattern = glob.rstrip("/")
    if pattern.endswith("/**") and fnmatch.fnmatchcase(path, pattern[:-3]):
        return True
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")
