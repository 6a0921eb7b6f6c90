"""The kinds of update, each a class, and one table with a line for each.

Nothing here checks shapes; the rules do. A new kind has a class in one of these modules and a line in KINDS, its
arithmetic in `merger/compute/kinds/`, and its formula in `merger/verify/reference/kinds/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeAlias, Union, cast

from loraformat.errors import UnsupportedUpdate
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base import Kind, map_tensors, settings, tensors
from loraformat.model.updates.base_dependent import (
    ACTIVATIONS,
    BiasFromWeight,
    BlockAffine,
    FRoD,
    SubtractedInit,
    WeightNetwork,
)
from loraformat.model.updates.dense import Dense, Replace
from loraformat.model.updates.low_rank import LowRank, Magnitude
from loraformat.model.updates.multiplicative import ElementwiseScale, Multiplied, Rotated, Scaled
from loraformat.model.updates.products import Hadamard, Kronecker
from loraformat.model.updates.rows import Rows

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "BiasFromWeight",
    "BlockAffine",
    "Dense",
    "ElementwiseScale",
    "FRoD",
    "Hadamard",
    "Kind",
    "Kronecker",
    "LowRank",
    "Magnitude",
    "Multiplied",
    "Replace",
    "Rotated",
    "Rows",
    "Scaled",
    "SubtractedInit",
    "Update",
    "WeightNetwork",
    "every_kind",
    "formula_of",
    "kind_named",
    "kind_of",
    "map_tensors",
    "products_of",
    "rank_of",
    "scale_of",
    "settings",
    "tensors",
]

Update: TypeAlias = Union[
    LowRank,
    Hadamard,
    Kronecker,
    Dense,
    Replace,
    Rows,
    Scaled,
    Rotated,
    Multiplied,
    ElementwiseScale,
    SubtractedInit,
    BlockAffine,
    WeightNetwork,
    FRoD,
    BiasFromWeight,
]

_MULTIPLICATIVE = "multiplicative (IA3, OFT …)"

_DORA = Kind(
    name="dora",
    formula="m * (W + s*B@A) / norm(W + s*B@A)",
    family="dora",
    label="DoRA",
    unit="DoRA pair",
    is_sum=True,
    has_scale=True,
    has_rank=True,
    needs_base=True,
    by_rows=lambda update, transposed: (update.magnitude.axis == 1) != transposed,
)

KINDS: Mapping[type[Update], Kind] = {
    LowRank: Kind(
        name="low-rank",
        formula="W + s*B@A",
        family="linear",
        label="LoRA",
        unit="LoRA pair",
        is_sum=True,
        has_scale=True,
        has_rank=True,
        has_strength=True,
        by_rows=lambda _update, _transposed: True,
        variants=((lambda update: update.magnitude is not None, _DORA),),
    ),
    Hadamard: Kind(
        name="hadamard",
        formula="W + s*((B1@A1) * (B2@A2))",
        family="LoHa/LoKr",
        label="LoHa",
        is_sum=True,
        has_scale=True,
        has_rank=True,
        has_strength=True,
    ),
    Kronecker: Kind(
        name="kronecker",
        formula="W + s*kron(L, R)",
        family="LoHa/LoKr",
        label="LoKr",
        is_sum=True,
        has_scale=True,
        has_strength=True,
    ),
    Dense: Kind(
        name="dense",
        formula="W + s*D",
        family="dense delta",
        unit="dense delta",
        is_sum=True,
        has_scale=True,
        has_strength=True,
        by_rows=lambda _update, _transposed: True,
    ),
    Replace: Kind(
        name="replace",
        formula="V",
        family="full weights",
        label="full",
        unit="full weight",
        overwrites=True,
        needs_base=True,
    ),
    Rows: Kind(
        name="rows",
        formula="W with rows V",
        family="trained rows",
        label="trained rows",
        unit="set of trained rows",
        units="sets of trained rows",
        overwrites=True,
        needs_base=True,
    ),
    Scaled: Kind(name="scaled", formula="r * W * c", family=_MULTIPLICATIVE, needs_base=True),
    Rotated: Kind(
        name="rotated",
        formula=lambda update: "L @ W" if update.side == "left" else "W @ R",
        family=_MULTIPLICATIVE,
        needs_base=True,
        row_unit=lambda update, transposed, rows: update.row_unit(transposed, rows),
    ),
    Multiplied: Kind(
        name="multiplied",
        formula="W @ (I + B@A)",
        family=_MULTIPLICATIVE,
        needs_base=True,
        row_unit=lambda _update, transposed, rows: rows if transposed else 1,
    ),
    ElementwiseScale: Kind(name="elementwise-scale", formula="W * (1 + B@A)", family=_MULTIPLICATIVE, needs_base=True),
    SubtractedInit: Kind(
        name="subtracted-init",
        formula=lambda update: f"W - {update.recipe}(W)",
        family="init subtracted from the base (PiSSA, OLoRA)",
        needs_base=True,
        whole=lambda _update, rows, cols: rows * cols,
    ),
    BlockAffine: Kind(
        name="block-affine",
        formula="T + (T + I) @ M of tiles T of W",
        family=_MULTIPLICATIVE,
        needs_base=True,
        row_unit=lambda update, transposed, _rows: update.size if transposed else 1,
    ),
    WeightNetwork: Kind(
        name="weight-network", formula="W + s*B @ f(A@W)", family=_MULTIPLICATIVE, has_scale=True, needs_base=True
    ),
    FRoD: Kind(
        name="frod",
        formula="U @ C of W = U * n @ V.T",
        family=_MULTIPLICATIVE,
        needs_base=True,
        row_unit=lambda _update, transposed, rows: rows if transposed else 1,
        whole=lambda update, _rows, _cols: update.basis.numel,
    ),
    BiasFromWeight: Kind(
        name="bias-from-weight",
        formula="b + W@c",
        family=_MULTIPLICATIVE,
        needs_base=True,
        operand=lambda update: (update.weight, (update.length, update.vector.numel)),
    ),
}


class _Scalable(Protocol):
    @property
    def scale(self) -> float | None: ...


class _Ranked(Protocol):
    @property
    def rank(self) -> int: ...


def kind_of(update: Update) -> Kind:
    """The line of the table that holds for an update: that of its class, or of a variant such as DoRA.

    Raises: UnsupportedUpdate (LF013): its class has no line.
    """
    kind = KINDS.get(type(update))
    if kind is None:
        raise no_line(type(update), "KINDS in loraformat/model/updates/__init__.py")
    return next((line for is_one, line in kind.variants if is_one(update)), kind)


def no_line(update: type[object], table: str) -> UnsupportedUpdate:
    """The error about a kind that a table lacks."""
    return UnsupportedUpdate(
        f"updates of the class {update.__name__} have no line in {table}",
        where="update",
        hint="this is a bug in loraformat: please report it",
    )


def every_kind() -> Iterator[Kind]:
    """All lines of the table, variants after their class."""
    for kind in KINDS.values():
        yield kind
        yield from (line for _, line in kind.variants)


def kind_named(name: str) -> Kind | None:
    """The line of the table that has a name; None for a name that none has: "low-rank -> dora", say."""
    return next((kind for kind in every_kind() if kind.name == name), None)


def formula_of(update: Update) -> str:
    """How an update changes its weight W; s is its scale, norms run along the axis of DoRA's magnitude m."""
    formula = kind_of(update).formula
    return formula if isinstance(formula, str) else formula(update)


def scale_of(update: Update) -> float | None:
    """The factor really applied; None where nobody stated it, or where the kind has none."""
    return cast("_Scalable", update).scale if kind_of(update).has_scale else None


def rank_of(update: Update) -> int | None:
    """The rank of a low-rank update, or of either product of a LoHa; None for the other kinds."""
    return cast("_Ranked", update).rank if kind_of(update).has_rank else None


def products_of(update: Update) -> tuple[tuple[LazyTensor, LazyTensor], ...]:
    """The (up, down) of which an additive update is made, as matrices that must fit; none of a stack of experts."""
    return update.products if isinstance(update, (LowRank, Hadamard, Kronecker)) else ()
