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
    """Tied name → the name whose tensor it shares, as the class that config.json names declares them.

    Ties inside of nested models are not in it: an encoder-decoder shares its tables with both halves as well.

    Returns: {} for a class that ties nothing; None where config.json names no class, or one that is not known.
    """
    architecture = architecture_of(config)
    if architecture is None:
        return None
    ties: Mapping[str, Mapping[str, str]] = table(_TABLE)["ties"]
    if architecture in ties:
        return ties[architecture]
    return {} if architecture in _untied() else None


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The first class that config.json names, or None."""
    stated = config.get("architectures")
    name = stated[0] if isinstance(stated, list) and stated else None
    return name if isinstance(name, str) else None


def parts_cleanly(config: Mapping[str, Any]) -> bool:
    """Whether untying changes nothing but one head: one tie, and no other half of the model on the same table."""
    architecture, ties = architecture_of(config) or "", tied_names(config) or {}
    if len(ties) != 1:
        return False
    source = next(iter(ties.values())).split(".")
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        return True
    return not {"shared", "encoder", "decoder"} & set(source)


@cache
def _untied() -> frozenset[str]:
    return frozenset(table(_TABLE)["untied"])
