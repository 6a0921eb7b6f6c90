"""Transposed factors under PEFT's names: A (in, rank), B (rank, out), as in other code."""

from __future__ import annotations

from loraformat.diagnostics import Finding, FindingLocation
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.findings import transposed_factors
from loraformat.formats.peft.config.fields import PeftConfig
from loraformat.formats.peft.keys import Sorted
from loraformat.model.tensors import LazyTensor

# Layers that all read the hidden state, and so have inputs of one size.
_READERS = frozenset(
    [
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3"),
        *("query", "key", "value", "query_key_value", "q", "k", "v", "wi_0", "wi_1", "fc1", "dense_h_to_4h"),
    ]
)

Pairs = dict[str, tuple[LazyTensor, LazyTensor]]


def transpose_back(found: Sorted, config: PeftConfig, hints: Hints, where: FindingLocation) -> list[Finding]:
    """Turns the factors of all layers, where all are transposed and it is certain that they are not exchanged.

    Exchanged factors, A (out, rank) and B (rank, in), have shapes of the same kind. The base tells them apart where a
    weight is not square; without one, layers that read the hidden state must agree about its size in one reading and
    disagree in the other.

    Args:
        found: changed in place.
    Returns: one LF242, or nothing where the factors stand as they should, or where it is not certain.
    """
    pairs: Pairs = {
        module: (parts["A"], parts["B"])
        for module, parts in found.modules.items()
        if "A" in parts and "B" in parts and len(parts["A"].shape) == len(parts["B"].shape) == 2
    }
    fitting = {module for module, (a, b) in pairs.items() if a.shape[0] == b.shape[1]}
    odd = pairs.keys() - fitting
    if not odd or not all(_is_transposed(pairs[module], config.rank_of(module)) for module in pairs):
        return []
    if not (_base_agrees(pairs, hints) if hints.weights is not None else _readers_agree(pairs)):
        return []
    for module, (a, b) in pairs.items():
        found.modules[module].update(A=a.T, B=b.T)
    return [transposed_factors(where, sorted(pairs))]


def _is_transposed(pair: tuple[LazyTensor, LazyTensor], rank: int) -> bool:
    a, b = pair
    return a.shape[1] == b.shape[0] == rank


def _base_agrees(pairs: Pairs, hints: Hints) -> bool:
    """Whether every weight of the base fits the transposed factors, and one of them does not fit exchanged ones."""
    shapes = {module: (hints.weights or {}).get(f"{module}.weight") for module in pairs}
    known = {module: shape for module, shape in shapes.items() if shape is not None and len(shape) == 2}
    transposed = all(shape == (pairs[module][1].shape[1], pairs[module][0].shape[0]) for module, shape in known.items())
    return transposed and any(shape[0] != shape[1] for shape in known.values())


def _readers_agree(pairs: Pairs) -> bool:
    readers = [pair for module, pair in pairs.items() if module.rpartition(".")[2] in _READERS]
    return len({a.shape[0] for a, _ in readers}) == 1 and len({b.shape[1] for _, b in readers}) > 1
