"""Hypothesis strategies: adapters of every kind that the native format and PEFT can hold."""

from __future__ import annotations

from collections.abc import Collection

import torch
from hypothesis import strategies as st
from torch import Tensor

from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank, Magnitude, Replace, Rows, Update

KINDS = frozenset({"linear", "conv", "embedding", "table", "rows", "bias", "norm", "difference"})

ALPHAS = st.one_of(st.integers(1, 64), st.floats(0.01, 100, allow_nan=False), st.just(-3))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def lazy(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> LazyTensor:
    """Values that depend on shape and seed only."""
    return LazyTensor.of(values(*shape, seed=seed, dtype=dtype))


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def low_ranks(draw: st.DrawFn, form: str = "linear", *, dora: bool = False) -> LowRank:
    rank, rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kernel = tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))) if form == "conv" else ()
    seed, dtype = draw(st.integers(0, 99)), draw(DTYPES)
    width = cols * torch.Size(kernel).numel()
    magnitude = None
    if dora:
        axis = 0 if form == "embedding" else 1
        magnitude = Magnitude(lazy(width if axis == 0 else rows, seed=seed + 2, dtype=dtype), axis)
    return LowRank(
        lazy(rows, rank, seed=seed, dtype=dtype),
        lazy(rank, width, seed=seed + 1, dtype=dtype),
        draw(ALPHAS) / rank,
        magnitude,
        kernel,
        is_embedding=form == "embedding",
    )


@st.composite
def adapters(draw: st.DrawFn, kinds: Collection[str] = KINDS, *, with_layer: bool = False) -> Adapter:
    """An adapter with some updates of the given kinds, at most one combination a weight.

    Args:
        with_layer: at least one low-rank update of a linear layer.
    """
    dora = draw(st.booleans())
    layers = st.lists(st.integers(0, 11), min_size=1 if with_layer else 0, max_size=4, unique=True)
    updates: dict[str, tuple[Update, ...]] = {}
    for layer in draw(layers):
        name = f"model.layers.{layer}." + draw(st.sampled_from(["q_proj", "mlp.up-proj", "q_projx"]))
        updates[f"{name}.weight"] = (draw(low_ranks(dora=dora)),)
        scale = updates[f"{name}.weight"][0].scale
        if "difference" in kinds and not dora and draw(st.booleans()):
            updates[f"{name}.bias"] = (Dense(lazy(3, seed=layer), scale),)
        elif "bias" in kinds and draw(st.booleans()):
            updates[f"{name}.bias"] = (Replace(lazy(3, seed=layer)),)
    for kind in sorted(kinds):
        if draw(st.booleans()):
            updates.update(draw(_special(kind, dora=dora)))
    config = AdapterConfig(base_model=draw(st.sampled_from([None, "example/tiny"])))
    return Adapter(config=config, updates=dict(sorted(updates.items())))


def _special(kind: str, *, dora: bool) -> st.SearchStrategy[dict[str, tuple[Update, ...]]]:
    tables = st.builds(lambda n: Replace(lazy(n, 4, seed=n)), st.integers(1, 9))
    match kind:
        case "conv":
            return low_ranks("conv", dora=dora).map(lambda update: {"stem.conv.weight": (update,)})
        case "embedding":
            tuples = st.tuples(low_ranks("embedding", dora=dora)) | st.tuples(tables, low_ranks("embedding", dora=dora))
            return tuples.map(lambda several: {"model.embed_tokens.weight": several})
        case "table":
            return tables.map(lambda table: {"token_embedding.weight": (table,)})
        case "rows":
            rows = st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(tuple)
            plain = st.tuples(rows.map(lambda numbers: Rows(numbers, lazy(len(numbers), 4, seed=numbers[0]))))
            return (plain | st.tuples(tables, plain).map(lambda pair: (pair[0], *pair[1]))).map(
                lambda several: {"shared.weight": several}
            )
        case "norm":
            return st.just({"model.norm.weight": (Replace(lazy(4, seed=5), follows_tie=False),)})
        case "bias":
            return st.just({"model.layers.0.norm.bias": (Replace(lazy(4, seed=6)),)})
        case _:
            return st.just({})
