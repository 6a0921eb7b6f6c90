"""The network of an update in float64: activations by their definitions, and the layers between them.

Source: transformers 5.23.0, activations.py; peft 0.21.2, tuners/peanut/layer.py `_compute_delta_weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from loraformat.merger.verify.reference.sources import factor_values
from loraformat.model.updates import WeightNetwork

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def activated(update: WeightNetwork, values: Floats) -> Floats:
    """F of (rank, in) values: see `WeightNetwork`."""
    if update.activation is None:
        return values
    activation = _ACTIVATIONS[update.activation]
    inputs: list[Floats] = []
    hidden = activation(values)
    for encoder in update.encoders:
        inputs.append(hidden)
        hidden = activation(factor_values(encoder) @ hidden)
    for decoder, given in zip(update.decoders, reversed(inputs), strict=True):
        hidden = activation(factor_values(decoder) @ hidden) + given
    return hidden


def _erf(values: Floats) -> Floats:
    import numpy as np

    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(values))


def _logistic(values: Floats) -> Floats:
    import numpy as np

    return np.asarray(np.exp(-np.logaddexp(0.0, -values)))


def _softplus(values: Floats) -> Floats:
    """log(1 + eˣ); beyond 20, where torch takes x itself, they differ by less than a float32 shows."""
    import numpy as np

    return np.where(values > 20, values, np.logaddexp(0.0, values))


def _gelu(values: Floats) -> Floats:
    return values * (1 + _erf(values / math.sqrt(2))) / 2


def _curve(values: Floats) -> Floats:
    import numpy as np

    return np.asarray(values * (1 + np.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3))) / 2)


def _clipped(low: float, high: float) -> Callable[[Floats], Floats]:
    def clip(values: Floats) -> Floats:
        import numpy as np

        return np.clip(values, low, high)

    return clip


def _leaky(values: Floats) -> Floats:
    import numpy as np

    return np.where(values > 0, values, 0.01 * values)


def _hyperbolic(values: Floats) -> Floats:
    import numpy as np

    return np.tanh(values)


_relu = _clipped(0, math.inf)

_ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    **dict.fromkeys(("gelu", "gelu_python"), _gelu),
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), _curve),
    **dict.fromkeys(("silu", "swish"), lambda values: values * _logistic(values)),
    "gelu_10": lambda values: _clipped(-10, 10)(_gelu(values)),
    "hardswish": lambda values: values * _clipped(0, 6)(values + 3) / 6,
    "laplace": lambda values: (1 + _erf((values - 0.707107) / (0.282095 * math.sqrt(2)))) / 2,
    "leaky_relu": _leaky,
    "linear": lambda values: values,
    "mish": lambda values: values * _hyperbolic(_softplus(values)),
    "quick_gelu": lambda values: values * _logistic(1.702 * values),
    "relu": _relu,
    "relu2": lambda values: _relu(values) ** 2,
    "relu6": _clipped(0, 6),
    "sigmoid": _logistic,
    "sqrtsoftplus": lambda values: _softplus(values) ** 0.5,
    "tanh": _hyperbolic,
}
