"""Updates that are computed from the base's own values by more than a factor of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base import is_shape

# Activations of `WeightNetwork`, by their names in transformers; those that have no parameters of their own.
# Source: transformers 5.23.0, activations.py `ACT2CLS`.
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2"),
    *("relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh"),
)


@dataclass(frozen=True, slots=True)
class SubtractedInit:
    """ΔW = −part(W): the part of the base weight that an initialization (PiSSA, OLoRA) subtracted before training.

    It is computed from the whole un-merged matrix, in Linear orientation but for "olora", and needs no tensors.

    Attributes:
        recipe: "pissa": the `rank` largest singular components; "kasa", "osf": the `rank` smallest of them; "olora":
            scale · Q[:, :rank] @ R[:rank] of the QR decomposition of the matrix as it is stored.
        rank: at least 1.
        scale: of the accompanying low-rank update; None if unknown.
        shape: of the weight.

    Source: peft 0.21.2, tuners/lora/layer.py `pissa_init`, `olora_init`; tuners/lora/variants.py `KasaLinearVariant`;
    tuners/osf/layer.py `get_delta_weight`.
    """

    recipe: str
    rank: int
    scale: float | None
    shape: tuple[int, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be taken off a weight of `shape`, in Linear orientation."""
        return is_shape(self.shape, shape)


@dataclass(frozen=True, slots=True)
class BlockAffine:
    """W' of tiles T' = T + (T + I) M: every tile of W in one row of tiles has the same M.

    Attributes:
        blocks: (out / size, size, size): M for each row of tiles, which are (size, size).
    Source: peft 0.21.2, tuners/miss/layer.py `get_delta_weight`, for the variant "bat".
    """

    blocks: LazyTensor

    @property
    def size(self) -> int:
        """Rows and columns of a tile."""
        return self.blocks.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, 0): the number of inputs only the base tells."""
        return (self.blocks.shape[0] * self.size, 0)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, is made of such tiles."""
        size = self.size
        is_square = len(self.blocks.shape) == 3 and self.blocks.shape[2] == size > 0
        return is_square and len(shape) == 2 and shape[0] == self.shape[0] and shape[1] % size == 0


@dataclass(frozen=True, slots=True)
class WeightNetwork:
    """ΔW = scale · up @ f(down @ W), with W from the base, before any update.

    f is the identity where there is no activation. Else it is a network: h = a(down @ W); for each encoder h = a(E h);
    for each decoder h = a(D h) + what the encoder that it answers, the last one first, was given.

    Attributes:
        up: (out, rank); down: (rank, out).
        scale: the factor really applied.
        activation: one of ACTIVATIONS, or None.
        encoders, decoders: (rank, rank) each, as many of the one as of the other.
    Source: peft 0.21.2, tuners/deft/layer.py `get_delta_weight`; tuners/peanut/layer.py `_compute_delta_weight`.
    """

    up: LazyTensor
    down: LazyTensor
    scale: float
    activation: str | None = None
    encoders: tuple[LazyTensor, ...] = ()
    decoders: tuple[LazyTensor, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, 0): the number of inputs only the base tells."""
        return (self.up.shape[0], 0)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be projected so."""
        is_product = self.up.shape[1] == self.down.shape[0]
        return is_product and len(shape) == 2 and shape[0] == self.up.shape[0] == self.down.shape[1]


@dataclass(frozen=True, slots=True)
class FRoD:
    """ΔW = U core - W, where W = U diag(λ) basisᵀ and the columns of U have norm 1.

    W is that of the base, before any update. A column of U that would be shorter than 1e-12 is zero; a basis that
    cannot be inverted is inverted as far as it goes, singular values below a millionth of the greatest left out. U is
    rounded to the dtype of the basis, as it is where the adapter is trained.

    Attributes:
        basis: (in, in).
        core: (in, in).
    Source: peft 0.21.2, tuners/frod/layer.py `_calculate_frod_u_and_lambda`, `get_delta_weight`.
    """

    basis: LazyTensor
    core: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(0, in): the number of outputs only the base tells."""
        return (0, self.basis.shape[0])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be recoded so."""
        return len(shape) == 2 and self.basis.shape == self.core.shape == (shape[1], shape[1])


@dataclass(frozen=True, slots=True)
class BiasFromWeight:
    """Δb = W c: the effect on the outputs of shifting the inputs by c, with W from the base.

    Attributes:
        weight: the base weight that is W.
        vector: (in,): c.
        length: outputs of W, values of the bias.
    Source: peft 0.21.2, tuners/glora/layer.py `merge`.
    """

    weight: str
    vector: LazyTensor
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(out,)."""
        return (self.length,)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a bias of `shape`."""
        return math.prod(shape) == self.length and shape[-1:] == (self.length,)
