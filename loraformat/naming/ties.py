"""Which weights the classes of transformers share, by the name of the class that config.json states.

Source: transformers 5.23.0, `_tied_weights_keys` of models/*/modeling_*.py, by tests/derive_ties.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from loraformat.naming.tables import table

_TABLE = "transformers_ties.json"


def tied_names(config: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Tied name → the name whose tensor it shares, as the class that config.json names and its bare model declare them.

    Returns: {} for a class that ties nothing; None where config.json names no class, or one that is not known.
    """
    architecture = architecture_of(config)
    if architecture is None:
        return None
    ties: Mapping[str, Mapping[str, str]] = table(_TABLE)["ties"]
    if architecture in ties:
        return {**_inner(architecture), **ties[architecture]}
    return {} if architecture in _untied() else None


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The first class that config.json names, or None."""
    stated = config.get("architectures")
    name = stated[0] if isinstance(stated, list) and stated else None
    return name if isinstance(name, str) else None


def parts_cleanly(config: Mapping[str, Any]) -> bool:
    """Whether untying changes nothing but one head: one tie, and no other half of the model on the same table."""
    architecture, ties = architecture_of(config) or "", tied_names(config) or {}
    if len(set(ties.values())) != 1:
        return False
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        return len(ties) == 1
    source = next(iter(ties.values())).split(".")
    return not {"shared", "encoder", "decoder"} & set(source) or _bare_model(architecture) is not None


def scales_if_tied(config: Mapping[str, Any]) -> bool:
    """Whether the class reads `tie_word_embeddings` as "scale the outputs", and ties its tables whatever it says.

    Source: transformers 5.23.0, models/t5/configuration_t5.py `__post_init__`.
    """
    return config.get("model_type") in _SCALED


_SCALED = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})


def _inner(architecture: str) -> dict[str, str]:
    """The ties inside of the bare model of a class, below the path on which the class has it."""
    ties: Mapping[str, Mapping[str, str]] = table(_TABLE)["ties"]
    inner = ties.get(_bare_model(architecture) or "", {})
    sources = set(ties[architecture].values())
    found: dict[str, str] = {}
    for name, source in inner.items():
        for outer in sources:
            if outer.endswith(f".{source}"):
                path = outer[: -len(source)]
                found[path + name] = path + source
    return found


def _bare_model(architecture: str) -> str | None:
    """The class of the model without its head, where the table knows which of its tables are one."""
    name = architecture.removesuffix("ForConditionalGeneration") + "Model"
    return name if name != f"{architecture}Model" and (name in table(_TABLE)["ties"] or name in _untied()) else None


@cache
def _untied() -> frozenset[str]:
    return frozenset(table(_TABLE)["untied"])
