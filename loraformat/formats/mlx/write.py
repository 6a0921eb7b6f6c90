"""MLX-LM, Adapter to files.

Source: mlx-lm 0.32.2, mlx_lm/tuner/utils.py `load_adapters`, `linear_to_lora_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.diagnostics import Finding
from loraformat.formats.kit.base import DEFAULT_OPTIONS, WriteOptions
from loraformat.formats.kit.folder import bundle_of, json_file, lost_beside, tensor_file
from loraformat.formats.kit.losses import unknown_scale, unsupported_update, unsupported_updates
from loraformat.formats.kit.normalize import uniform
from loraformat.formats.kit.scaling import MAX_RANK
from loraformat.formats.kit.update_slots import Slots, all_slots, faults_of, low_ranks_of, unsaid, unstated_fields
from loraformat.formats.mlx.config import CONFIG, EMBEDDINGS, OWN_FILES, WEIGHTS
from loraformat.model.adapter import Adapter, AdapterConfig, module_of
from loraformat.model.bundle import Bundle, Json
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import LowRank

# MLX has no other floating types on every device.
_DTYPES = (DType.F32, DType.F16, DType.BF16)


def losses(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:  # noqa: ARG001
    """What MLX-LM cannot hold: anything but low-rank updates of matrices with one rank, one scale, all DoRA or none."""
    yield from unsupported_updates(faults_of(adapter, _fault), "MLX-LM")
    low_ranks = low_ranks_of(adapter)
    if not low_ranks:
        yield unsupported_update("", "an adapter without low-rank updates", "MLX-LM")
    plain = [weight for weight, update in low_ranks.items() if update.magnitude is None]
    if plain and len(plain) < len(low_ranks):
        yield unsupported_update(plain[0], "a plain update among DoRA updates", "MLX-LM")
    unknown = [weight for weight, update in low_ranks.items() if update.scale is None]
    if unknown:
        yield unknown_scale("", unknown)
    yield from uniform(adapter)[1]
    yield from lost_beside(adapter, _dropped(adapter.config), OWN_FILES)


def _fault(base_weight: str, slots: Slots) -> str | None:
    update = slots.low_rank
    if update is None or slots.updates() != (update,):
        kinds = {"replace": "a full weight", "rows": "trained rows", "dense": "a dense delta"}
        return next(words for name, words in kinds.items() if getattr(slots, name) is not None)
    if not base_weight.endswith(".weight"):
        return "a low-rank update of a parameter that is not called weight"
    if update.kernel:
        return "a low-rank update of a convolution"
    if update.magnitude is not None and update.magnitude.axis != 1:
        return "a DoRA magnitude along the other axis"
    if update.up.dtype not in _DTYPES or update.down.dtype not in _DTYPES:
        return f"a tensor in {update.up.dtype.torch_name} (--dtype float32 rounds it)"
    return None if 1 <= update.rank <= MAX_RANK else f"rank {update.rank}"


def _is_mlx(config: AdapterConfig) -> bool:
    return "lora_parameters" in config.raw and "peft_type" not in config.raw


def _dropped(config: AdapterConfig) -> list[str]:
    names = unsaid(config, "base_model", container="safetensors")
    return names if _is_mlx(config) else names + [name for name in unstated_fields(config.raw) if name not in _DROPOUT]


_DROPOUT = ("lora_dropout", "dropout")


def write(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:  # noqa: ARG001
    """A folder that mlx_lm loads: adapters.safetensors and adapter_config.json.

    Raises: AssertionError: `losses` has an error-level finding.
    """
    even, _ = uniform(adapter)
    layers = {module_of(weight): slots.low_rank for weight, slots in all_slots(even) if slots.low_rank is not None}
    entries: dict[str, LazyTensor] = {}
    for module, update in layers.items():
        a, b = (update.up, update.down) if update.is_embedding else (update.down.T, update.up.T)
        entries[f"{module}.lora_a"], entries[f"{module}.lora_b"] = a, b
        if update.magnitude is not None:
            entries[f"{module}.m"] = update.magnitude.vector
    weights = tensor_file(WEIGHTS, "safetensors", entries, "mlx")
    return bundle_of([json_file(CONFIG, _config(adapter.config, layers)), weights], adapter)


def _config(config: AdapterConfig, layers: dict[str, LowRank]) -> dict[str, Json]:
    """`keys` are full paths, so that exactly these modules are adapted, whatever `num_layers` says."""
    first = next(iter(layers.values()))
    kept = {name: value for name, value in config.raw.items() if name != EMBEDDINGS} if _is_mlx(config) else {}
    tables = sorted(module for module, update in layers.items() if update.is_embedding)
    parameters: dict[str, Json] = {
        "dropout": _dropout(config),
        "keys": list[Json](sorted(layers)),
        "rank": first.rank,
        "scale": first.scale,
    }
    return {
        **kept,
        **({EMBEDDINGS: list[Json](tables)} if tables else {}),
        "fine_tune_type": "lora" if first.magnitude is None else "dora",
        "lora_parameters": parameters,
        "model": config.base_model,
        "num_layers": -1,
    }


def _dropout(config: AdapterConfig) -> float:
    inner = config.raw.get("lora_parameters")
    stated = [*(config.raw.get(name) for name in _DROPOUT), inner.get("dropout") if isinstance(inner, dict) else None]
    values = [value for value in stated if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return float(values[0]) if values else 0.0
