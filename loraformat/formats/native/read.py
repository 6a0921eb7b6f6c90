"""The native format, files to Adapter: headers and lora_config.json only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from loraformat.diagnostics import Finding, counted, in_file, in_weights
from loraformat.errors import ConfigError, FormatError, MissingFile
from loraformat.formats.kit import factors
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.formats.kit.fields import names_or_pattern, optional_boolean, optional_integer, optional_text
from loraformat.formats.kit.findings import not_only_tensors, table_too_short, unpaired_factors
from loraformat.formats.kit.folder import left_behind, other_files, tokenizer_files
from loraformat.formats.kit.scaling import agreed, scale_of
from loraformat.formats.kit.update_slots import Slots
from loraformat.formats.native.config import MAX_CONFIG_BYTES, MAX_ROWS, NativeConfig, parse
from loraformat.formats.native.names import CONFIG, FACTORS, OWN_FILES, TABLES, WEIGHTS, is_valid, split
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, Json, JsonFile, TensorFile, Tensors
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank, Replace, Rows

Parts = Mapping[str, LazyTensor]

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(slots=True)
class _Sorted:
    """Tensors by what they belong to, before they become updates."""

    modules: dict[str, dict[str, LazyTensor]] = field(default_factory=lambda: defaultdict(dict))
    tables: dict[str, Replace] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    differences: dict[str, Dense] = field(default_factory=dict)
    unclaimed: dict[str, LazyTensor] = field(default_factory=dict)


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a folder of version 0 or 1.

    Raises:
        MissingFile (LF101): no lora_config.json, or no weights.
        ConfigError (LF103): a field that cannot be used, or one that contradicts a hint.
        FormatError (LF012): weights in both containers, an unknown version, one parameter changed twice.
        UnsupportedUpdate (LF013): a method other than "lora".
    """
    config = parse(_config(bundle), hints)
    weights, tables = _weight_files(bundle)
    opened = {file.name: file.open() for file in (weights, tables) if file is not None}
    found = _Sorted()
    _sort_weights(opened[weights.name], config, found)
    if tables is not None:
        _sort_tables(opened[tables.name], config, found)
    slots, notes = _slots(found, config, hints)
    notes += _clutter(opened)
    notes += _short_tables(config, found)
    _require_users(config, found)
    return Adapter(
        config=_hub_config(config, slots, hints),
        updates={weight: several.updates() for weight, several in sorted(slots.items())},
        tokenizer=tokenizer_files(bundle),
        other_files=other_files(bundle, OWN_FILES),
        unclaimed=found.unclaimed,
        notes=(*notes, *left_behind(bundle, OWN_FILES)),
    )


def _config(bundle: Bundle) -> Json:
    file = bundle.files.get(CONFIG)
    if not isinstance(file, JsonFile):
        hint = 'write it, at least {"rank": R, "alpha": A}'
        raise MissingFile(f"{CONFIG} is missing", where=bundle.uri, hint=hint)
    if file.nbytes > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"the file has {file.nbytes} bytes, at most {MAX_CONFIG_BYTES} are read", where=in_file(CONFIG)
        )
    return file.load()


def _weight_files(bundle: Bundle) -> tuple[TensorFile, TensorFile | None]:
    """The weights and, if there is one, the embedding file of the same container."""
    weights = {kind: bundle.files[name] for kind, name in WEIGHTS.items() if name in bundle.files}
    tables = {kind: bundle.files[name] for kind, name in TABLES.items() if name in bundle.files}
    if not weights:
        raise MissingFile(f"neither {WEIGHTS['safetensors']} nor {WEIGHTS['torch']} is present", where=bundle.uri)
    if len(weights) > 1 or not tables.keys() <= weights.keys():
        names = sorted(file.name for file in (*weights.values(), *tables.values()))
        message = f"there are weight files of two kinds, which may differ: {', '.join(names)}"
        raise FormatError(message, where=bundle.uri, hint="keep only the files of one kind")
    (kind, file), table = next(iter(weights.items())), tables.get(next(iter(weights)))
    assert isinstance(file, TensorFile), kind
    assert table is None or isinstance(table, TensorFile)
    return file, table


def _sort_weights(tensors: Tensors, config: NativeConfig, found: _Sorted) -> None:
    for name, tensor in tensors.entries.items():
        owner, part = split(name)
        if not is_valid(name) or not part or (config.version == 0 and part not in FACTORS):
            found.unclaimed[name] = tensor
        elif part in FACTORS:
            found.modules[owner][part] = tensor
        elif part == "replacement":
            _put(found.tables, owner, Replace(tensor, follows_tie=False))
        elif part == "rows":
            _put(found.rows, owner, _rows(owner, tensor, config, follows_tie=False))
        else:
            found.differences[owner] = Dense(tensor, config.difference_scale.get(owner, 1.0))


def _sort_tables(tensors: Tensors, config: NativeConfig, found: _Sorted) -> None:
    for name, tensor in tensors.entries.items():
        owner, part = split(name)
        if not is_valid(name) or (part and config.version and part != "rows"):
            found.unclaimed[name] = tensor
        elif part == "rows" and config.version:
            _put(found.rows, owner, _rows(owner, tensor, config, follows_tie=True))
        else:
            _put(found.tables, name, Replace(tensor, follows_tie=True))


