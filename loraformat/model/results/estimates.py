"""The result of `estimate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetEstimate:
    """All weights of one module kind and shape that would be adapted.

    Attributes:
        module: last name of the module path.
        shape: of one weight: (out, in), a convolution's with its kernel, stacked experts' with their number first.
        weights: how many there are.
        parameters: of the factors of all of them.
    """

    module: str
    shape: tuple[int, ...]
    weights: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of weights, gradients and optimizer in training; activations need more on top.

    Attributes:
        method: "full", "lora" or "qlora".
        weights: the base and the trained parameters, 2 bytes each; with QLoRA, linear weights in 4 bits plus their
            constants.
        gradients: of the trained parameters, 2 bytes each.
        optimizer: float32 master copy and both moments of Adam, 12 bytes for each trained parameter.
    """

    method: str
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateResult:
    """The result of `estimate`.

    Attributes:
        source: "config" or "headers": where the shapes come from.
        rank: of every factor pair.
        base_parameters: of the base, every table once.
        modules: by module kind and shape, sorted.
        parameters: of the adapter.
        parameters_by_layer: layer → parameters, without modules outside numbered layers.
        share: parameters / (base_parameters + parameters).
        nbytes: dtype name → size of the adapter's tensors.
        memory: one for each method.
    """

    source: str
    rank: int
    base_parameters: int
    modules: tuple[TargetEstimate, ...]
    parameters: int
    parameters_by_layer: Mapping[int, int]
    share: float
    nbytes: Mapping[str, int]
    memory: tuple[MemoryEstimate, ...]
