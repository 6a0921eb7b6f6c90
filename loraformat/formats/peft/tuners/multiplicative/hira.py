"""HiRA: every value of a weight times a factor of its own, one more than a low-rank product.

Source: peft 0.21.2, tuners/hira/layer.py `get_delta_weight`.
"""

from __future__ import annotations

import math

from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, require
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import ElementwiseScale

_TABLE = ("hira_embedding_A", "hira_embedding_B")
_LAYER = ("hira_A", "hira_B")


def _read(source: Source, module: str, parts: Parts) -> Chains:
    del source
    if all(name in parts for name in _LAYER):
        down, up = (_matrix(parts[name]) for name in _LAYER)
    elif all(name in parts for name in _TABLE):
        # (rank, vocabulary) and (dim, rank): the product is of the transposed table.
        up, down = (parts[name].T for name in _TABLE)
    else:
        return {}
    require(up.shape[1] == down.shape[0], module, f"hira_A has rank {down.shape[0]}, hira_B {up.shape[1]}")
    return {f"{module}.weight": (ElementwiseScale(up, down),)}


def _matrix(factor: LazyTensor) -> LazyTensor:
    """The factor of a convolution with its trailing axes flattened."""
    return factor.reshape(factor.shape[0], math.prod(factor.shape[1:]))


HIRA = Tuner(
    parts={**dict.fromkeys(_LAYER, (2, 3, 4, 5)), **dict.fromkeys(_TABLE, (2,))},
    read=_read,
    settings=("hira_dropout", "init_weights", "r", "rank_pattern"),
)
