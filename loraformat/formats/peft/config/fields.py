"""adapter_config.json, read into typed fields; what this version cannot read is refused here, by name.

Source: peft 0.21.2, tuners/lora/config.py, tuners/loha/config.py, tuners/lokr/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loraformat.budget import Budget
from loraformat.diagnostics import NOWHERE, FindingLocation, in_file, show
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.fields import (
    Config,
    as_integer,
    as_number,
    as_object,
    as_text,
    as_texts,
    names_or_pattern,
    optional_boolean,
    optional_integer,
    optional_number,
    optional_text,
)
from loraformat.formats.kit.scaling import MAX_RANK, Scaling, agreed
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.lora_variants import Blocks, blocks_of, layers_of, recipe_of
from loraformat.formats.peft.patterns import Ends, Inside, PatternKeys, lookup
from loraformat.formats.peft.tuners import REFUSED, TUNERS
from loraformat.model.bundle import Json

READ_TYPES = ("LORA", "LOHA", "LOKR")
MAX_ROW = 2**31 - 1

REFUSED_FIELDS = {
    "alora_invocation_tokens": "aLoRA, which applies only to some tokens",
    "arrow_config": "Arrow routing",
    "use_qalora": "QA-LoRA with grouped inputs",
}

REFUSED_INITS = {
    "pissa_niter": "a randomized decomposition of the base, which cannot be reproduced",
    "corda": "a decomposition by data that the adapter does not contain",
    "loftq": "a quantization of the base, which PEFT recomputes on every load",
    "lora_ga": "gradients that the adapter does not contain",
}

KNOWN_FIELDS = frozenset(
    [
        *REFUSED_FIELDS,
        *("kasa_config", "layer_replication", "target_parameters", "use_bdlora"),
        *("enable_lora", "merge_weights"),
        *("alpha", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("decompose_both", "decompose_factor", "ensure_weight_tying", "eva_config", "exclude_modules"),
        *("fan_in_fan_out", "inference_mode", "init_lora_weights", "init_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
        *("megatron_config", "megatron_core", "module_dropout", "modules_to_save", "monteclora_config", "peft_type"),
        *("peft_version", "qalora_group_size", "r", "rank_dropout", "rank_dropout_scale", "rank_pattern", "revision"),
        *("runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora"),
        *("use_effective_conv2d", "velora_config"),
    ]
)

_TASK_MODULES = ("classifier", "score", "qa_outputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What adapter_config.json says.

    Attributes:
        alpha: None where it is absent or null: nobody stated it.
        ranks, alphas: `rank_pattern` and `alpha_pattern`, with their keys ready for lookup.
        targets: names, or one regular expression, or None.
        parameters: `target_parameters`.
        layers: `layer_replication`: which layer of the base each layer copies.
        recipe: how the initialization changed the base (see SubtractedInit), or None.
        blocks: which factors are block-diagonal (`use_bdlora`), or None.
        enabled: `enable_lora` of PEFT before 0.3: which parts of a joined layer are adapted.
        version: `peft_version`.
        saved, token_ends: names of `modules_to_save` and `trainable_token_indices`, ready for lookup.
        token_indices: `trainable_token_indices`: one list for the embedding, or lists by module name; None for none.
    """

    raw: Config
    peft_type: str
    targets: tuple[str, ...] | str | None
    modules_to_save: tuple[str, ...]
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None
    bias: str
    ensures_tying: bool
    fan_in_fan_out: bool | None
    version: str | None
    rank: int = 1
    alpha: float | None = None
    scaling: Scaling = field(default_factory=Scaling)
    ranks: Mapping[str, int] = field(default_factory=dict)
    rank_keys: PatternKeys = field(default_factory=lambda: PatternKeys(NOWHERE, [], Budget()))
    alphas: Mapping[str, float] = field(default_factory=dict)
    alpha_keys: PatternKeys = field(default_factory=lambda: PatternKeys(NOWHERE, [], Budget()))
    is_dora: bool = False
    parameters: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    recipe: str | None = None
    blocks: Blocks | None = None
    enabled: tuple[bool, ...] | None = None
    saved: Inside
    token_ends: Ends | None = None

    def rank_of(self, module: str) -> int:
        """The declared rank of a module."""
        stated = lookup(self.ranks, self.rank_keys, module)
        return self.rank if stated is None else int(stated)

    def alpha_of(self, module: str) -> float | None:
        """The stated alpha of a module."""
        stated = lookup(self.alphas, self.alpha_keys, module)
        return self.alpha if stated is None else stated

    def indices_of(self, module: str) -> tuple[int, ...] | None:
        """The row numbers of a module's trained tokens, in the order of the rows, or None."""
        if self.token_indices is None or isinstance(self.token_indices, tuple):
            return self.token_indices
        assert self.token_ends is not None
        return next((self.token_indices[name] for name in self.token_ends.of(module)), None)

    def required_modules(self) -> tuple[str, ...]:
        """`modules_to_save` without those that PEFT adds by itself for a task, whether the model has them or not."""
        return tuple(name for name in self.modules_to_save if name not in _TASK_MODULES)


