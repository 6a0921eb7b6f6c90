"""PEFT's adapter layers: factors, magnitudes, trained bias of lora_B, trained token rows, LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from loraformat.diagnostics import Finding, in_file, in_weights
from loraformat.errors import ConfigError
from loraformat.formats.kit import factors
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.findings import unpaired_factors
from loraformat.formats.kit.scaling import scale_of
from loraformat.formats.peft.config.fields import PeftConfig
from loraformat.formats.peft.keys import CONFIG, Sorted
from loraformat.formats.peft.lora_variants import check_groups, merged_parts, with_diagonal
from loraformat.formats.peft.tuners.lycoris import product
from loraformat.formats.peft.wrapped_layers import Nested, Recent, check_layout, nested_layers, stacked
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Replace, Rows, SubtractedInit, Update

Parts = Mapping[str, LazyTensor]

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(slots=True)
class Built:
    """Updates by weight, each kind apart, and names of tensors that became none.

    Attributes:
        scaled_as: weight → the name by which patterns know its module.
        parts: weight → how many adapted parts its update joins, each of the declared rank.
    """

    replaces: dict[str, Replace] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    low_ranks: dict[str, LowRank] = field(default_factory=dict)
    products: dict[str, Hadamard | Kronecker | Dense] = field(default_factory=dict)
    differences: dict[str, Dense] = field(default_factory=dict)
    from_bases: dict[str, SubtractedInit] = field(default_factory=dict)
    scaled_as: dict[str, str] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    others: dict[str, tuple[Update, ...]] = field(default_factory=dict)
    unclaimed: list[str] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    def ranked_weights(self) -> set[str]:
        """Weights whose update has the rank that the config states."""
        return {*self.low_ranks, *self.products}

    def layer_weights(self) -> set[str]:
        """Weights of modules that PEFT wraps because of `target_modules`."""
        return {*self.ranked_weights(), *self.others}

    def weights(self) -> set[str]:
        """Every weight that is changed."""
        return {*self.replaces, *self.rows, *self.differences, *self.layer_weights()}

    def updates(self) -> dict[str, tuple[Update, ...]]:
        """What is done to each weight, sorted by name: replaced or set first, added to afterwards."""
        kinds: tuple[Mapping[str, Update], ...] = (
            self.replaces,
            self.rows,
            self.from_bases,
            self.low_ranks,
            self.products,
            self.differences,
        )
        chains: dict[str, tuple[Update, ...]] = dict.fromkeys(sorted(self.weights()), ())
        for kind in kinds:
            for weight, update in kind.items():
                chains[weight] += (update,)
        for weight, several in self.others.items():
            chains[weight] += several
        return chains


def read_layers(found: Sorted, config: PeftConfig, hints: Hints) -> Built:
    """All adapter layers of a file.

    Raises:
        ConfigError (LF103): a hint contradicts the config, or token rows without their numbers.
        FormatError (LF012): the core tensor of a LoHa or LoKr does not fit its factors.
        UnsupportedUpdate (LF013): a wrapped layer whose parameter no name tells.
    """
    built, recent = Built(), Recent()
    nested = nested_layers(found, config, hints.weights)
    where = in_file(CONFIG, "lora_alpha" if config.peft_type == "LORA" else "alpha")
    for module, parts in found.modules.items():
        meaning = nested.get(module) or Nested(f"{module}.weight", module)
        rank = config.rank_of(meaning.scaled_as)
        scale = scale_of(config.alpha_of(meaning.scaled_as), rank, config.scaling, hints, where)
        if module in nested:
            claimed = _nested_layer(meaning, parts, rank, scale, built, recent)
        else:
            plain = _plain(module, parts, config)
            if config.enabled and "A" in parts and plain.get("B") is not parts.get("B"):
                built.parts[f"{module}.weight"] = sum(config.enabled)
            claimed = _layer(module, plain, scale, built)
            claimed |= read_rows(module, parts, config, built)
            claimed |= {"diagonal"} if config.recipe == "kasa" and "A" in claimed else set()
        if meaning.weight in built.low_ranks:
            check_layout(built.low_ranks[meaning.weight], config.version, in_weights(meaning.weight))
            _take_off(meaning.weight, rank, scale, config, built)
        if not parts.keys() <= claimed:
            left = [part for part in parts if part not in claimed]
            built.unclaimed += [found.names[module, part] for part in left]
            built.notes += unpaired_factors(module, {f"lora_{part}" for part in left}, *_PAIRS)
    if rows_are_private(built.rows.values()):
        built.rows = {weight: replace(rows, follows_tie=False) for weight, rows in built.rows.items()}
    return built


def rows_are_private(tables: Iterable[Rows]) -> bool:
    """Whether PEFT keeps trained rows of several tables apart even if they are tied: where the row numbers differ.

    Source: peft 0.21.2, utils/other.py `set_additional_trainable_modules`.
    """
    return len({rows.indices for rows in tables}) > 1


def _layer(module: str, parts: Parts, scale: float | None, built: Built) -> set[str]:
    """Builds the layer of one module; the parts that it took."""
    weight = f"{module}.weight"
    magnitude = parts.get("magnitude")
    if "A" in parts and "B" in parts and not {"embedding_A", "embedding_B"} & parts.keys():
        built.low_ranks[weight] = factors.linear(parts["A"], parts["B"], scale, magnitude)
        if "B_bias" in parts:
            built.differences[f"{module}.bias"] = Dense(parts["B_bias"], scale)
        return {"A", "B", "magnitude", "B_bias"}
    if {"embedding_A", "embedding_B"} <= parts.keys() and not {"A", "B"} & parts.keys():
        a, b = parts["embedding_A"], parts["embedding_B"]
        built.low_ranks[weight] = factors.embedding(a, b, scale, magnitude)
        return {"embedding_A", "embedding_B", "magnitude"}
    update = product(module, parts, scale)
    if update is None:
        return set()
    built.products[weight] = update
    return {part for part in parts if part.startswith(("hada_", "lokr_"))}


def _plain(module: str, parts: Parts, config: PeftConfig) -> Parts:
    """The parts with KaSA's diagonal and BD-LoRA's blocks worked into the factors."""
    if "A" not in parts or "B" not in parts:
        return parts
    a, b = parts["A"], parts["B"]
    check_groups(module, a, b)
    if config.enabled and any(config.enabled) and len(b.shape) == 3:
        a, b = merged_parts(module, a, b, config.enabled)
    if config.recipe == "kasa" and "diagonal" in parts:
        a = with_diagonal(a, parts["diagonal"])
    if config.blocks is not None:
        a, b = config.blocks.whole(module, a, b)
    return {**parts, "A": a, "B": b}


def _nested_layer(
    meaning: Nested, parts: Parts, rank: int, scale: float | None, built: Built, recent: Recent
) -> set[str]:
    """Builds the layer of a parameter or of a part of MultiheadAttention; the parts that it took."""
    if not {"A", "B"} <= parts.keys():
        return set()
    built.scaled_as[meaning.weight] = meaning.scaled_as
    if meaning.is_parameter:
        built.low_ranks[meaning.weight] = stacked(parts["A"], parts["B"], rank, scale, recent)
    else:
        times = None if scale is None else scale * meaning.times
        built.low_ranks[meaning.weight] = factors.linear(parts["A"], parts["B"], times)
    return {"A", "B"}


def _take_off(weight: str, rank: int, scale: float | None, config: PeftConfig, built: Built) -> None:
    """Adds what the initialization took off the base's matrix; embeddings and convolutions keep theirs."""
    update = built.low_ranks[weight]
    if config.recipe is not None and not update.is_embedding and not update.kernel and not update.is_stack:
        built.from_bases[weight] = SubtractedInit(config.recipe, rank, scale, update.shape)


def read_rows(module: str, parts: Parts, config: PeftConfig, built: Built) -> set[str]:
    """Builds the trained rows of one module, where it has any; the parts that it took."""
    values = parts.get("rows")
    if values is None:
        return set()
    where = in_file(CONFIG, "trainable_token_indices")
    indices, count = config.indices_of(module), values.shape[0] if values.shape else 0
    if indices is None or len(indices) != count:
        stated = "none" if indices is None else str(len(indices))
        raise ConfigError(f"{module} has {count} trained rows, but the config has {stated} token numbers", where=where)
    built.rows[f"{module}.weight"] = Rows(indices, values)
    return {"rows"}
