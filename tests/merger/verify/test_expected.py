"""What the second opinion wants in the files of an output: answers known by hand, from the headers of small bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from merger.checkpoints import adapter, config, low_rank, save_base, weights
from torch import Tensor

from loraformat.containers import open_checkpoint
from loraformat.errors import MergeError
from loraformat.merger import AdapterSource, Inputs, MergePlan
from loraformat.merger.plan.data import FileOptions
from loraformat.merger.verify.reference import expected, reference_of
from loraformat.merger.verify.reference.expected import Reference
from loraformat.merger.verify.reference.sites import Run
from loraformat.model.adapter import Adapter
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import Dense, LowRank, Replace, Rows, Scaled

EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj.weight"
BIAS = "model.final_logits_bias"


def table(rows: int, seed: int = 9) -> LazyTensor:
    return LazyTensor.of(torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)))


def reference(
    folder: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *changes: Adapter,
    strengths: Sequence[float] = (),
    dtype: str | None = None,
    form: str = "none",
) -> Reference:
    base = open_checkpoint(str(save_base(folder / "base", tensors, settings)))
    sources = [AdapterSource("memory", form, strength=one) for one in strengths or [1.0] * len(changes)]
    plan = MergePlan(base.uri, tuple(sources), (), (), files=FileOptions(dtype=dtype))
    return reference_of(plan, Inputs(base=base, adapters=changes))


def shares(found: Reference, name: str) -> list[tuple[int, str, int]]:
    return [(share.adapter, share.weight, share.index) for share in found.tensors[name].shares]


def copied(found: Reference) -> set[str]:
    return {name for name, one in found.tensors.items() if one.is_copy}


def test_updates_are_in_their_order_with_scale_and_strength(tmp_path: Path) -> None:
    chain = (low_rank(24, 24, scale=0.5), low_rank(24, 24, scale=3.0), Dense(table(24)))
    found = reference(
        tmp_path, weights(), config(), adapter({Q: chain[0]}), adapter({Q: chain}), strengths=[-2.0, 0.25]
    )
    assert shares(found, Q) == [(0, Q, 0), (1, Q, 0), (1, Q, 1), (1, Q, 2)]
    assert [share.factor for share in found.tensors[Q].shares] == [-1.0, 0.125, 0.75, 0.25]
    assert [share.strength for share in found.tensors[Q].shares] == [-2.0, 0.25, 0.25, 0.25]
    assert {share.run for share in found.tensors[Q].shares} == {Run(Q, 24)}
    assert copied(found) == weights().keys() - {Q}
    assert (found.unscaled, found.unfollowed, found.has_parted) == (4, {}, False)


def test_an_update_without_a_scale_is_an_error(tmp_path: Path) -> None:
    pair = low_rank(24, 24)
    with pytest.raises(MergeError, match=r"q_proj\.weight: merged without a scale"):
        reference(tmp_path, weights(), config(), adapter({Q: LowRank(pair.up, pair.down, None)}))


@pytest.mark.parametrize(
    ("error", "is_right"), [(0.0, True), (1e-12, True), (1e-7, False), (-1e-7, False), (2.0, False)]
)
def test_a_scale_is_that_of_the_formula_but_for_rounding(tmp_path: Path, error: float, is_right: bool) -> None:
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    change = adapter({Q: low_rank(24, 24, scale=1.5 * (1 + error))}, raw=raw)
    if is_right:
        found = reference(tmp_path, weights(), config(), change, strengths=[2.0], form="peft")
        assert [share.factor for share in found.tensors[Q].shares] == [3.0]
        assert found.unscaled == 0
    else:
        with pytest.raises(MergeError, match=r"merged with the scale .* formula of its format it is 1\.5"):
            reference(tmp_path, weights(), config(), change, form="peft")


def test_an_update_that_lands_nowhere_is_an_error_unless_a_layer_may_lack_it(tmp_path: Path) -> None:
    bias = {"model.layers.0.q_proj.bias": Scaled(LazyTensor.of(torch.ones(24)), is_bias=True)}
    found = reference(tmp_path, weights(), config(), adapter({**bias, Q: low_rank(24, 24)}))
    assert found.tensors.keys() == weights().keys()
    assert copied(found) == weights().keys() - {Q}
    (tmp_path / "other").mkdir()
    change = adapter({Q: low_rank(24, 24), "model.layers.9.q_proj.weight": low_rank(24, 24)})
    with pytest.raises(MergeError, match=r"layers\.9\.q_proj\.weight: the reference finds no tensor"):
        reference(tmp_path / "other", weights(), config(), change)


def test_another_dtype_is_that_of_all_real_numbers(tmp_path: Path) -> None:
    tensors = {**weights(), "model.numbers": torch.arange(3)}
    found = reference(tmp_path, tensors, config(), adapter({Q: low_rank(24, 24)}), dtype="BF16")
    assert {name: one.dtype for name, one in found.tensors.items()} == {
        name: DType.I64 if name == "model.numbers" else DType.BF16 for name in tensors
    }
    assert copied(found) == {"model.numbers"}


STACK = (LazyTensor.of(torch.ones(3, 8, 2)), LazyTensor.of(torch.ones(3, 2, 6)))


@pytest.mark.parametrize(
    ("shape", "update", "runs", "axes", "matrix"),
    [
        ((3, 8, 6), LowRank(*STACK, 1.0), [Run("w", 8, at=8 * n, expert=n) for n in range(3)], 2, (24, 6)),
        ((1, 8, 6), low_rank(8, 6), [Run("w", 8)], 2, (8, 6)),
        ((3, 8, 6), Dense(LazyTensor.of(torch.ones(3, 8, 6))), [Run("w", 3)], 1, (3, 48)),
        (
            (8, 2, 3),
            LowRank(LazyTensor.of(torch.ones(8, 2)), LazyTensor.of(torch.ones(2, 6)), 1.0, kernel=(3,)),
            [Run("w", 8)],
            1,
            (8, 6),
        ),
        ((8, 6), low_rank(8, 6), [Run("w", 8)], 1, (8, 6)),
        ((8,), Dense(LazyTensor.of(torch.ones(8))), [Run("w", 8)], 1, (8, 1)),
        ((), Dense(LazyTensor.of(torch.tensor(1.0))), [Run("w", 1)], 1, (1, 1)),
    ],
    ids=["stack", "one-matrix", "dense-stack", "convolution", "matrix", "vector", "scalar"],
)
def test_the_rows_that_an_update_lands_on(
    tmp_path: Path, shape: tuple[int, ...], update: Any, runs: list[Run], axes: int, matrix: tuple[int, int]
) -> None:
    found = reference(tmp_path, {"w": torch.ones(shape)}, {}, adapter({"w": update})).tensors["w"]
    assert [share.run for share in found.shares] == runs
    assert (found.axes, found.matrix, found.shape) == (axes, matrix, shape)


@pytest.mark.parametrize("stored", [False, True])
def test_a_table_that_new_values_follow_stays_one(tmp_path: Path, stored: bool) -> None:
    tensors = weights(tied=True)
    if stored:
        tensors[HEAD] = tensors[EMBED].clone()
    found = reference(tmp_path, tensors, config(tied=True), adapter({HEAD: Replace(table(70))}))
    assert found.tensors.keys() == tensors.keys()
    assert shares(found, EMBED) == [(0, HEAD, 0)]
    assert not stored or shares(found, HEAD) == [(0, HEAD, 0)]
    assert copied(found) == tensors.keys() - {EMBED, HEAD}
    assert not found.has_parted


@pytest.mark.parametrize("row", [0, 35, 69])
@pytest.mark.parametrize("block", [1, 24 * 4 * 30, 1 << 20])
def test_a_head_that_differs_in_a_value_is_another_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int, block: int
) -> None:
    monkeypatch.setattr(expected, "_BLOCK_NBYTES", block)
    tensors = weights(tied=True)
    tensors[HEAD] = tensors[EMBED].clone()
    tensors[HEAD][row, 23] += 1
    found = reference(tmp_path, tensors, config(tied=True), adapter({EMBED: Replace(table(70))}))
    assert shares(found, EMBED) == [(0, EMBED, 0)]
    assert copied(found) == tensors.keys() - {EMBED}
    assert not found.has_parted


def test_a_head_of_another_dtype_is_another_table(tmp_path: Path) -> None:
    tensors = weights(tied=True)
    tensors[HEAD] = tensors[EMBED].clone().view(torch.int32)
    found = reference(tmp_path, tensors, config(tied=True), adapter({EMBED: Replace(table(70))}))
    assert copied(found) == tensors.keys() - {EMBED}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("update", [low_rank(70, 24), Replace(table(70), follows_tie=False)], ids=["lora", "replaced"])
@pytest.mark.parametrize("changed", [EMBED, HEAD])
def test_a_name_that_leaves_its_table_leaves_the_other_as_it_was(
    tmp_path: Path, stored: bool, update: Any, changed: str
) -> None:
    tensors = weights(tied=True)
    if stored:
        tensors[HEAD] = tensors[EMBED].clone()
    found = reference(tmp_path, tensors, config(tied=True), adapter({changed: update}))
    other = HEAD if changed == EMBED else EMBED
    assert found.has_parted
    assert shares(found, changed) == [(0, changed, 0)]
    assert copied(found) == {*tensors, HEAD} - {changed}
    assert found.tensors[HEAD].origin == (HEAD if stored else EMBED)
    assert found.tensors[other].shape == (70, 24)


@pytest.mark.parametrize("stored", [False, True])
def test_a_name_that_leaves_its_table_takes_new_values_along(tmp_path: Path, stored: bool) -> None:
    tensors = weights(tied=True)
    if stored:
        tensors[HEAD] = tensors[EMBED].clone()
    change = adapter({EMBED: Rows((3,), table(1)), HEAD: low_rank(70, 24)})
    found = reference(tmp_path, tensors, config(tied=True), change)
    assert shares(found, EMBED) == [(0, EMBED, 0)]
    assert shares(found, HEAD) == [(0, EMBED, 0), (0, HEAD, 0)]
    assert found.has_parted


def test_a_name_with_values_of_its_own_takes_no_others(tmp_path: Path) -> None:
    change = adapter({EMBED: Rows((3,), table(1)), HEAD: (Rows((4,), table(1, 2)), low_rank(70, 24))})
    found = reference(tmp_path, weights(tied=True), config(tied=True), change)
    assert shares(found, EMBED) == [(0, EMBED, 0)]
    assert shares(found, HEAD) == [(0, HEAD, 0), (0, HEAD, 1)]


@pytest.mark.parametrize(
    ("update", "rows"),
    [
        (Rows((69,), table(1)), 70),
        (Rows((70,), table(1)), 71),
        (Rows((71, 70), table(2)), 72),
        (Rows((72, 1, 71, 70), table(4)), 73),
        (Replace(table(75)), 75),
        (Replace(table(60)), 60),
    ],
)
def test_a_table_is_as_long_as_its_new_values(tmp_path: Path, update: Any, rows: int) -> None:
    """What is added to it is added to all rows then; the bias that BART's kin add to their logits is as long."""
    tensors = {**weights(), BIAS: torch.zeros(1, 70), f"x.{BIAS}": torch.zeros(70), f"y.{BIAS}": torch.zeros(2, 70)}
    tensors |= {f"z.{BIAS}": torch.zeros(1, 71), "w.other_bias": torch.zeros(1, 70), f"v.{BIAS}": torch.zeros(())}
    found = reference(tmp_path, tensors, config(), adapter({EMBED: (update, low_rank(rows, 24)), HEAD: update}))
    assert {found.tensors[name].shape for name in (EMBED, HEAD)} == {(rows, 24)}
    assert {share.run for share in found.tensors[EMBED].shares} == {Run(EMBED, rows)}
    bias = found.tensors[BIAS]
    assert (bias.shape, bias.shares, bias.is_copy) == ((1, rows), (), rows == 70)
    assert rows == 70 or bias.axes == 2
    assert copied(found) - {BIAS} == tensors.keys() - {EMBED, HEAD, BIAS}
