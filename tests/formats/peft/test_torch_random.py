"""Draws of PyTorch's generator, remade with numpy's Mersenne twister: the same bits as torch draws here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraformat.formats.peft.tuners import torch_random
from loraformat.formats.peft.tuners.torch_random import TorchGenerator

SEEDS = [*range(20), 777, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**53]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


@pytest.mark.parametrize("bound", [1.0, 0.5, 0.017, 3**0.5 * (2**0.5 / 24**0.5), 1e-30])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 15, 16, 17, 31, 64, 100, 1000, 5001])
def test_uniform_values_are_those_of_torch(size: int, bound: float) -> None:
    for seed in SEEDS:
        wanted = torch.empty(size).uniform_(-bound, bound, generator=seeded(seed)).numpy()
        assert TorchGenerator(seed).uniform((size,), bound).tobytes() == wanted.tobytes()


def test_one_draw_follows_the_other() -> None:
    ours, theirs = TorchGenerator(3), seeded(3)
    for shape, bound in [((3, 5), 1.0), ((2, 7), 0.3), ((1, 700), 2.0)]:
        wanted = torch.empty(shape).uniform_(-bound, bound, generator=theirs).numpy()
        np.testing.assert_array_equal(ours.uniform(shape, bound), wanted)


@pytest.mark.parametrize("length", [1, 2, 5, 100, 3168, 1_000_003])
def test_the_start_of_a_permutation_is_that_of_torch(length: int) -> None:
    for seed in SEEDS[:3] if length > 5000 else SEEDS:
        wanted = torch.randperm(length, generator=seeded(seed)).tolist()
        for count in {0, 1, length // 2, min(length, 3168)}:
            assert TorchGenerator(seed).permutation_start(length, count).tolist() == wanted[:count]


@pytest.mark.slow
@pytest.mark.parametrize("length", [torch_random._LARGE - 1, torch_random._LARGE, torch_random._LARGE + 1000])
def test_a_permutation_of_very_many_values_is_drawn_as_torch_draws_it(length: int) -> None:
    wanted = torch.randperm(length, dtype=torch.int32, generator=seeded(7))[:5000].numpy()
    np.testing.assert_array_equal(TorchGenerator(7).permutation_start(length, 5000), wanted)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_large_permutation_is_one(count: int) -> None:
    """The other way of drawing, on few values: all of them, each once, and the start of more."""
    whole = TorchGenerator(5)._start_of_large(40, 40).tolist()
    assert sorted(whole) == list(range(40))
    assert TorchGenerator(5)._start_of_large(40, count).tolist() == whole[:count]
