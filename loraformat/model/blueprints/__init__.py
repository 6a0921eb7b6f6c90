"""Names and shapes of a model's weights, only from its config.json, for common decoder models."""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.diagnostics import in_file
from loraformat.errors import FormatError
from loraformat.model.blueprints.fields import Fields
from loraformat.model.blueprints.gpt import GPTS
from loraformat.model.blueprints.llama import FAMILIES, decoder
from loraformat.model.bundle import Json

__all__ = ["KNOWN", "blueprint"]

KNOWN = tuple(sorted({*FAMILIES, *GPTS}))

_WAY_OUT = "pass the folder of the checkpoint or one of its files: only headers are read"


def blueprint(config: Mapping[str, Json]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight that a checkpoint of this config stores, in Linear orientation but for GPT-2's.

    Raises:
        FormatError (LF012): the architecture is none of KNOWN, or has a setting with which its weights are others.
        ConfigError (LF103): a field is missing or not a positive integer.
    """
    fields, model_type = Fields(config), config.get("model_type")
    if not isinstance(model_type, str) or model_type not in KNOWN:
        message = f"the weights cannot be derived from model_type {model_type!r}, only from {', '.join(KNOWN)}"
        raise FormatError(message, where=in_file("config.json"), hint=_WAY_OUT)
    if model_type in GPTS:
        return dict(GPTS[model_type](fields))
    family = FAMILIES[model_type]
    strange = next((name for name in family.unknown if fields.flag(name)), None)
    if strange is not None:
        message = f"{strange}: with this field, the weights of {model_type} cannot be derived from config.json alone"
        raise FormatError(message, where=in_file("config.json"), hint=_WAY_OUT)
    return dict(decoder(fields, family))
