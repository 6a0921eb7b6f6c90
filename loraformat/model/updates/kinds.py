"""What an adapter does to one weight: the closed union `Update`. Nothing here checks shapes; the rules do."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, Union

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base_dependent import OF_BASE, Carried, OfBase, Projected, Recoded, Tiled, tensors_of_base

if sys.version_info >= (3, 11):
    from typing import assert_never
else:
    from typing_extensions import assert_never


@dataclass(frozen=True, slots=True)
class Magnitude:
    """DoRA: each row or column of `W + ΔW` is divided by its norm and multiplied by `vector`.

    Attributes:
        vector: (rows,) where `axis` is 1, (cols,) where `axis` is 0.
        axis: along which the norms are taken: 1 for linear and convolution layers (a norm per output), 0 for embeddings
            (a norm per embedding dimension, over the vocabulary).

    Source: peft 0.21.2, tuners/lora/dora.py.
    """

    vector: LazyTensor
    axis: int = 1


@dataclass(frozen=True, slots=True)
class LowRank:
    """ΔW = scale · up @ down, in Linear orientation (out, in), whatever the file or the checkpoint stores.

    Attributes:
        up: (rows, rank): (out, rank); for an embedding (vocabulary, rank); for stacked experts (experts, rows, rank).
        down: (rank, cols): (rank, in); for an embedding (rank, dim); for a convolution (rank, in · prod(kernel)); for
            stacked experts (experts, rank, cols).
        scale: the factor really applied, alpha / rank or alpha / sqrt(rank). None: nobody stated it.
        magnitude: DoRA's vector, or None.
        kernel: () for a matrix; (k,), (kh, kw), (kd, kh, kw) for a convolution, whose update is (rows, in, *kernel).
        is_embedding: whether the weight is an embedding table, so that writers can spell it as their format does.
    """

    up: LazyTensor
    down: LazyTensor
    scale: float | None
    magnitude: Magnitude | None = None
    kernel: tuple[int, ...] = ()
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """Rows of `down`, of one expert where it is a stack."""
        return self.down.shape[-2] if len(self.down.shape) > 1 else math.prod(self.down.shape[:1])

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of matrices, one for each expert, whose factors fit."""
        up, down = self.up.shape, self.down.shape
        return len(up) == len(down) == 3 and up[0] == down[0] and up[2] == down[1]

    def expert(self, number: int) -> tuple[LazyTensor, LazyTensor]:
        """(up, down) of one matrix of a stack."""
        up, down = (one.rows(number, number + 1).reshape(*one.shape[1:]) for one in (self.up, self.down))
        return up, down

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the update; meaningful when the factors fit."""
        if self.is_stack:
            return (*self.up.shape[:2], self.down.shape[2])
        rows = self.up.shape[0] if self.up.shape else 0
        cols = self.down.shape[-1] if self.down.shape else 0
        return (rows, cols // math.prod(self.kernel), *self.kernel) if self.kernel else (rows, cols)


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: ΔW = scale · (up1 @ down1) ∘ (up2 @ down2).

    Attributes: up1, up2: (rows, rank); down1, down2: (rank, cols).
    Source: peft 0.21.2, tuners/loha/layer.py.
    """

    up1: LazyTensor
    down1: LazyTensor
    up2: LazyTensor
    down2: LazyTensor
    scale: float | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols); meaningful when the factors fit."""
        return (_size(self.up1, 0), _size(self.down1, 1))

    @property
    def is_even(self) -> bool:
        """Whether both are products, and of the same shape."""
        are_products = all(_is_product((up, down)) for up, down in ((self.up1, self.down1), (self.up2, self.down2)))
        return are_products and self.shape == (_size(self.up2, 0), _size(self.down2, 1))


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: ΔW = scale · kron(left, right), each either one matrix or the product of two.

    Attributes:
        left: one matrix (a, b), or two: (a, rank), (rank, b).
        right: one matrix (c, d), or two: (c, rank), (rank, d). The update is (a·c, b·d).
    Source: peft 0.21.2, tuners/lokr/layer.py.
    """

    left: tuple[LazyTensor, ...]
    right: tuple[LazyTensor, ...]
    scale: float | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(a·c, b·d); meaningful when the factors fit."""
        (a, b), (c, d) = ((_size(factors[0], 0), _size(factors[-1], 1)) for factors in (self.left, self.right))
        return (a * c, b * d)

    @property
    def is_even(self) -> bool:
        """Whether factors that are two matrices are products."""
        return _is_product(self.left) and _is_product(self.right)


@dataclass(frozen=True, slots=True)
class Diff:
    """ΔW = scale · difference, dense: a trained bias of `lora_B`, say."""

    difference: LazyTensor
    scale: float | None = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.difference.shape


@dataclass(frozen=True, slots=True)
class Replace:
    """The whole tensor is replaced; its shape may differ from the base's only in the vocabulary axis of an embedding.

    Attributes:
        follows_tie: whether a tied partner follows the new table (hand-written folders, resized embeddings) or keeps
            the old one and is untied (PEFT's `modules_to_save`, which trains a copy).
    """

    value: LazyTensor
    follows_tie: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the new tensor."""
        return self.value.shape


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows are replaced, or appended where they stand at or after the end of the table.

    Attributes:
        indices: row numbers in the order of `values`, each at most once.
        values: (len(indices), cols), absolute rows, not differences.
        follows_tie: see Replace.
    """

    indices: tuple[int, ...]
    values: LazyTensor
    follows_tie: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(least number of rows that the table must have, cols); cols is 0 where `values` is no matrix."""
        cols = self.values.shape[1] if len(self.values.shape) > 1 else 0
        return (max(self.indices, default=-1) + 1, cols)


@dataclass(frozen=True, slots=True)
class FromBase:
    """ΔW = −part(W): a part of the base's own matrix is taken off, as an initialisation did before training.

    It is computed from the whole un-merged matrix, in Linear orientation but for "olora", and needs no tensors.

    Attributes:
        recipe: "pissa": the `rank` largest singular components; "kasa", "osf": the `rank` smallest of them; "olora":
            scale · Q[:, :rank] @ R[:rank] of the QR decomposition of the matrix as it is stored.
        rank: at least 1.
        scale: of the low-rank update beside it; None where nobody stated it.
        shape: of the weight.

    Source: peft 0.21.2, tuners/lora/layer.py `pissa_init`, `olora_init`; tuners/lora/variants.py `KasaLinearVariant`;
    tuners/osf/layer.py `get_delta_weight`.
    """

    recipe: str
    rank: int
    scale: float | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scaled:
    """W' = rows ⊙ W ⊙ cols: each output, each input or both by a factor of its own.

    Attributes:
        rows: (out,): factors of the first axis, or None.
        cols: (in,): factors of the second axis, for a convolution over all positions of the kernel, or None.
        is_bias: the weight is the bias vector of an adapted layer, which a base may lack; `cols` is None then.
        is_sum: what it changes in the base's own values is added; else it scales what stands there after other updates.
    Source: peft 0.21.2, tuners/ia3/layer.py; tuners/glora/layer.py.
    """

    rows: LazyTensor | None
    cols: LazyTensor | None = None
    is_bias: bool = False
    is_sum: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (out,) for a bias; 0 for an axis that only the base tells."""
        out, into = (0 if vector is None else vector.numel for vector in (self.rows, self.cols))
        return (out,) if self.is_bias else (out, into)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be scaled so."""
        vectors = (self.rows, self.cols)
        return all(vector is None or _is_size(shape, axis, vector.numel) for axis, vector in enumerate(vectors))


@dataclass(frozen=True, slots=True)
class Rotated:
    """W' = L W or W R, where L or R is block-diagonal; a convolution counts as (out, in · prod(kernel)).

    Attributes:
        blocks: (count, size, size): the blocks along the diagonal, as they multiply.
        side: "left" for L, which mixes outputs, "right" for R, which mixes inputs.
        is_shared: whether the one block stands along the whole diagonal, as often as it fits.
        order: in which order rows (left) or columns (right) are taken for the blocks, or None for their own. They are
            put back afterwards: BOFT's butterfly permutations.
        is_bias: see Scaled; side is "left" then.
    Source: peft 0.21.2, tuners/oft/layer.py, tuners/boft/layer.py, tuners/road/layer.py.
    """

    blocks: LazyTensor
    side: Literal["left", "right"]
    is_shared: bool = False
    order: tuple[int, ...] | None = None
    is_bias: bool = False

    @property
    def size(self) -> int:
        """Rows of a block."""
        return _size(self.blocks, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (out,) for a bias; 0 for an axis that only the base tells."""
        length = 0 if self.is_shared else _size(self.blocks, 0) * self.size
        if self.is_bias:
            return (length,)
        return (length, 0) if self.side == "left" else (0, length)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be rotated so."""
        length = shape[0] if self.side == "left" else math.prod(shape[1:])
        if not self.size or (self.order is not None and len(self.order) != length):
            return False
        return length % self.size == 0 if self.is_shared else length == _size(self.blocks, 0) * self.size


@dataclass(frozen=True, slots=True)
class Multiplied:
    """W' = W (I + up @ down): a chain of reflections, say; a convolution counts as (out, in · prod(kernel)).

    Attributes: up: (in, rank); down: (rank, in).
    Source: peft 0.21.2, tuners/hra/layer.py.
    """

    up: LazyTensor
    down: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(0, in): the number of outputs only the base tells."""
        return (0, _size(self.up, 0))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be multiplied so."""
        return len(shape) > 1 and math.prod(shape[1:]) == _size(self.up, 0) == _size(self.down, 1)


@dataclass(frozen=True, slots=True)
class Modulated:
    """HiRA: ΔW = W ∘ (up @ down), with W as it is in the base: each value times one more than a factor of its own.

    Attributes: up: (out, rank); down: (rank, in), for a convolution (rank, in · prod(kernel)).
    Source: peft 0.21.2, tuners/hira/layer.py `_merge`; tuners/glora/layer.py.
    """

    up: LazyTensor
    down: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in · prod(kernel)); meaningful when the factors fit."""
        return (_size(self.up, 0), _size(self.down, 1))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be modulated so."""
        is_product = _size(self.up, 1) == _size(self.down, 0)
        return is_product and len(shape) > 1 and (shape[0], math.prod(shape[1:])) == self.shape


Factor: TypeAlias = Union[Scaled, Rotated, Multiplied, Modulated]
Update: TypeAlias = Union[LowRank, Hadamard, Kronecker, Diff, Replace, Rows, FromBase, Factor, OfBase]

# Kinds that multiply, or are another function of the base: they have no scale and no difference without it.
FACTORS = (Scaled, Rotated, Multiplied, Modulated, *OF_BASE)


def tensors_of(update: Update) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors that an update is made of, each with its role ("up", "down", "magnitude", …)."""
    match update:
        case LowRank():
            yield from (("up", update.up), ("down", update.down))
            if update.magnitude is not None:
                yield "magnitude", update.magnitude.vector
        case Hadamard():
            yield from (("up1", update.up1), ("down1", update.down1), ("up2", update.up2), ("down2", update.down2))
        case Kronecker():
            yield from ((f"left{n}", factor) for n, factor in enumerate(update.left))
            yield from ((f"right{n}", factor) for n, factor in enumerate(update.right))
        case Diff():
            yield "difference", update.difference
        case Replace():
            yield "value", update.value
        case Rows():
            yield "values", update.values
        case Scaled() | Rotated() | Multiplied() | Modulated():
            yield from _tensors_of_factor(update)
        case FromBase() | Tiled() | Projected() | Recoded() | Carried():
            yield from () if isinstance(update, FromBase) else tensors_of_base(update)
        case _:
            assert_never(update)


def products_of(update: Update) -> Iterator[tuple[LazyTensor, LazyTensor]]:
    """The (up, down) of which an additive update is made, as matrices that must fit; none of a stack of experts."""
    if isinstance(update, LowRank):
        if not update.is_stack:
            yield update.up, update.down
    elif isinstance(update, Hadamard):
        yield from ((update.up1, update.down1), (update.up2, update.down2))
    elif isinstance(update, Kronecker):
        yield from ((side[0], side[1]) for side in (update.left, update.right) if len(side) == 2)


def _tensors_of_factor(update: Factor) -> Iterator[tuple[str, LazyTensor]]:
    if isinstance(update, Scaled):
        vectors = (("rows", update.rows), ("cols", update.cols))
        yield from ((role, vector) for role, vector in vectors if vector is not None)
    elif isinstance(update, Rotated):
        yield "blocks", update.blocks
    else:
        yield from (("up", update.up), ("down", update.down))


def _is_size(shape: tuple[int, ...], axis: int, size: int) -> bool:
    return axis < len(shape) and shape[axis] == size


def _is_product(factors: tuple[LazyTensor, ...]) -> bool:
    return len(factors) == 1 or _size(factors[0], 1) == _size(factors[1], 0)


def _size(tensor: LazyTensor, axis: int) -> int:
    """The length of an axis; 0 where a damaged file has a tensor without it."""
    return tensor.shape[axis] if axis < len(tensor.shape) else 0
