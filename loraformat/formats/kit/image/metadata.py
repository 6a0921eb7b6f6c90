"""Headers that are read: diffusers' `lora_adapter_metadata`, trainers' fields, ModelSpec.

Source: diffusers 0.42.1, loaders/lora_base.py `LORA_ADAPTER_METADATA_KEY`; Stability AI, ModelSpec 1.0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loraformat import strict_json
from loraformat.budget import Budget
from loraformat.diagnostics import FindingLocation, in_file
from loraformat.errors import ConfigError, InvalidJson
from loraformat.formats.kit.image.names import RawModule
from loraformat.model.bundle import Json
from loraformat.model.patterns.keys import OutOfSteps, PatternKeys

KEY = "lora_adapter_metadata"
_LIMIT = 1 << 22
# What binds to the bytes of the tensors, or to the file: true of no other file.
BOUND = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "modelspec.thumbnail", KEY, "format")


class StatedScales:
    """The scales that `lora_adapter_metadata` gives, by component and module."""

    def __init__(self, metadata: Mapping[str, str], file: str, budget: Budget | None = None) -> None:
        """Raises: ConfigError (LF103): it is there and cannot be understood."""
        self._where = in_file(file, KEY)
        self._fields: dict[str, dict[str, Json]] = {}
        self._budget = budget or Budget()
        self._patterns: dict[tuple[str, str], PatternKeys] = {}
        for name, value in self._parsed(metadata).items():
            component, dot, setting = name.partition(".")
            if not dot:
                raise ConfigError(f'expected names such as "unet.r", found "{name}"', where=self._where)
            self._fields.setdefault(component, {})[setting] = value

    def _parsed(self, metadata: Mapping[str, str]) -> dict[str, Json]:
        text = metadata.get(KEY)
        if text is None:
            return {}
        try:
            value = strict_json.parse(text.encode("utf-8", "surrogatepass"), KEY, limit=_LIMIT)
        except InvalidJson as error:
            raise ConfigError(
                f"{KEY} is not valid JSON, so the scale in it is unknown: {error.message}", where=self._where
            ) from error
        if not isinstance(value, dict):
            raise ConfigError(f"{KEY}: expected an object", where=self._where)
        return value

    @property
    def components(self) -> tuple[str, ...]:
        """Those that it speaks of."""
        return tuple(self._fields)

    def is_dora(self, component: str) -> bool:
        """Whether the component is said to be DoRA."""
        return self._fields.get(component, {}).get("use_dora") is True

    def of(self, component: str, module: RawModule, rank: int) -> float | None:
        """The scale of a module, or None where nothing is stated for its component.

        Raises: ConfigError (LF103): a field that is not of its form, or another rank than the tensors have.
        """
        fields = self._fields.get(component)
        if fields is None or "r" not in fields:
            return None
        stated = self._number(component, "rank_pattern", "r", module.path)
        alpha = self._number(component, "alpha_pattern", "lora_alpha", module.path)
        if stated != rank:
            raise ConfigError(
                f"{KEY} states rank {stated:g} for {module.name}, its tensors have {rank}",
                where=self._at(component, "r"),
            )
        by_root = fields.get("use_rslora", False)
        if not isinstance(by_root, bool):
            raise ConfigError("use_rslora: expected true or false", where=self._at(component, "use_rslora"))
        return alpha / (math.sqrt(rank) if by_root else rank)

    def _at(self, component: str, setting: str) -> FindingLocation:
        return self._where.at(f"{component}.{setting}")

    def _number(self, component: str, patterns: str, setting: str, path: str) -> float:
        found: Any = self._fields[component].get(patterns) or {}
        if not isinstance(found, dict):
            raise ConfigError("expected an object", where=self._at(component, patterns))
        keys = self._patterns.setdefault((component, patterns), PatternKeys(list(found), self._budget))
        if keys.unread:
            raise ConfigError(
                f"the pattern {keys.unread[0][:80]!r} is not evaluated: matching it could take forever",
                where=self._at(component, patterns),
            )
        try:
            key = keys.first_match(path)
        except OutOfSteps as error:
            raise ConfigError(
                "too many patterns to match against so many names", where=self._at(component, patterns)
            ) from error
        where = self._at(component, setting if key is None else patterns)
        value: object = self._fields[component].get(setting, 8) if key is None else found[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
            raise ConfigError(f"expected a number other than 0, found {value!r}"[:200], where=where)
        return float(value)


def kept(metadata: Mapping[str, str]) -> dict[str, Json]:
    """The header as the config of an adapter: everything, as the file has it."""
    return dict(sorted(metadata.items()))


def hints_of_model(metadata: Mapping[str, str]) -> str:
    """Text that may name the model: trusted for nothing but a choice among families that all fit."""
    # musubi-tuner writes the architecture of SDXL for all models, so its own field comes first.
    names = ("ss_base_model_version", "modelspec.architecture", "ss_network_module", "modelspec.implementation")
    said = [metadata[name] for name in names if name in metadata]
    return said[0][:200] if said else ""
