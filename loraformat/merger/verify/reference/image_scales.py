"""The factor of image and video adapters, where a whole file has one: alpha over rank by module, or its header.

Which module of the file a weight is takes the names of the family, which the reader has and this check must not
share. So the factors of all modules are computed, and only where they are one number is it known for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

from loraformat.model.bundle import Bundle
from loraformat.model.tensors import LazyTensor

# Ends of names of a factor whose first axis is the rank.
_DOWN = (
    *(".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_linear_layer.down.weight"),
    *(".lora.down.weight", "_lora.down.weight", ".hada_w1_b", ".lokr_w2_b", ".lokr_w1_b", ".down.weight", ".lora_A"),
)
_WHOLE = (".lokr_w1", ".lokr_w2")
_DENSE = (".diff", ".diff_b", ".w_norm", ".b_norm")
_ALPHA = ".alpha"
_HEADER = "lora_adapter_metadata"


def single_factor(bundle: Bundle, *, alpha: float | None = None, scale: float | None = None) -> float | None:
    """The factor of every module of a file; None where modules have several, or none can be computed.

    Args:
        alpha, scale: what the caller says of modules about which the file says nothing.
    """
    factors: set[float] = set()
    for file in bundle.tensor_files():
        tensors = file.open()
        for rank, stated in _factors(tensors.entries, tensors.metadata.get(_HEADER)):
            if stated is not None or not rank:
                factors.add(1.0 if stated is None else stated)
            elif scale is not None or alpha is None:
                factors.add(1.0 if scale is None else scale)
            else:
                factors.add(alpha / rank)
    return factors.pop() if len(factors) == 1 and all(map(math.isfinite, factors)) else None


def has_dense_deltas(bundle: Bundle) -> bool:
    """Whether all dense deltas of a file stand there as such: none is made of a product."""
    names = [name for file in bundle.tensor_files() for name in file.open().entries]
    return any(name.endswith(_DENSE) for name in names) and not any(".lokr_" in name for name in names)


def _factors(entries: Mapping[str, LazyTensor], header: str | None) -> Iterator[tuple[int, float | None]]:
    """(rank of a module, its factor as the file states it, or None)."""
    stated = _of_header(header)
    for module, rank in _ranks(entries).items():
        alpha = entries.get(module + _ALPHA)
        if alpha is not None and alpha.numel == 1:
            yield rank, float(alpha.load().reshape(-1)[0]) / rank if rank else 1.0
        elif stated is None:
            yield rank, None
        else:
            yield from ((rank, each) for each in stated)


def _ranks(entries: Mapping[str, LazyTensor]) -> dict[str, int]:
    """Module → its rank; 0 for a Kronecker product of two whole matrices, in which alpha has no effect."""
    found: dict[str, int] = {}
    for name, tensor in entries.items():
        ending = next((end for end in _DOWN if name.endswith(end)), None)
        if ending is not None and tensor.shape:
            module = name.removesuffix(ending)
            # Of two factored sides the second has the rank that counts.
            if ending != ".lokr_w1_b" or module not in found or not found[module]:
                found[module] = tensor.shape[0]
        elif name.endswith(_WHOLE):
            found.setdefault(name.rpartition(".")[0], 0)
    return found


def _of_header(text: str | None) -> list[float] | None:
    """The factors of the components; NaN where patterns give some modules another. None without a header."""
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except ValueError:
        return [math.nan]
    if not isinstance(fields, dict):
        return [math.nan]
    found = []
    for component in sorted({key.partition(".")[0] for key in fields}):
        rank, alpha = (fields.get(f"{component}.{name}") for name in ("r", "lora_alpha"))
        patterns = [fields.get(f"{component}.{name}") for name in ("rank_pattern", "alpha_pattern")]
        if any(patterns) or not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
            return [math.nan]
        found.append(alpha / math.sqrt(rank) if fields.get(f"{component}.use_rslora") else alpha / rank)
    return found
