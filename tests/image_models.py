"""Adapters of image models by family and kind of update, with values that depend on their names alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from loraformat.model.adapter import Adapter, AdapterConfig, Pipeline
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Magnitude, Update
from loraformat.naming.families import Family, Module, denoisers

HIDDEN = 12
FAMILIES = [family.name for family in denoisers()]
KINDS = ("linear", "mixed scales", "convolution", "dora by output", "dora by input", "LoHa", "LoKr", "dense", "bias")
DELTAS = ("LoHa", "LoKr", "dense", "bias")


def values(name: str, *shape: int) -> LazyTensor:
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    return LazyTensor.of(numbers.astype(np.float32))


def shape_of(module: Module, part: int) -> tuple[int, int]:
    """(rows, inputs) of a part of a module, in the family's own proportions."""
    unit = module.rows[part] if module.rows else None
    if unit is None:
        return (2 * HIDDEN if module.is_swapped else HIDDEN), HIDDEN
    inputs = HIDDEN if len(module.diffusers) > 1 else HIDDEN * unit.denominator
    return int(unit * inputs), inputs


def modules_of(family: Family, *, is_fused: bool | None = None, share: slice) -> Iterator[tuple[str, int, int]]:
    """(name in diffusers, rows, inputs) of modules, in two blocks where there are any.

    Args:
        share: which of the original's modules.
    """
    for module in family.modules[share]:
        if is_fused is not None and (len(module.diffusers) > 1) is not is_fused:
            continue
        for block in ("0", "1") if "{}" in module.original else ("",):
            for part, name in enumerate(module.diffusers):
                yield (name.format(*[block] * name.count("{}")), *shape_of(module, part))


def low_rank(name: str, rows: int, inputs: int, *, rank: int = 2, scale: float = 1.5) -> LowRank:
    return LowRank(values(f"{name}.up", rows, rank), values(f"{name}.down", rank, inputs), scale)


def updates_of(kind: str, name: str, rows: int, inputs: int) -> dict[str, tuple[Update, ...]]:
    """Parameter → updates of one module."""
    pair = low_rank(name, rows, inputs)
    if kind == "mixed scales":
        number = zlib.crc32(name.encode()) % 3
        return {"weight": (low_rank(name, rows, inputs, rank=1 + number, scale=(0.5, 1.0, 1 / 3)[number]),)}
    if kind == "convolution":
        down = values(f"{name}.down", 2, inputs * 9)
        return {"weight": (LowRank(pair.up, down, 0.7, kernel=(3, 3)),)}
    if kind.startswith("dora"):
        axis = 1 if kind == "dora by output" else 0
        vector = values(f"{name}.m", rows if axis else inputs)
        return {"weight": (LowRank(pair.up, pair.down, 1.5, Magnitude(vector, axis)),)}
    if kind == "LoHa":
        sides = [(values(f"{name}.u{n}", rows, 2), values(f"{name}.d{n}", 2, inputs)) for n in (1, 2)]
        return {"weight": (Hadamard(*sides[0], *sides[1], 0.75),)}
    if kind == "LoKr":
        right = (values(f"{name}.r0", rows // 2, 2), values(f"{name}.r1", 2, inputs // 2))
        return {"weight": (Kronecker((values(f"{name}.l", 2, 2),), right, 0.6),)}
    if kind == "dense":
        return {"weight": (Dense(values(f"{name}.delta", rows, inputs)),)}
    found: dict[str, tuple[Update, ...]] = {"weight": (pair,)}
    if kind == "bias":
        found["bias"] = (Dense(values(f"{name}.bias", rows), 1.5),)
    return found


def adapter_of(family: Family, kind: str, *, is_whole_model: bool = False) -> Adapter:
    """An adapter for modules of the family, but for those that no format can hold in this kind.

    Args:
        is_whole_model: all modules, rather than every fourth, others for each kind; of U-Nets every ninth anyhow.
    """
    step = 9 if family.component == "unet" else 1 if is_whole_model else 4
    share = slice(KINDS.index(kind) % step, None, step)
    is_whole = kind in ("dora by input", "convolution")
    updates: dict[str, tuple[Update, ...]] = {}
    for name, rows, inputs in modules_of(family, is_fused=False if is_whole else None, share=share):
        for parameter, chain in updates_of(kind, name, rows, inputs).items():
            updates[f"{family.component}.{name}.{parameter}"] = chain
    pipeline = Pipeline(families=(family.name,), components=(family.component,))
    return Adapter(config=AdapterConfig(pipeline=pipeline), updates=dict(sorted(updates.items())))
