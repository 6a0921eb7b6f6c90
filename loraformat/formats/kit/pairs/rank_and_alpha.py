"""Rank and alpha stored with the tensors of a file: in its dicts, or in the metadata of a safetensors header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loraformat.diagnostics import FindingLocation
from loraformat.errors import ConfigError
from loraformat.formats.kit.fields import as_integer, as_number
from loraformat.formats.kit.scaling import MAX_RANK
from loraformat.model.bundle import Json, Tensors

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


def stated(tensors: Tensors, where: FindingLocation) -> tuple[int | None, float | None]:
    """(rank, alpha) from what lies beside the tensors.

    Raises: ConfigError (LF103): a value of a wrong type, or two that differ.
    """
    said = dict(_flat("", {**tensors.metadata, **tensors.extras}))
    ranks = [
        as_integer(_plain(said[key]), where.at(*key.split(".")), 1, MAX_RANK)
        for key in said
        if _means(key, _RANK_NAMES)
    ]
    alphas = [as_number(_plain(said[key]), where.at(*key.split("."))) for key in said if _means(key, _ALPHA_NAMES)]
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
