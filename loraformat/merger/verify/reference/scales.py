"""The factor of an update by the formula of its format, from what the adapter's files say and the caller assumes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from loraformat.budget import Budget
from loraformat.containers import open_bundle
from loraformat.merger.plan.data import AdapterSource
from loraformat.merger.verify.reference.image_scales import has_dense_deltas, single_factor
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle, Json, JsonFile
from loraformat.model.patterns.matching import Matcher
from loraformat.model.updates import Dense, LowRank, SubtractedInit, Update, WeightNetwork, kind_of, scale_of

_Config: TypeAlias = Mapping[str, Json]

_WITH_PATTERNS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
_PLAIN = re.compile(r"[\w\-/ .]*")
_ANCHORED = re.compile(r"\^((?:[\w\-/ ]|\\\.|\\-)*)\$?")
# For expressions among the keys of one pattern.
_MOST_STEPS = 2_000_000
_EXAMPLES_SCALE = 20.0  # mlx-examples/lora, whose files say nothing
_SETTINGS = "lora_settings.json"
_CONFIG = "adapter_config.json"


def scale_used(update: Update) -> tuple[bool, float | None]:
    """(whether an update is multiplied by a factor, the factor as the reader has it)."""
    if isinstance(update, SubtractedInit):
        return update.recipe == "olora", update.scale
    return kind_of(update).has_scale, scale_of(update)


class Scales:
    """The factors of one adapter's updates.

    Formats without a formula, and what lies beyond the budget for patterns, have none: `of` gives None then.
    """

    def __init__(self, adapter: Adapter, source: AdapterSource, bundle: Bundle | None = None) -> None:
        self._adapter, self._source, self._bundle = adapter, source, bundle
        formulas: dict[str, Callable[[str, Update], float | None]] = {
            "peft": self._peft,
            "native": self._native,
            "mlx": self._mlx,
            "gguf": self._gguf,
            "litgpt": self._litgpt,
            "minimind": self._minimind,
            "tinker": self._r_and_lora_alpha,
            "torchtune": self._r_and_lora_alpha,
            "nemo": self._nemo,
            **dict.fromkeys(("diffusers", "kohya", "comfy", "lycoris", "xlabs"), self._image),
            **dict.fromkeys(("loralib", "minlora", "raschka", "dump"), self._pairs),
        }
        self._formula = formulas.get(source.format)

    def of(self, weight: str, update: Update) -> float | None:
        """The factor of an update; None where no formula tells."""
        if self._formula is None or not scale_used(update)[0]:
            return None
        return self._formula(weight, update)

    def _quotient(self, alpha: float | None, rank: float | None, *, by_root: bool = False) -> float | None:
        """Alpha over rank or its root, with what the caller says where the files state no alpha."""
        if alpha is None and self._source.scale is not None:
            return self._source.scale
        alpha = self._source.alpha if alpha is None else alpha
        if alpha is None or rank is None or rank <= 0:
            return None
        return alpha / (math.sqrt(rank) if by_root else rank)

    def _peft(self, weight: str, update: Update) -> float | None:
        raw, weight, head = self._config_of(weight)
        kind = str(raw.get("peft_type"))
        if kind not in _WITH_PATTERNS:
            try:
                found = _TUNERS.get(kind, _one)(raw, update)
            except ZeroDivisionError:
                return None
            return -found if isinstance(update, WeightNetwork) and kind == "DEFT" else found
        module, times = self._module(weight)
        ranks, alphas = self._keys(raw, "rank_pattern", head), self._keys(raw, "alpha_pattern", head)
        size = ranks.of(module, _number(raw, "r") or self._source.rank)
        stated = alphas.of(module, _number(raw, _WITH_PATTERNS[kind]))
        if not (ranks.is_known and alphas.is_known):
            return None
        scale = self._quotient(stated, size, by_root=raw.get("use_rslora") is True)
        return None if scale is None else scale * times

    def _module(self, weight: str) -> tuple[str, int]:
        """(what patterns call the module of a weight, how often its update is added).

        A parameter of `target_parameters` is called by its own name. The output of MultiheadAttention is added twice:
        peft 0.15.0 to 0.21.2, tuners/lora/layer.py `MultiheadAttention.merge`.
        """
        path, _, kind = weight.rpartition(".")
        if kind == "in_proj_weight":
            return path, 1
        if kind not in ("weight", "bias"):
            return weight, 1
        outer = path.removesuffix(".out_proj")
        is_attention = outer != path and f"{outer}.in_proj_weight" in self._adapter.updates
        return path, 2 if is_attention and kind == "weight" else 1

    def _config_of(self, weight: str) -> tuple[_Config, str, str]:
        """(the settings that hold for a weight, its name for them, the component whose they are or "").

        A folder of PEFT folders, one for each component of a pipeline, has settings in each of them.
        """
        configs = self._configs_of_components
        component = self._source.of_component
        if component in configs:
            return configs[component], weight, component
        head, _, rest = weight.partition(".")
        return (configs[head], rest, head) if head in configs else (self._adapter.config.raw, weight, "")

    @cached_property
    def _configs_of_components(self) -> dict[str, _Config]:
        files = {} if self._bundle is None else self._bundle.files
        found: dict[str, _Config] = {}
        for name, file in files.items():
            component, _, last = name.partition("/")
            config = file.load() if last == _CONFIG and isinstance(file, JsonFile) else None
            if isinstance(config, Mapping):
                found[component] = config
        return found

    def _keys(self, raw: _Config, name: str, head: str) -> _Keys:
        if (head, name) not in self._patterns:
            self._patterns[head, name] = _Keys(_numbers(raw.get(name)))
        return self._patterns[head, name]

    @cached_property
    def _patterns(self) -> dict[tuple[str, str], _Keys]:
        return {}

    def _native(self, weight: str, update: Update) -> float | None:
        raw = self._adapter.config.raw
        if isinstance(update, Dense):
            return _numbers(raw.get("difference_scale")).get(weight, 1.0)
        module = weight.removesuffix(".weight")
        alpha = _numbers(raw.get("alpha_exceptions")).get(module, _number(raw, "alpha"))
        rank = _numbers(raw.get("rank_exceptions")).get(module, _number(raw, "rank") or self._source.rank)
        return self._quotient(alpha, rank, by_root=raw.get("scaling") == "alpha/sqrt(rank)")

    def _mlx(self, weight: str, update: Update) -> float | None:  # noqa: ARG002
        raw = self._adapter.config.raw
        inner = raw.get("lora_parameters")
        fields = inner if isinstance(inner, Mapping) else raw
        if fields is raw and raw and self._source.scale is not None:
            return self._source.scale  # of the two that an old mlx-vlm file may mean, the caller's
        stated = _number(fields, "alpha" if fields is raw else "scale")
        if stated is not None:
            return stated
        assumed = self._quotient(None, _number(fields, "rank") or self._source.rank)
        return _EXAMPLES_SCALE if assumed is None and not raw else assumed

    def _gguf(self, weight: str, update: Update) -> float | None:  # noqa: ARG002
        """Source: llama.cpp, src/llama-adapter.h `get_scale`: an alpha of 0, or none, is a scale of 1."""
        alpha = _number(self._adapter.config.raw, "adapter.lora.alpha") or self._source.alpha
        rank = update.down.shape[-2] if isinstance(update, LowRank) else None
        return self._quotient(alpha, rank) if alpha else 1.0

    def _litgpt(self, weight: str, update: Update) -> float | None:  # noqa: ARG002
        raw = self._adapter.config.raw
        rank, alpha = _number(raw, "lora_r") or self._source.rank, _number(raw, "lora_alpha")
        return self._quotient(alpha, rank)

    def _r_and_lora_alpha(self, weight: str, update: Update) -> float | None:  # noqa: ARG002
        """PEFT's two fields without its patterns, as Tinker and torchtune leave them beside the weights."""
        raw = self._adapter.config.raw
        return self._quotient(_number(raw, "lora_alpha"), _number(raw, "r") or self._source.rank)

    def _nemo(self, weight: str, update: Update) -> float | None:  # noqa: ARG002
        inner: Json = dict(self._adapter.config.raw)
        for key in ("peft", "lora_tuning"):
            inner = inner.get(key) if isinstance(inner, dict) else None
        fields = inner if isinstance(inner, dict) else {}
        return self._quotient(_number(fields, "alpha"), _number(fields, "adapter_dim") or self._source.rank)

    def _image(self, weight: str, update: Update) -> float | None:  # noqa: ARG002
        """A dense delta that stands in the file as one is added as it is."""
        if isinstance(update, Dense):
            return 1.0 if has_dense_deltas(self._bundle or open_bundle(self._source.uri)) else None
        return self._factor_of_all

    @cached_property
    def _factor_of_all(self) -> float | None:
        bundle = self._bundle or open_bundle(self._source.uri)
        return single_factor(bundle, alpha=self._source.alpha, scale=self._source.scale)

    def _minimind(self, weight: str, update: Update) -> float | None:
        """Its code has no alpha; a file may."""
        found = self._pairs(weight, update)
        return 1.0 if found is None else found

    def _pairs(self, weight: str, update: Update) -> float | None:  # noqa: ARG002
        """Alpha and rank from anywhere in the file or beside it; loralib's joined layers have a rank for each part."""
        rank, alpha = self._stated
        rank = rank or self._source.rank
        if rank is None and self._source.format != "loralib" and isinstance(update, LowRank):
            rank = update.rank
        return self._quotient(alpha, rank)

    @cached_property
    def _stated(self) -> tuple[float | None, float | None]:
        """(rank, alpha) as the one tensor file and the settings beside it have them."""
        bundle = self._bundle or open_bundle(self._source.uri)
        said = dict(_leaves(self._adapter.config.raw))
        for file in bundle.tensor_files()[:1]:
            said.update(file.open().metadata)
        beside = bundle.files.get(_SETTINGS)
        if isinstance(beside, JsonFile):
            settings = beside.load()
            said.update(settings if isinstance(settings, dict) else {})
        last = {key.rpartition(".")[2]: value for key, value in said.items()}
        names = ("r", "rank", "lora_r", "lora_rank"), ("alpha", "lora_alpha")
        rank, alpha = (next((_as_number(last[name]) for name in group if name in last), None) for group in names)
        return rank, alpha


