"""GLoRA: W' = W + W ∘ A + B and b' = b + b ∘ D + E + W C, each of the five a product, a vector, one value or nothing.

What is nothing is in the file as zeros. Source: peft 0.21.2, tuners/glora/layer.py `update_layer`, `merge`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.arithmetic import multiply
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, exact, require
from loraformat.model.floats import float64_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import BiasFromWeight, Dense, ElementwiseScale, LowRank, Scaled, Update

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def _read(source: Source, module: str, parts: Parts) -> Chains:
    if not all(_is_whole(parts, path) for path in "ABCDE"):
        return {}
    chains = {
        f"{module}.weight": (*_factor(source, module, parts), *_sum(source, module, parts)),
        f"{module}.bias": (*_of_bias(source, module, parts), *_from_weight(source, module, parts)),
    }
    return {weight: chain for weight, chain in chains.items() if chain}


def _is_whole(parts: Parts, path: str) -> bool:
    """Whether one of the forms that a path may have is there."""
    forms = (("Xd", "Xu"), ("X",), ("zeros",))
    return any(all(f"glora_{path}.{factor}" in parts for factor in form) for form in forms)


def _pair(module: str, parts: Parts, path: str) -> tuple[LazyTensor, LazyTensor] | None:
    """The two factors of a path that is a product."""
    up, down = parts.get(f"glora_{path}.Xd"), parts.get(f"glora_{path}.Xu")
    if up is None or down is None:
        return None
    require(up.shape[1] == down.shape[0], module, f"glora_{path}: {up.shape} and {down.shape} are not a factor pair")
    return up, down


def _factor(source: Source, module: str, parts: Parts) -> tuple[Update, ...]:
    pair, values = _pair(module, parts, "A"), parts.get("glora_A.X")
    if pair is not None:
        return (ElementwiseScale(*pair),)
    if values is None:
        return ()
    return (Scaled(_one_more(module, values, _outputs(source, module, parts)), is_sum=True),)


def _sum(source: Source, module: str, parts: Parts) -> tuple[Update, ...]:
    pair, values = _pair(module, parts, "B"), parts.get("glora_B.X")
    if pair is not None:
        return (LowRank(*pair, 1.0),)
    if values is None:
        return (Dense(parts["glora_B.zeros"]),)  # added as they are, so that a layer that does nothing is one too
    out, into = source.shape(module, out=values.numel if values.numel > 1 else None)
    up = computed((out, 1), lambda: _expanded(float64_of(values), out)[:, None])
    return (LowRank(up, computed((1, into), lambda: _ones(into)), 1.0),)


def _of_bias(source: Source, module: str, parts: Parts) -> tuple[Update, ...]:
    factors, added = parts.get("glora_D.X"), parts.get("glora_E.X")
    out = _outputs(source, module, parts) if factors is not None or added is not None else 0
    chain: tuple[Update, ...] = ()
    if factors is not None:
        chain = (Scaled(_one_more(module, factors, out), is_bias=True, is_sum=True),)
    if added is not None:
        require(added.numel in (1, out), module, f"glora_E {added.shape} does not fit {out} outputs")
        chain = (*chain, Dense(computed((out,), lambda: _expanded(float64_of(added), out))))
    return chain


def _from_weight(source: Source, module: str, parts: Parts) -> tuple[Update, ...]:
    pair, values = _pair(module, parts, "C"), parts.get("glora_C.X")
    if pair is not None:
        up, down = pair
        require(down.shape[1] == 1, module, f"glora_C {up.shape}, {down.shape} is not a column")
        vector = exact((up.shape[0],), lambda: multiply(float64_of(up), float64_of(down))[:, 0])
    elif values is not None:
        vector = values.reshape(values.numel)
    else:
        return ()
    return (BiasFromWeight(f"{module}.weight", vector, _outputs(source, module, parts)),)


def _outputs(source: Source, module: str, parts: Parts) -> int:
    """How many outputs the layer has: told by a product, or by a vector of them, else by the base."""
    for name in ("glora_A.Xd", "glora_B.Xd", "glora_A.X", "glora_B.X", "glora_D.X", "glora_E.X"):
        stored = parts.get(name)
        if stored is not None and stored.shape[0] > 1:
            return stored.shape[0]
    column = parts.get("glora_C.Xd", parts.get("glora_C.X"))
    return source.shape(module, into=None if column is None else column.shape[0])[0]


def _one_more(module: str, values: LazyTensor, out: int) -> LazyTensor:
    """(out,): 1 + the values, of which there may be one for all."""
    require(values.numel in (1, out), module, f"factors of shape {values.shape} do not fit {out} outputs")
    return exact((out,), lambda: _expanded(1 + float64_of(values), out))


def _expanded(values: Floats, out: int) -> Floats:
    """(out,): the values, or the one value for all."""
    import numpy as np

    return np.broadcast_to(values.reshape(-1), (out,))


def _ones(columns: int) -> Floats:
    import numpy as np

    return np.ones((1, columns))


GLORA = Tuner(
    parts={
        **{f"glora_{path}.{factor}": (2,) for path in "ABC" for factor in ("Xd", "Xu")},
        **{f"glora_{path}.X": (1, 2) for path in "ABCDE"},
        **{f"glora_{path}.zeros": () for path in "ABCDE"},
    },
    read=_read,
    settings=("config_A_B", "config_C", "config_D_E", "init_weights", "r"),
)
