"""LitGPT's hyperparameters.yaml and model_config.yaml, read into typed fields.

Source: litgpt 0.5.13, litgpt/scripts/merge_lora.py `load_lora_metadata`; litgpt/config.py `Config`.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.diagnostics import in_file
from loraformat.errors import ConfigError, MissingFile
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.blocks import Runs
from loraformat.formats.kit.fields import (
    Config,
    as_integer,
    as_object,
    as_text,
    optional_boolean,
    optional_integer,
    optional_number,
    optional_text,
)
from loraformat.formats.kit.scaling import MAX_RANK, agreed
from loraformat.model.bundle import Bundle, JsonFile
from loraformat.naming import Family, family_of

WEIGHTS = "lit_model.pth.lora"
SETTINGS = "hyperparameters.yaml"
MODEL = "model_config.yaml"
OWN_FILES = (WEIGHTS, SETTINGS, MODEL)

PARTS = ("attn.q", "attn.k", "attn.v")

_MOST_HEADS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LitConfig:
    """What the two files say.

    Attributes:
        rank, alpha: None where hyperparameters.yaml is missing or does not state them.
        enabled: whether query, key and value are adapted; None for unknown.
        heads, groups, head_size: of the attention.
        base_model: name on the Hub as model_config.yaml has it (`hf_config`), else `checkpoint_dir`.
    """

    raw: Config
    family: Family
    rank: int | None
    alpha: float | None
    enabled: tuple[bool, bool, bool] | None
    heads: int
    groups: int
    head_size: int
    base_model: str | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows of query, key and value."""
        keys = self.groups * self.head_size
        return self.heads * self.head_size, keys, keys

    def runs(self, part: int) -> Runs:
        """Rows of the joined weight that query (0), key (1) or value (2) fill: group by group where interleaved."""
        start = sum(self.sizes[:part])
        if not self.family.is_interleaved:
            return [(start, start + self.sizes[part])]
        each = self.heads // self.groups
        first = (0, each, each + 1)[part] * self.head_size
        height = (each if part == 0 else 1) * self.head_size
        group = (each + 2) * self.head_size
        return [(at * group + first, at * group + first + height) for at in range(self.groups)]


def parse(bundle: Bundle, hints: Hints) -> LitConfig:
    """The config of an adapter.

    Raises:
        MissingFile (LF101): no model_config.yaml, which alone says what query, key and value are called and how long.
        ConfigError (LF103): a field with a wrong type, or one that contradicts a hint.
    """
    model, raw = _file(bundle, MODEL), _file(bundle, SETTINGS)
    if model is None:
        raise MissingFile(f"{MODEL} is missing", where=bundle.uri, hint="LitGPT saves it next to the weights")
    raw = raw or {}
    heads = as_integer(model.get("n_head"), in_file(MODEL, "n_head"), 1, _MOST_HEADS)
    groups = optional_integer(model, "n_query_groups", MODEL, 1, _MOST_HEADS) or heads
    size = optional_integer(model, "head_size", MODEL, 1, _MOST_HEADS)
    if size is None:
        size = as_integer(model.get("n_embd"), in_file(MODEL, "n_embd"), 1, 1 << 30) // heads
    if heads % groups:
        raise ConfigError(
            f"{heads} heads cannot be divided among {groups} groups", where=in_file(MODEL, "n_query_groups")
        )
    return LitConfig(
        raw=raw,
        family=family_of(
            as_text(model.get("name"), in_file(MODEL, "name")), optional_text(model, "mlp_class_name", MODEL) or ""
        ),
        rank=agreed(optional_integer(raw, "lora_r", SETTINGS, 1, MAX_RANK), hints.rank, "rank", in_file(SETTINGS)),
        alpha=optional_number(raw, "lora_alpha", SETTINGS),
        enabled=_enabled(raw, hints),
        heads=heads,
        groups=groups,
        head_size=size,
        base_model=_hub_name(model) or optional_text(raw, "checkpoint_dir", SETTINGS),
    )


def _hub_name(model: Config) -> str | None:
    named = model.get("hf_config")
    if not isinstance(named, dict):
        return None
    org, name = (optional_text(named, field, in_file(MODEL, "hf_config")) for field in ("org", "name"))
    return f"{org}/{name}" if org and name else None


def _file(bundle: Bundle, name: str) -> Config | None:
    file = bundle.files.get(name)
    return as_object(file.load(), in_file(name)) if isinstance(file, JsonFile) else None


def _enabled(raw: Config, hints: Hints) -> tuple[bool, bool, bool] | None:
    names = ("lora_query", "lora_key", "lora_value")
    if not any(name in raw for name in names):
        if hints.enable_lora is None:
            return None
        if len(hints.enable_lora) != 3:
            raise ConfigError("expected three values in enable_lora, for query, key and value", where=in_file(SETTINGS))
        return (hints.enable_lora[0], hints.enable_lora[1], hints.enable_lora[2])
    query, key, value = (optional_boolean(raw, name, SETTINGS) or False for name in names)
    return query, key, value
