"""The activations of networks that make an update of the base's matrix, in float64, value by value.

`erf`, `exp` and `tanh` are those of the C library and of numpy: within a few units in the last place of a float64, but
not the same bits on every machine.

Source: transformers 5.23.0, activations.py `ACT2CLS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_LINEAR_ABOVE = 20.0  # softplus(x) is x there, as in torch; they differ by 2e-9


def _erf(values: Floats) -> Floats:
    import numpy as np

    return np.asarray(np.frompyfunc(math.erf, 1, 1)(values), np.float64)


def _sigmoid(values: Floats) -> Floats:
    import numpy as np

    with np.errstate(over="ignore"):  # far below zero the result is 0
        return np.asarray(1 / (1 + np.exp(-values)))


def _softplus(values: Floats) -> Floats:
    import numpy as np

    return np.where(values > _LINEAR_ABOVE, values, np.log1p(np.exp(np.minimum(values, _LINEAR_ABOVE))))


def _tanh(values: Floats) -> Floats:
    import numpy as np

    return np.tanh(values)


def _gelu(values: Floats) -> Floats:
    return values * 0.5 * (1 + _erf(values * math.sqrt(0.5)))


def _curve(values: Floats) -> Floats:
    inner = math.sqrt(2 / math.pi) * (values + 0.044715 * values * values * values)
    return 0.5 * values * (1 + _tanh(inner))


def _between(low: float, high: float) -> Callable[[Floats], Floats]:
    def clip(values: Floats) -> Floats:
        import numpy as np

        return np.clip(values, low, high)

    return clip


def _leaky(values: Floats) -> Floats:
    import numpy as np

    return np.where(values > 0, values, 0.01 * values)


def _squared(values: Floats) -> Floats:
    return values * values


def _root(values: Floats) -> Floats:
    import numpy as np

    return np.sqrt(values)


_relu = _between(0, math.inf)

# Name → function of an array, for all of `model.updates.ACTIVATIONS`.
CURVES: Mapping[str, Callable[[Floats], Floats]] = {
    **dict.fromkeys(("gelu", "gelu_python"), _gelu),
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), _curve),
    **dict.fromkeys(("silu", "swish"), lambda values: values * _sigmoid(values)),
    "gelu_10": lambda values: _between(-10, 10)(_gelu(values)),
    "hardswish": lambda values: values * _between(0, 6)(values + 3) / 6,
    "laplace": lambda values: 0.5 * (1 + _erf((values - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": _leaky,
    "linear": lambda values: values,
    "mish": lambda values: values * _tanh(_softplus(values)),
    "quick_gelu": lambda values: values * _sigmoid(1.702 * values),
    "relu": _relu,
    "relu2": lambda values: _squared(_relu(values)),
    "relu6": _between(0, 6),
    "sigmoid": _sigmoid,
    "sqrtsoftplus": lambda values: _root(_softplus(values)),
    "tanh": _tanh,
}
