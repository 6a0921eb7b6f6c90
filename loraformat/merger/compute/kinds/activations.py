"""The activations of networks that make an update of the base's matrix, in float64, value by value.

All is made of additions, multiplications, divisions, square roots and `loraformat.arithmetic.elementary`, so that the
bits are the same on every machine; erf is within 12 units in the last place, all others within 8.

Source: transformers 5.23.0, activations.py `ACT2CLS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from loraformat.arithmetic import exp

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_LINEAR_ABOVE = 20.0  # softplus(x) is x there, as in torch; they differ by 2e-9
# Up to here erf is a series of positive terms; from here on 1 less a continued fraction, of which the last place of erf
# needs so many steps.
_SERIES_UP_TO, _TERMS, _STEPS = 2.0, 50, 60
# erf is 1 from here on, and the continued fraction would be of infinity.
_ERF_IS_ONE = 6.0
# Coefficients of (eʸ - 1) / y to y = -1/2, and of log((1 + s) / (1 - s)) / s in s² to s = 1/3, for float64.
_EXPM1 = [1 / math.factorial(power) for power in range(1, 16)]
_LOG = [2 / (2 * power + 1) for power in range(18)]


def _polynomial(coefficients: Sequence[float], values: Floats) -> Floats:
    total: Floats = values * 0.0 + coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = total * values + coefficient
    return total


def erf(values: Floats) -> Floats:
    """2/√π times the integral of exp(-t²) from 0 to x (DLMF 7.6.2 and 7.9.2)."""
    import numpy as np

    size = np.minimum(np.abs(values), _ERF_IS_ONE)
    square = size * size
    near, term = size.copy(), size.copy()
    for number in range(1, _TERMS):
        term = term * (square * (2 / (2 * number + 1)))
        near += term
    near *= exp(-square) * (2 / math.sqrt(math.pi))
    far = np.maximum(size, _SERIES_UP_TO)
    below = far
    for number in range(_STEPS, 0, -1):
        below = far + (number / 2) / below
    found = np.where(size < _SERIES_UP_TO, near, 1 - exp(-square) / (below * math.sqrt(math.pi)))
    return np.copysign(found, values)


def tanh(values: Floats) -> Floats:
    """(1 - exp(-2|x|)) / (1 + exp(-2|x|)) with the sign of x; the numerator is a series where it is small."""
    import numpy as np

    twice = -2 * np.abs(values)
    near = np.maximum(twice, -0.5)
    less_one = np.where(twice >= -0.5, near * _polynomial(_EXPM1, near), exp(twice) - 1)
    return np.asarray(np.copysign(less_one / (2 + less_one), values))


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    import numpy as np

    with np.errstate(over="ignore"):  # far below zero it is 0
        return np.asarray(1 / (1 + exp(-values)))


def softplus(values: Floats) -> Floats:
    """log(1 + eˣ), and x where x is large: max(x, 0) + log(1 + exp(-|x|))."""
    import numpy as np

    small = exp(-np.abs(values))
    ratio = small / (2 + small)
    found = np.maximum(values, 0) + ratio * _polynomial(_LOG, ratio * ratio)
    return np.where(values > _LINEAR_ABOVE, values, found)


def _gelu(values: Floats) -> Floats:
    return values * 0.5 * (1 + erf(values * math.sqrt(0.5)))


def _curve(values: Floats) -> Floats:
    inner = math.sqrt(2 / math.pi) * (values + 0.044715 * values * values * values)
    return 0.5 * values * (1 + tanh(inner))


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
    **dict.fromkeys(("silu", "swish"), lambda values: values * sigmoid(values)),
    "gelu_10": lambda values: _between(-10, 10)(_gelu(values)),
    "hardswish": lambda values: values * _between(0, 6)(values + 3) / 6,
    "laplace": lambda values: 0.5 * (1 + erf((values - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": _leaky,
    "linear": lambda values: values,
    "mish": lambda values: values * tanh(softplus(values)),
    "quick_gelu": lambda values: values * sigmoid(1.702 * values),
    "relu": _relu,
    "relu2": lambda values: _squared(_relu(values)),
    "relu6": _between(0, 6),
    "sigmoid": sigmoid,
    "sqrtsoftplus": lambda values: _root(softplus(values)),
    "tanh": tanh,
}
