"""MLX's adapter_config.json in its three forms, read into typed fields.

Source: mlx-lm 0.32.2, mlx_lm/tuner/utils.py `load_adapters`, `linear_to_lora_layers`; mlx-vlm before
Blaizzy/mlx-vlm#845, mlx_vlm/trainer/lora.py `LoRaLayer`.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.diagnostics import in_file
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.formats.kit.fields import (
    Config,
    as_object,
    as_texts,
    optional_integer,
    optional_number,
    optional_text,
)
from loraformat.formats.kit.scaling import MAX_RANK
from loraformat.model.bundle import Json

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
ARRAYS = "adapters.npz"
OWN_FILES = (CONFIG, WEIGHTS, ARRAYS)

# Our own field: which modules are embeddings. MLX reads past it.
EMBEDDINGS = "loraformat_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxConfig:
    """What the config says.

    Attributes:
        rank: of all modules, or None where it is not stated.
        scale: the factor itself, or None.
        is_dora: `fine_tune_type` is "dora".
        base_model: `model`.
        tables: modules that are said to be embeddings.
        is_raw_alpha: the scale is the `alpha` of old mlx-vlm, which multiplied as it is.
    """

    raw: Config
    rank: int | None = None
    scale: float | None = None
    is_dora: bool = False
    base_model: str | None = None
    tables: tuple[str, ...] = ()
    is_raw_alpha: bool = False


def looks_like_mlx(value: Json) -> bool:
    """Whether a config has the fields of MLX-LM, or the three of old mlx-vlm, and is none of PEFT's."""
    if not isinstance(value, dict) or "peft_type" in value:
        return False
    return "lora_parameters" in value or "fine_tune_type" in value or {"rank", "alpha"} <= value.keys()


def parse(value: Json, hints: Hints = NO_HINTS) -> MlxConfig:
    """The config of an adapter.

    Raises:
        UnsupportedUpdate (LF013): `fine_tune_type` is neither "lora" nor "dora".
        ConfigError (LF103): a field with a wrong type, or neither `scale` nor a hint about it.
    """
    raw = as_object(value, in_file(CONFIG))
    kind = optional_text(raw, "fine_tune_type", CONFIG) or "lora"
    if kind not in ("lora", "dora"):
        why = "the weights of the whole model, not an adapter" if kind == "full" else "unknown"
        raise UnsupportedUpdate(f'fine_tune_type "{kind}" is {why}', where=in_file(CONFIG, "fine_tune_type"))
    where = in_file(CONFIG, "lora_parameters")
    if "lora_parameters" not in raw:
        if "alpha" not in raw and hints.scale is None and hints.alpha is None:
            raise ConfigError("the field is missing", where=where, hint="pass the scale itself with --assume scale=S")
        if "alpha" not in raw:
            return MlxConfig(raw=raw, is_dora=kind == "dora", base_model=optional_text(raw, "model", CONFIG))
        return MlxConfig(
            raw=raw,
            rank=optional_integer(raw, "rank", CONFIG, 1, MAX_RANK),
            scale=optional_number(raw, "alpha", CONFIG),
            is_raw_alpha=True,
        )
    inner = as_object(raw["lora_parameters"], where)
    scale = optional_number(inner, "scale", where)
    if scale is None and "alpha" in inner:
        message = "expected scale, the factor itself, found alpha, which MLX-LM does not read"
        raise ConfigError(message, where=where, hint="write scale = alpha / rank")
    return MlxConfig(
        raw=raw,
        rank=optional_integer(inner, "rank", where, 1, MAX_RANK),
        scale=scale,
        is_dora=kind == "dora",
        base_model=optional_text(raw, "model", CONFIG),
        tables=as_texts(raw.get(EMBEDDINGS, []), in_file(CONFIG, EMBEDDINGS)),
    )
