"""Copies are compared by their values where a file holds them in another order of elements than the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, low_rank, merge, save_base, weights
from torch import Tensor

from loraformat.containers import open_checkpoint
from loraformat.errors import MergeError
from loraformat.merger import AdapterSource, Inputs, plan_merge
from loraformat.merger.verify import check, check_output
from loraformat.model.results.verbs import Checked
from loraformat.storage import LocalStore

Q, UP, NORM = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight", "model.layers.0.norm.weight"
CHANGE = adapter({Q: low_rank(24, 24)})


def turned(value: Tensor) -> Tensor:
    """The same values, one column after the other in memory."""
    return value.t().contiguous().t()


def checked(base: Path, out: Path, *, full: bool = True) -> Checked:
    opened = open_checkpoint(str(base))
    plan = plan_merge(opened, [CHANGE], [AdapterSource("memory", "none")], container="torch")
    return check_output(plan, Inputs(base=opened, adapters=[CHANGE]), LocalStore(str(out)), full=full)


@pytest.fixture(params=[(False, True), (True, False), (True, True), (False, False)], ids=str)
def merged(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Callable[[Callable[[Tensor], None]], None]]:
    """A base and how to write its right output with one tensor changed; either may have it turned."""
    in_base, in_output = request.param
    tensors = weights()
    base, out = save_base(tmp_path / "base", tensors, config()), tmp_path / "out"
    (base / "model.safetensors").unlink()
    torch.save({**tensors, UP: turned(tensors[UP])} if in_base else tensors, base / "pytorch_model.bin")
    (path,) = merge(base, out, CHANGE, container="torch").glob("*.bin")
    right = torch.load(path)

    def write(change: Callable[[Tensor], None]) -> None:
        value = right[UP].clone()
        change(value)
        torch.save({**right, UP: turned(value) if in_output else value.contiguous()}, path)

    return base, write


@pytest.mark.parametrize("full", [True, False])
def test_equal_values_are_equal_in_any_order(merged: tuple[Path, Callable[..., None]], full: bool) -> None:
    base, write = merged
    write(lambda _: None)
    found = checked(base, base.parent / "out", full=full)
    assert (found.changed, found.compared, found.copied, found.copies_compared) == (1, 1, 9, 9)


@pytest.mark.parametrize("row", [0, 129])
def test_another_value_is_found_in_any_order(
    merged: tuple[Path, Callable[..., None]], monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    base, write = merged

    def change(value: Tensor) -> None:
        value[row, 5] += 1

    write(change)
    for block in (1, 24 * 4 * 50, 1 << 20):
        monkeypatch.setattr(check, "_COPY_NBYTES", block)
        with pytest.raises(MergeError, match=r"up_proj\.weight: the copy differs from the base"):
            checked(base, base.parent / "out")
    monkeypatch.setattr(check, "_COPY_NBYTES", 24 * 4 * 50)  # a sample is the first bytes
    if row:
        checked(base, base.parent / "out", full=False)
    else:
        with pytest.raises(MergeError, match="the copy differs from the base"):
            checked(base, base.parent / "out", full=False)


def test_copies_of_a_sample_are_spread_over_all_of_them() -> None:
    names = [f"{number:03}" for number in range(100)]
    for count in (1, 2, 3, 7, 32, 50, 99, 100, 101, 1000):
        found = check._spread(names, count)
        assert 0 < len(found) <= count
        places = [int(name) for name in found]
        assert places[0] == 0
        gap = places[1] if len(places) > 1 else 100
        assert places == list(range(0, 100, gap))
    assert check._spread([], 5) == []
    assert check._spread([], 0) == []
