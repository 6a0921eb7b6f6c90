"""The activations of networks: by the C library and by torch, to the last places of float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from loraformat.merger.compute.kinds import activations
from loraformat.model.updates import ACTIVATIONS

# Near zero, around the seams of every series, and far out.
VALUES = np.concatenate(
    [
        np.linspace(-30, 30, 60_001),
        np.linspace(-0.3, 0.3, 2_001),
        [*(sign * edge for edge in (0.25, 2.0, 6.0, 20.0, 5.9999999, 1e-300, 1e-20, 700.0, 1e300) for sign in (1, -1))],
        [0.0, -0.0],
    ]
)
EXACT = {
    "erf": math.erf,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0,
    "softplus": lambda x: x if x > 20 else max(x, 0.0) + math.log1p(math.exp(-abs(x))),
}


@pytest.mark.parametrize("name", EXACT)
def test_functions_are_those_of_the_c_library(name: str) -> None:
    found = getattr(activations, name)(VALUES)
    exact = np.array([EXACT[name](float(value)) for value in VALUES])
    units = 12 if name == "erf" else 8
    assert (np.abs(found - exact) <= units * np.spacing(np.abs(exact)) + 1e-300).all()
    assert found.dtype == np.float64


def test_an_odd_function_keeps_the_sign_of_zero() -> None:
    for function in (activations.erf, activations.tanh):
        assert np.signbit(function(np.array([-0.0, 0.0]))).tolist() == [True, False]


# Source: transformers 5.23.0, activations.py, as formulas of torch.
TORCH = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_10": lambda x: functional.gelu(x).clamp(-10, 10),
    "hardswish": functional.hardswish,
    "laplace": lambda x: (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5))) / 2,
    "leaky_relu": functional.leaky_relu,
    "linear": lambda x: x,
    "mish": functional.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "sqrtsoftplus": lambda x: functional.softplus(x).sqrt(),
    "tanh": torch.tanh,
}
SAME = {
    "gelu": ("gelu_python",),
    "gelu_new": ("gelu_accurate", "gelu_fast", "gelu_python_tanh", "gelu_pytorch_tanh"),
    "silu": ("swish",),
}


def test_every_activation_has_a_curve_and_a_second_opinion() -> None:
    assert set(activations.CURVES) == set(ACTIVATIONS)
    assert {*TORCH, *(name for names in SAME.values() for name in names)} == set(ACTIVATIONS)


@pytest.mark.parametrize("name", TORCH)
def test_curves_are_those_of_torch(name: str) -> None:
    values = np.linspace(-12, 12, 24_001)
    wanted = TORCH[name](torch.from_numpy(values)).numpy()
    for each in (name, *SAME.get(name, ())):
        # Of one less something near one few places are left; torch goes the same way.
        np.testing.assert_allclose(activations.CURVES[each](values), wanted, rtol=4e-15, atol=1e-14)