@dataclass(slots=True)
class _Keys:
    """The keys of a pattern, of which the first decides that is the end of a module's path.

    Source: peft 0.21.2, utils/other.py `get_pattern_key`.

    Attributes:
        values: by key; numbers: in order.
        plain: names that are the end of a path; anchored: whole paths; others: expressions, each with its place.
        is_known: whether all that was asked for could be evaluated.
    """

    values: Mapping[str, float]
    plain: dict[str, int] = field(default_factory=dict)
    anchored: dict[str, int] = field(default_factory=dict)
    others: list[tuple[int, Matcher]] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    is_known: bool = True

    def __post_init__(self) -> None:
        budget = Budget(_MOST_STEPS)
        self.numbers = list(self.values.values())
        for order, key in enumerate(self.values):
            whole = _ANCHORED.fullmatch(key)
            if whole is not None:
                self.anchored.setdefault(whole[1].replace("\\", ""), order)
            elif _PLAIN.fullmatch(key):
                self.plain.setdefault(key, order)
            else:
                self.others.append((order, Matcher(rf"(.*\.)?({key})", budget)))

    def of(self, module: str, default: float | None) -> float | None:
        """The value for a module, or the default where no key matches; `is_known` then says whether it is right."""
        found = [self.anchored[module]] if module in self.anchored else []
        found += [self.plain[tail] for tail in _tails(module) if tail in self.plain]
        for order, matcher in self.others:
            matches = matcher.fullmatch(module)
            if matches is None:
                self.is_known = False
                return default
            if matches:
                found.append(order)
                break
        return self.numbers[min(found)] if found else default