def _put(where: dict[str, Replace] | dict[str, Rows], weight: str, update: Replace | Rows) -> None:
    if weight in where:
        raise FormatError("the embedding file and the weight file both set this weight", where=in_weights(weight))
    where[weight] = update  # type: ignore[assignment]  # callers pair the dict and the kind


def _rows(weight: str, values: LazyTensor, config: NativeConfig, *, follows_tie: bool) -> Rows:
    where = in_file(CONFIG, "rows", weight)
    stated = config.rows.get(weight)
    count = values.shape[0] if values.shape else 0
    if stated is None:
        raise ConfigError(
            f"the file has {counted(count, 'row')} for this weight, but the config does not say which", where=where
        )
    indices = tuple(range(stated, stated + count)) if isinstance(stated, int) else stated
    if len(indices) != count:
        raise ConfigError(f"{counted(len(indices), 'row number')} for {counted(count, 'row')}", where=where)
    return Rows(indices, values, follows_tie)


def _slots(found: _Sorted, config: NativeConfig, hints: Hints) -> tuple[dict[str, Slots], list[Finding]]:
    low_ranks: dict[str, LowRank] = {}
    notes: list[Finding] = []
    for module, parts in found.modules.items():
        update = _low_rank(module, parts, config, hints)
        if update is None:
            found.unclaimed.update({f"{module}.{part}": tensor for part, tensor in parts.items()})
            notes += unpaired_factors(module, parts, *_PAIRS)
        else:
            low_ranks[f"{module}.weight"] = update
    weights = {*found.tables, *found.rows, *low_ranks, *found.differences}
    slots = {
        weight: Slots(
            replace=found.tables.get(weight),
            rows=found.rows.get(weight),
            low_rank=low_ranks.get(weight),
            dense=found.differences.get(weight),
        )
        for weight in weights
    }
    return slots, notes


def _low_rank(module: str, parts: Parts, config: NativeConfig, hints: Hints) -> LowRank | None:
    """The update of one module, or None where its parts do not make exactly one."""
    scale = scale_of(config.alpha_of(module), config.rank_of(module), config.scaling, hints, in_file(CONFIG, "alpha"))
    magnitude = parts.get("lora_magnitude")
    match sorted(set(parts) - {"lora_magnitude"}):
        case ["lora_A", "lora_B"]:
            return factors.linear(parts["lora_A"], parts["lora_B"], scale, magnitude)
        case ["lora_embedding_A", "lora_embedding_B"]:
            return factors.embedding(parts["lora_embedding_A"], parts["lora_embedding_B"], scale, magnitude)
        case _:
            return None


def _clutter(opened: Mapping[str, Tensors]) -> Iterator[Finding]:
    for name, tensors in opened.items():
        if tensors.wrapper or tensors.extras:
            yield not_only_tensors(in_file(name), tensors.wrapper, sorted(tensors.extras))


def _short_tables(config: NativeConfig, found: _Sorted) -> Iterator[Finding]:
    stated = optional_integer(config.raw, "vocab_size", CONFIG, 1, MAX_ROWS)
    for weight, table in found.tables.items():
        if stated and table.follows_tie and len(table.shape) == 2 and table.shape[0] < stated:
            yield table_too_short(weight, table.shape[0], stated)


def _require_users(config: NativeConfig, found: _Sorted) -> None:
    """N11, N24, N26: an exception that names nothing in the files is a mistake of whoever wrote them."""
    users = (
        ("rank_exceptions", config.rank_exceptions, found.modules),
        ("alpha_exceptions", config.alpha_exceptions, found.modules),
        ("rows", config.rows, found.rows),
        ("difference_scale", config.difference_scale, found.differences),
    )
    for field_name, stated, there in users:
        for name in stated:
            if name not in there:
                where = in_file(CONFIG, field_name, name)
                raise ConfigError("names no tensor of the weight files", where=where)


def _hub_config(config: NativeConfig, slots: Mapping[str, Slots], hints: Hints) -> AdapterConfig:
    raw = config.raw
    name, revision, fingerprint = config.base
    flag = optional_boolean(raw, "fan_in_fan_out", CONFIG)
    optional_text(raw, "dtype", CONFIG)
    return AdapterConfig(
        base_model=name,
        base_revision=revision,
        base_fingerprint=fingerprint,
        task=optional_text(raw, "task", CONFIG),
        declared_ranks={
            weight: config.rank_of(weight.removesuffix(".weight"))
            for weight, several in slots.items()
            if several.low_rank
        },
        targets=names_or_pattern(raw, "target_modules", CONFIG),
        vocab_size=optional_integer(raw, "vocab_size", CONFIG, 1, MAX_ROWS),
        base_vocab_size=optional_integer(raw, "base_vocab_size", CONFIG, 1, MAX_ROWS),
        tied=config.tied,
        fan_in_fan_out=agreed(flag, hints.all_transposed, "fan_in_fan_out", in_file(CONFIG, "fan_in_fan_out")),
        raw=raw,
    )
