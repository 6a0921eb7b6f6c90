"""loralib, Adapter to files: a flat state dict for custom loaders, and a file for what it cannot hold.

Source: loralib 0.1.2, loralib/layers.py; loralib/utils.py `lora_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat.diagnostics import Finding
from loraformat.formats.kit.base import DEFAULT_OPTIONS, WriteOptions
from loraformat.formats.kit.folder import bundle_of, json_file, lost_beside, tensor_file
from loraformat.formats.kit.losses import unknown_scale, unstated_in_file, unsupported_update, unsupported_updates
from loraformat.formats.kit.normalize import uniform
from loraformat.formats.kit.scaling import MAX_RANK, Scaling
from loraformat.formats.kit.update_slots import Slots, all_slots, faults_of, low_ranks_of, unsaid, unstated_fields
from loraformat.formats.loralib.read import SETTINGS
from loraformat.model.adapter import Adapter, module_of
from loraformat.model.bundle import Bundle, Json
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

WEIGHTS = {"torch": "lora.pt", "safetensors": "lora.safetensors"}


def losses(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:
    """What a flat state dict with one rank and one alpha cannot hold."""
    yield from unsupported_updates(faults_of(adapter, _fault), "loralib")
    layers = low_ranks_of(adapter)
    if not layers:
        yield unsupported_update("", "an adapter without low-rank updates", "loralib")
    unknown = [weight for weight, update in layers.items() if update.scale is None]
    if unknown:
        yield unknown_scale("", unknown)
    even, findings = uniform(adapter)
    yield from findings
    if layers and not unknown:
        alpha, rank = _alpha_and_rank(even)
        name = WEIGHTS[options.container or "torch"]
        yield unstated_in_file("", f"{name} does not contain lora_alpha {alpha:g} and r {rank}; {SETTINGS} does")
    dropped = unsaid(adapter.config, container=options.container or "torch") + unstated_fields(adapter.config.raw)
    yield from lost_beside(adapter, dropped, (*WEIGHTS.values(), SETTINGS))


def _fault(base_weight: str, slots: Slots) -> str | None:
    if slots.rows is not None:
        return "trained rows"
    if slots.dense is not None:
        return "a dense delta"
    if slots.replace is not None and not slots.replace.follows_tie:
        return "a full weight that a tied partner does not share"
    if slots.replace is not None and slots.low_rank is not None:
        return "a full weight with another update"
    return None if slots.low_rank is None else _low_rank_fault(base_weight, slots.low_rank)


def _low_rank_fault(base_weight: str, update: LowRank) -> str | None:
    if not base_weight.endswith(".weight"):
        return "a low-rank update of a parameter that is not called weight"
    if update.magnitude is not None:
        return "a DoRA magnitude"
    if update.kernel and (len(update.kernel) != 2 or len(set(update.kernel)) > 1):
        return "a convolution whose kernel is not square"
    return None if 1 <= update.rank <= MAX_RANK else f"rank {update.rank}"


def write(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:
    """A folder with lora.pt, which `load_state_dict(…, strict=False)` takes, and lora_settings.json.

    Args:
        options: container "torch" (default) or "safetensors".
    Raises: AssertionError: `losses` has an error-level finding.
    """
    container = options.container or "torch"
    even, _ = uniform(adapter)
    entries: dict[str, LazyTensor] = {}
    replaced: list[str] = []
    for base_weight, slots in all_slots(even):
        if slots.replace is not None:
            entries[base_weight] = slots.replace.value
            replaced.append(base_weight)
        if slots.low_rank is not None:
            a, b = _factors(slots.low_rank)
            module = module_of(base_weight)
            entries[f"{module}.lora_A"], entries[f"{module}.lora_B"] = a, b
    weights = tensor_file(WEIGHTS[container], container, entries)
    return bundle_of([json_file(SETTINGS, _settings(even, replaced)), weights], adapter)


def _settings(adapter: Adapter, replaced: list[str]) -> dict[str, Json]:
    alpha, rank = _alpha_and_rank(adapter)
    layers = {module_of(weight): update for weight, update in low_ranks_of(adapter).items()}
    optional: dict[str, Json] = {
        "embeddings": list[Json](module for module, update in layers.items() if update.is_embedding),
        "fan_in_fan_out": adapter.config.fan_in_fan_out or False,
        "kernel_sizes": {module: update.kernel[0] for module, update in layers.items() if update.kernel},
        "replaced": list[Json](replaced),
    }
    return {"lora_alpha": alpha, "r": rank, **{name: value for name, value in optional.items() if value}}


def _alpha_and_rank(adapter: Adapter) -> tuple[float, int]:
    update = next(iter(low_ranks_of(adapter).values()))
    assert update.scale is not None
    return Scaling().alpha(update.scale, update.rank), update.rank


def _factors(update: LowRank) -> tuple[LazyTensor, LazyTensor]:
    """(A, B) of Linear, Embedding or Conv2d."""
    if update.is_embedding:
        return update.up.T, update.down.T
    if not update.kernel:
        return update.down, update.up
    size, rank = update.kernel[0], update.rank
    width = update.down.shape[1] // size
    return update.down.reshape(rank * size, width), _spread(update.up, size)


def _spread(up: LazyTensor, size: int) -> LazyTensor:
    """kron(up, I): each output `size` times, as Conv2d takes `(B @ A).view(out, in, size, size)`."""
    rows, rank = up.shape

    def read(start: int, stop: int) -> Values:
        import numpy as np

        first, last = start // size, math.ceil(stop / size)
        values = up.read(first, last)
        whole = np.zeros((last - first, size, rank, size), values.dtype)
        for number in range(size):
            whole[:, number, :, number] = values
        return whole.reshape((last - first) * size, rank * size)[start - first * size : stop - first * size]

    return LazyTensor((rows * size, rank * size), up.dtype, read)