def parse(value: Json, hints: Hints) -> PeftConfig:
    """The config of an adapter that can be read.

    Raises:
        UnsupportedUpdate (LF013): a kind of adapter that is not read; the message names it.
        ConfigError (LF103): a field with a wrong type or outside its bounds, or one that contradicts a hint.
    """
    raw = as_object(value, in_file(CONFIG))
    peft_type = _peft_type(raw)
    _refuse(raw)
    budget = hints.budget or Budget()
    if peft_type in TUNERS:
        return _common(raw, peft_type, budget)
    rank = optional_integer(raw, "r", CONFIG, 1, MAX_RANK)
    rank = agreed(rank, hints.rank, "rank", in_file(CONFIG, "r"))
    if rank is None:
        raise ConfigError("the rank is missing", where=in_file(CONFIG, "r"), hint="pass it with --assume rank=R")
    ranks = {
        key: as_integer(item, in_file(CONFIG, "rank_pattern", key), 1, MAX_RANK)
        for key, item in _object(raw, "rank_pattern").items()
    }
    alphas = {
        key: as_number(item, in_file(CONFIG, "alpha_pattern", key))
        for key, item in _object(raw, "alpha_pattern").items()
    }
    return replace(
        _common(raw, peft_type, budget),
        rank=rank,
        alpha=optional_number(raw, "lora_alpha" if peft_type == "LORA" else "alpha", CONFIG),
        scaling=Scaling(by_root=_flag(raw, "use_rslora")),
        ranks=ranks,
        rank_keys=PatternKeys(in_file(CONFIG, "rank_pattern"), list(ranks), budget),
        alphas=alphas,
        alpha_keys=PatternKeys(in_file(CONFIG, "alpha_pattern"), list(alphas), budget),
        is_dora=_flag(raw, "use_dora"),
        parameters=_names(raw, "target_parameters"),
        layers=layers_of(raw),
        recipe=recipe_of(raw),
        blocks=blocks_of(raw),
        enabled=_enabled(raw),
    )


def _common(raw: Config, peft_type: str, budget: Budget) -> PeftConfig:
    """What all adapters have; rank and scale are the tuner's own business."""
    rows = "token_indices" if peft_type == "TRAINABLE_TOKENS" else "trainable_token_indices"
    indices, saved = _token_indices(raw, rows), _names(raw, "modules_to_save")
    return PeftConfig(
        raw=raw,
        peft_type=peft_type,
        targets=names_or_pattern(raw, "target_modules", CONFIG),
        modules_to_save=saved,
        saved=Inside(saved, budget, in_file(CONFIG, "modules_to_save")),
        token_indices=indices,
        token_ends=Ends(indices) if isinstance(indices, dict) else None,
        bias=_bias(raw),
        ensures_tying=_flag(raw, "ensure_weight_tying"),
        fan_in_fan_out=optional_boolean(raw, "fan_in_fan_out", CONFIG),
        version=optional_text(raw, "peft_version", CONFIG),
    )


def _peft_type(raw: Config) -> str:
    stated, where = raw.get("peft_type"), in_file(CONFIG, "peft_type")
    if stated is None:
        raise ConfigError("the field is missing", where=where)
    name = as_text(stated, where)
    if name not in READ_TYPES and name not in TUNERS:
        why = f": {REFUSED[name]}" if name in REFUSED else ""
        raise UnsupportedUpdate(f"adapters of type {show(name, 40)} are not supported{why}", where=where)
    return name


def _refuse(raw: Config) -> None:
    for name, meaning in REFUSED_FIELDS.items():
        if raw.get(name) not in (None, False, [], {}):
            raise UnsupportedUpdate(f"not read: {meaning}", where=in_file(CONFIG, name))
    init = raw.get("init_lora_weights")
    name = init if isinstance(init, str) else ""
    reason = next((why for start, why in REFUSED_INITS.items() if name.lower().startswith(start)), None)
    if reason is not None:
        raise UnsupportedUpdate(
            f'the initialization "{show(name, 40)}" changed the base by {reason}; it is not supported',
            where=in_file(CONFIG, "init_lora_weights"),
            hint="convert it to plain LoRA with PEFT: save_pretrained(path_initial_model_for_weight_conversion=…)",
        )


def _enabled(raw: Config) -> tuple[bool, ...] | None:
    value, where = raw.get("enable_lora"), in_file(CONFIG, "enable_lora")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(part, bool) for part in value):
        raise ConfigError("expected a list of true and false", where=where)
    return tuple(part for part in value if isinstance(part, bool))


def _object(raw: Config, name: str) -> dict[str, Json]:
    value = raw.get(name)
    return {} if value is None else as_object(value, in_file(CONFIG, name))


def _flag(raw: Config, name: str) -> bool:
    return optional_boolean(raw, name, CONFIG) or False


def _names(raw: Config, name: str) -> tuple[str, ...]:
    value = raw.get(name)
    return () if value is None else as_texts(value, in_file(CONFIG, name))


def _bias(raw: Config) -> str:
    value = raw.get("bias", "none")
    if value not in ("none", "all", "lora_only", f"{str(raw.get('peft_type')).lower()}_only"):
        raise ConfigError('expected "none", "all" or "lora_only"', where=in_file(CONFIG, "bias"))
    return str(value)


def _token_indices(
    raw: Config, name: str = "trainable_token_indices"
) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    value, where = raw.get(name), in_file(CONFIG, name)
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: _indices(rows, where.at(name)) for name, rows in value.items()}
    return _indices(value, where)


def _indices(value: Json, where: FindingLocation) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ConfigError("expected a list of token numbers", where=where)
    rows = tuple(as_integer(row, where.at(number), 0, MAX_ROW) for number, row in enumerate(value))
    if len(set(rows)) != len(rows):
        raise ConfigError("a token number occurs twice", where=where)
    return rows