def _tails(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _one(raw: _Config, update: Update) -> float:  # noqa: ARG001
    return 1.0


def _adalora(raw: _Config, update: Update) -> float:  # noqa: ARG001
    rank, alpha = _or(raw, "init_r", 12), _or(raw, "lora_alpha", 8)
    return (alpha if alpha > 0 else rank) / (rank + 1e-5)


def _fourier(raw: _Config, update: Update) -> float:
    rows, cols = update.shape
    return _or(raw, "scaling", 150) / (rows * cols)


def _supertuning(raw: _Config, update: Update) -> float:
    return _or(raw, "lora_alpha", 1) / _or(raw, "r", 1) if isinstance(update, LowRank) else 1.0


def _deft(raw: _Config, update: Update) -> float:
    alpha = _or(raw, "alpha", 0)
    return alpha / update.rank if isinstance(update, LowRank) and alpha else 1.0


# Source: peft 0.21.2, tuners/*/layer.py and config.py, for the defaults.
_TUNERS: Mapping[str, Callable[[_Config, Update], float]] = {
    "ADALORA": _adalora,
    "C3A": lambda _, update: 1 / update.shape[1] if isinstance(update, Dense) else 1.0,
    "DEFT": _deft,
    "FOURIERFT": _fourier,
    "GRALORA": lambda raw, _: _or(raw, "alpha", 64) / (_or(raw, "r", 32) + _or(raw, "hybrid_r", 0)),
    "PEANUT": lambda raw, _: _or(raw, "scaling", 1),
    "RANDLORA": lambda raw, _: _or(raw, "randlora_alpha", 640) / _or(raw, "r", 32),
    "SUPERTUNING": _supertuning,
    "WAVEFT": lambda raw, _: _or(raw, "scaling", 25),
}


def _leaves(fields: _Config, prefix: str = "") -> Iterator[tuple[str, Json]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _or(raw: _Config, name: str, default: float) -> float:
    found = _number(raw, name)
    return float(default) if found is None else found


def _number(raw: _Config, name: str) -> float | None:
    return _as_number(raw.get(name))


def _as_number(value: Json) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _numbers(value: Json) -> dict[str, float]:
    fields = value.items() if isinstance(value, dict) else ()
    return {name: number for name, one in fields if (number := _as_number(one)) is not None}
