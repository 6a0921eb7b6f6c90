"""lora_config.json, versions 0 and 1, read into typed fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraformat.diagnostics import in_file
from loraformat.errors import ConfigError, FormatError, UnsupportedUpdate
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.fields import (
    Config,
    as_boolean,
    as_integer,
    as_number,
    as_object,
    as_texts,
    optional_integer,
    optional_number,
    optional_text,
)
from loraformat.formats.kit.scaling import MAX_RANK, Scaling, agreed
from loraformat.formats.native.names import CONFIG
from loraformat.model.bundle import Json

MAX_ROWS = 2**31 - 1
MAX_CONFIG_BYTES = 16 * 2**20

BY_RANK = "alpha/rank"
BY_ROOT = "alpha/sqrt(rank)"

# What the layout keeps of the training for people and other tools; nothing is computed from it.
CARRIED = ("loraplus_lr_ratio", "tokenizer_sha256", "provenance")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeConfig:
    """What lora_config.json says.

    Attributes:
        version: 0 where `format_version` is absent, else 1.
        alpha: None where it is absent, which only version 0 allows.
        rows: weight → its row numbers, or the first of consecutive ones.
        tied: groups of weights, () for none, None for unknown.
    """

    raw: Config
    version: int
    rank: int
    alpha: float | None
    scaling: Scaling = field(default_factory=Scaling)
    rank_exceptions: Mapping[str, int] = field(default_factory=dict)
    alpha_exceptions: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    difference_scale: Mapping[str, float] = field(default_factory=dict)
    base: tuple[str | None, str | None, str | None] = (None, None, None)
    tied: tuple[tuple[str, ...], ...] | None = None

    def rank_of(self, module: str) -> int:
        """The declared rank of a module."""
        return self.rank_exceptions.get(module, self.rank)

    def alpha_of(self, module: str) -> float | None:
        """The stated alpha of a module."""
        return self.alpha_exceptions.get(module, self.alpha)


def parse(value: Json, hints: Hints) -> NativeConfig:
    """The config of version 0 or 1.

    Raises:
        FormatError: a version that this program does not know.
        UnsupportedUpdate: a method other than "lora".
        ConfigError: a field with a wrong type or outside its bounds, or one that contradicts a hint.
    """
    raw = as_object(value, in_file(CONFIG))
    version = _version(raw)
    method = optional_text(raw, "method", CONFIG)
    if method != "lora" and (method is not None or version):
        raise UnsupportedUpdate(f'method "{method}" is not supported, only "lora"', where=in_file(CONFIG, "method"))
    rank = optional_integer(raw, "rank", CONFIG, 1, MAX_RANK)
    rank = agreed(rank, hints.rank, "rank", in_file(CONFIG, "rank"))
    if rank is None:
        raise ConfigError("the rank is missing", where=in_file(CONFIG, "rank"), hint="pass it with --assume rank=R")
    alpha = optional_number(raw, "alpha", CONFIG)
    if version:
        _check_carried(raw)
    if version == 0:
        return NativeConfig(raw=raw, version=0, rank=rank, alpha=alpha, base=_base(raw), tied=_tied_0(raw))
    if alpha is None:
        raise ConfigError("alpha is missing; version 1 requires it", where=in_file(CONFIG, "alpha"))
    return NativeConfig(
        raw=raw,
        version=1,
        rank=rank,
        alpha=alpha,
        scaling=_scaling(raw),
        rank_exceptions={
            module: as_integer(exception, in_file(CONFIG, "rank_exceptions", module), 1, MAX_RANK)
            for module, exception in _object(raw, "rank_exceptions").items()
        },
        alpha_exceptions=_numbers(raw, "alpha_exceptions"),
        rows={weight: _rows(weight, rows) for weight, rows in _object(raw, "rows").items()},
        difference_scale=_numbers(raw, "difference_scale"),
        base=_base(raw),
        tied=_tied(raw),
    )


def _version(raw: Config) -> int:
    if "format_version" not in raw:
        return 0
    version = raw["format_version"]
    if version != 1 or isinstance(version, (bool, float)):
        raise FormatError(
            f"format_version {version!r} is unknown; this version reads 0 (no format_version) and 1",
            where=in_file(CONFIG, "format_version"),
            hint="update loraformat",
        )
    return 1


def _check_carried(raw: Config) -> None:
    ratio, digest = optional_number(raw, CARRIED[0], CONFIG), optional_text(raw, CARRIED[1], CONFIG)
    if ratio is not None and ratio <= 0:
        raise ConfigError(f"expected a positive number, found {ratio:g}", where=in_file(CONFIG, CARRIED[0]))
    if digest is not None and not _SHA256.fullmatch(digest):
        raise ConfigError("expected 64 hexadecimal digits", where=in_file(CONFIG, CARRIED[1]))
    if raw.get(CARRIED[2]) is not None:
        _object(raw, CARRIED[2])


def _object(raw: Config, name: str) -> dict[str, Json]:
    return as_object(raw.get(name, {}), in_file(CONFIG, name))


def _numbers(raw: Config, name: str) -> dict[str, float]:
    return {key: as_number(value, in_file(CONFIG, name, key)) for key, value in _object(raw, name).items()}


def _scaling(raw: Config) -> Scaling:
    rule = optional_text(raw, "scaling", CONFIG) or BY_RANK
    if rule not in (BY_RANK, BY_ROOT):
        raise ConfigError(f'expected "{BY_RANK}" or "{BY_ROOT}", found "{rule}"', where=in_file(CONFIG, "scaling"))
    return Scaling(by_root=rule == BY_ROOT)


def _rows(weight: str, value: Json) -> int | tuple[int, ...]:
    where = in_file(CONFIG, "rows", weight)
    if not isinstance(value, list):
        return as_integer(value, where, 0, MAX_ROWS)
    rows = tuple(as_integer(row, where.at(number), 0, MAX_ROWS) for number, row in enumerate(value))
    if len(set(rows)) != len(rows):
        raise ConfigError("a row number occurs twice", where=where)
    return rows


def _base(raw: Config) -> tuple[str | None, str | None, str | None]:
    value = raw.get("base_model")
    where = in_file(CONFIG, "base_model")
    if value is None:
        return None, None, None
    if isinstance(value, str):
        return value, None, None
    fields = as_object(value, where)
    return (
        optional_text(fields, "name", where),
        optional_text(fields, "revision", where),
        optional_text(fields, "fingerprint", where),
    )


def _tied_0(raw: Config) -> tuple[tuple[str, ...], ...] | None:
    return () if raw.get("tied") is False else None


def _tied(raw: Config) -> tuple[tuple[str, ...], ...] | None:
    value, where = raw.get("tied"), in_file(CONFIG, "tied")
    if value is None:
        return None
    if not isinstance(value, list):
        if as_boolean(value, where):
            raise ConfigError("expected false, null or a list of groups of weight names, found true", where=where)
        return ()
    groups = tuple(as_texts(group, where.at(number)) for number, group in enumerate(value))
    if any(len(set(group)) < 2 for group in groups):
        raise ConfigError("a group must name at least two weights", where=where)
    return groups
