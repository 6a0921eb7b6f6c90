"""Dumps, file to Adapter: headers, and what the file says beside its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from loraformat.diagnostics import Finding
from loraformat.errors import ConfigError, MissingFile
from loraformat.formats import factors
from loraformat.formats.base import NO_HINTS, Hints
from loraformat.formats.dump.orientation import SWAPPED, SWAPPED_TRANSPOSED, solve, turned
from loraformat.formats.dump.spelling import Pair, pairs_of
from loraformat.formats.fields import as_integer, as_number, place
from loraformat.formats.findings import redundant_copy, unpaired_factor
from loraformat.formats.folder import carried_files, left_behind, tokenizer_files
from loraformat.formats.scaling import MAX_RANK, Scaling, agreed, scale_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, Json, TensorFile, Tensors
from loraformat.model.updates import LowRank

_RANK_NAMES = ("r", "rank", "lora_r", "lora_rank")
_ALPHA_NAMES = ("alpha", "lora_alpha")
_CONFIG_NAMES = (
    "args",
    "cfg",
    "config",
    "hparams",
    "hyper_parameters",
    "hyperparameters",
    "lora",
    "lora_config",
    "meta",
)


def the_file(bundle: Bundle) -> TensorFile | None:
    """The file that the user named, or the only tensor file of a folder."""
    files = bundle.tensor_files()
    return files[0] if len(files) == 1 else None


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a dump. Names are those of the file.

    Raises:
        MissingFile (LF101): not exactly one tensor file, or one without pairs of factors.
        ConfigError (LF103): the shapes do not say which axis is the rank; the file states two alphas or ranks.
    """
    file = the_file(bundle)
    if file is None:
        raise MissingFile("a dump is exactly one tensor file", where=bundle.uri, hint="name the file")
    tensors = file.open()
    pairs, copies = pairs_of(tensors.entries)
    whole = {module: pair for module, pair in pairs.items() if pair.a is not None and pair.b is not None}
    notes = _notes(pairs, copies, file.name)
    rank, alpha = _stated(tensors, file.name)
    rank = agreed(rank, hints.rank, "rank", file.name)
    updates = _updates(whole, rank, alpha, hints, file.name)
    claimed = {name for pair in whole.values() for name in pair.names} | copies.keys()
    return Adapter(
        config=AdapterConfig(
            declared_ranks={} if rank is None else dict.fromkeys(sorted(updates), rank),
            fan_in_fan_out=hints.fan_in_fan_out,
            raw=dict(tensors.extras),
        ),
        updates={weight: (updates[weight],) for weight in sorted(updates)},
        tokenizer=tokenizer_files(bundle),
        carried=carried_files(bundle, (file.name,)),
        unclaimed={name: tensor for name, tensor in tensors.entries.items() if name not in claimed},
        notes=(*notes, *left_behind(bundle, (file.name,))),
    )


def _notes(pairs: Mapping[str, Pair], copies: Mapping[str, str], where: str) -> list[Finding]:
    notes = []
    for module, pair in pairs.items():
        if (pair.a is None) != (pair.b is None):
            present, absent = ("B", "A") if pair.a is None else ("A", "B")
            notes.append(unpaired_factor(f"{where}: {module}", present, absent))
    if copies:
        notes.append(redundant_copy(where, sorted(copies), "copies of the weights that the factors adapt"))
    return notes


def _updates(
    pairs: Mapping[str, Pair], rank: int | None, alpha: float | None, hints: Hints, where: str
) -> dict[str, LowRank]:
    matrices = {module: pair for module, pair in pairs.items() if _is_matrix_pair(pair)}
    names = solve(matrices, rank, _base_shapes(matrices, hints), is_transposed=bool(hints.fan_in_fan_out))
    updates = {}
    for module, pair in pairs.items():
        a, b = pair.a, pair.b
        assert a is not None
        assert b is not None
        update = factors.embedding(a, b, None) if pair.is_embedding else factors.linear(a, b, None)
        if module in names:
            down, up = turned(names[module], a, b)
            is_swapped = names[module] in (SWAPPED, SWAPPED_TRANSPOSED)
            update = LowRank(up, down, None, None, _kernel(module, down.shape[1], hints), is_embedding=is_swapped)
        actual = rank if rank is not None else update.rank
        scale = scale_of(alpha, actual, Scaling(), hints, where) if actual else None
        updates[f"{module}.weight"] = LowRank(
            update.up, update.down, scale, kernel=update.kernel, is_embedding=update.is_embedding
        )
    return updates


def _is_matrix_pair(pair: Pair) -> bool:
    shapes = [factor.shape for factor in (pair.a, pair.b) if factor is not None]
    return not pair.is_embedding and [len(shape) for shape in shapes] == [2, 2]


def _base_shapes(pairs: Mapping[str, Pair], hints: Hints) -> dict[str, tuple[int, ...]]:
    known = {module: pair.base_shape for module, pair in pairs.items() if pair.base_shape is not None}
    for module in pairs:
        shape = (hints.weights or {}).get(f"{module}.weight")
        if shape is not None:
            known[module] = shape
    return known


def _kernel(module: str, cols: int, hints: Hints) -> tuple[int, ...]:
    """The kernel of a convolution whose factors are matrices; only the base can tell."""
    shape = (hints.weights or {}).get(f"{module}.weight", ())
    return shape[2:] if len(shape) > 2 and math.prod(shape[1:]) == cols else ()


def _stated(tensors: Tensors, where: str) -> tuple[int | None, float | None]:
    """(rank, alpha) from what lies beside the tensors.

    Raises: ConfigError (LF103): a value of a wrong type, or two that differ.
    """
    said = dict(_flat("", {**tensors.metadata, **tensors.extras}))
    ranks = [as_integer(_plain(said[key]), place(where, key), 1, MAX_RANK) for key in said if _means(key, _RANK_NAMES)]
    alphas = [as_number(_plain(said[key]), place(where, key)) for key in said if _means(key, _ALPHA_NAMES)]
    for what, values in (("rank", ranks), ("alpha", alphas)):
        if len(set(values)) > 1:
            raise ConfigError(f"the file states several values of {what}: {sorted(set(values))}", where=where)
    return (ranks[0] if ranks else None), (alphas[0] if alphas else None)


def _flat(prefix: str, fields: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """Plain values by dotted key: `config.alpha`."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def _means(key: str, names: tuple[str, ...]) -> bool:
    *parents, last = key.split(".")
    return last in names and all(parent in _CONFIG_NAMES for parent in parents)


def _plain(value: Json) -> Json:
    """Safetensors metadata are strings."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
