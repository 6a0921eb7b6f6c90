"""Equality of tensors by their numbers, whatever their dtype and however they are read."""

from __future__ import annotations

import pytest
import torch

from loraformat.model.tensors import DType, LazyTensor, has_equal_values


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3000, 400)])
def test_one_number_makes_the_difference(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape).to(torch.bfloat16)
    one = LazyTensor.of(value)
    assert has_equal_values(one, LazyTensor.of(value.clone()))
    assert has_equal_values(one, LazyTensor.of(value.double()))
    if value.numel():
        other = value.clone()
        other.view(-1)[-1] += 1
        assert not has_equal_values(one, LazyTensor.of(other))


def test_another_shape_is_another_tensor() -> None:
    assert not has_equal_values(LazyTensor.of(torch.zeros(2, 3)), LazyTensor.of(torch.zeros(3, 2)))


def test_nothing_is_equal_to_nan() -> None:
    nan = LazyTensor.of(torch.tensor([1.0, float("nan")]))
    assert not has_equal_values(nan, nan)


def test_no_more_than_a_block_is_read_at_a_time() -> None:
    read: list[int] = []
    value = torch.zeros(1, 1 << 18)

    def rows(start: int, stop: int) -> torch.Tensor:
        read.append(stop - start)
        return value.expand(stop - start, -1)

    tall = LazyTensor((64, 1 << 18), DType.F32, rows)
    assert has_equal_values(tall, tall)
    assert max(read) == 4  # of 1 MiB each
    assert sum(read) == 2 * 64
