"""Tensors that a merge would change, for those who only look: sizes, spans and values known by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, low_rank, save_base, weights
from oracle import dense, merged
from torch import Tensor

from loraformat.containers import open_checkpoint
from loraformat.merger import Preview, Resources, previews_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank, Magnitude, Replace, Rows, Update

EMBED, HEAD, Q, NORM = (
    *("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj.weight", "model.layers.0.norm.weight"),
)
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
DISK, MEMORY = "model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"


def previewed(
    folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object], updates: Mapping[str, Update]
) -> dict[tuple[str, ...], Preview]:
    """By the weights that they are made of."""
    base = open_checkpoint(str(save_base(folder / "base", tensors, settings)))
    found = previews_of(base, adapter(updates))
    return {tuple(name for name, *_ in one.spans): one for one in found}


def values(*shape: int) -> LazyTensor:
    return LazyTensor.of(torch.randn(*shape, generator=torch.Generator().manual_seed(8)))


def test_a_preview_tells_sizes_and_values_of_each_tensor(tmp_path: Path) -> None:
    tensors = {**weights(dtype=torch.bfloat16), "e": torch.ones(3, 8, 6)}
    updates = {
        EMBED: Rows((70, 2), values(2, 24)),
        HEAD: Rows((70,), values(1, 24)),
        Q: low_rank(24, 24),
        NORM: Replace(values(24)),
        "e": LowRank(values(3, 8, 2), values(3, 2, 6), 0.5),
    }
    found = previewed(tmp_path, tensors, config(), updates)
    assert found.keys() == {(EMBED,), (HEAD,), (Q,), (NORM,), ("e",) * 3}
    sizes = {
        names[0]: (one.matrix, one.rows_stored, one.row_nbytes, one.is_table, one.is_product)
        for names, one in found.items()
    }
    assert sizes == {
        EMBED: ((71, 24), 70, 48, True, False),
        HEAD: ((71, 24), 70, 48, True, False),
        Q: ((24, 24), 24, 48, True, True),
        NORM: ((24, 1), 24, 2, False, False),
        "e": ((24, 6), 24, 24, False, True),
    }
    assert found[(Q,)].spans == ((Q, 0, 24),)
    assert found[(EMBED,)].spans == ((EMBED, 0, 71),)
    assert found[("e",) * 3].spans == tuple(("e", 8 * n, 8 * n + 8) for n in range(3))
    for names, one in found.items():
        opened = one.open()
        stored = tensors[names[0]].double().reshape(-1, one.matrix[1])
        expected = merged(tensors[names[0]].float(), [updates[names[0]]]).reshape(one.matrix)
        windows = one.windows(Resources(memory_nbytes=1))
        assert [start for start, _ in windows] == [0, *(stop for _, stop in windows[:-1])]
        assert windows[-1][1] == one.matrix[0]
        for start, stop in windows:
            base = torch.from_numpy(opened.base(start, stop).copy())
            held = max(0, min(stop, len(stored)) - start)
            assert torch.equal(base[:held], stored[start:stop])
            assert not base[held:].any()
            assert torch.allclose(torch.from_numpy(opened.merged(base.numpy(), start)), expected[start:stop])
            assert torch.equal(base[:held], stored[start:stop])


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (low_rank(24, 24), True),
        (LowRank(values(24, 2), values(2, 24), 1.0, Magnitude(values(24))), False),
        (Dense(values(24, 24)), False),
    ],
    ids=["lora", "dora", "dense"],
)
def test_only_products_of_factors_are_products(tmp_path: Path, update: Update, expected: bool) -> None:
    (found,) = previewed(tmp_path, weights(), config(), {Q: update}).values()
    assert found.is_product is expected


def test_what_is_added_to_rows_of_a_part_is_that_of_its_weight(tmp_path: Path) -> None:
    tensors = {f"{MEMORY}.gate_up_proj": torch.ones(3, 8, 6)}
    updates = {f"{DISK}.0.w1.weight": low_rank(4, 6), f"{DISK}.2.w3.weight": low_rank(4, 6, seed=6)}
    (found,) = previewed(tmp_path, tensors, MIXTRAL, updates).values()
    assert set(found.spans) == {(f"{DISK}.0.w1.weight", 0, 4), (f"{DISK}.2.w3.weight", 20, 24)}
    for (weight, first, last), opened in ((span, found.open()) for span in found.spans):
        expected = dense(updates[weight])
        assert torch.allclose(torch.from_numpy(opened.product(first, last)), expected)
        assert torch.allclose(torch.from_numpy(opened.product(first + 1, last - 1)), expected[1:-1])


def test_a_table_that_is_stored_under_two_names_is_there_once(tmp_path: Path) -> None:
    tensors = weights(tied=True)
    tensors[HEAD] = tensors[EMBED].clone()
    found = previewed(tmp_path, tensors, config(tied=True), {EMBED: Replace(values(70, 24))})
    assert list(found) == [(EMBED,)]


def test_a_scalar_has_one_row(tmp_path: Path) -> None:
    (found,) = previewed(
        tmp_path, {"s": torch.tensor(2.0)}, {}, {"s": Dense(LazyTensor.of(torch.tensor(1.5)))}
    ).values()
    assert (found.matrix, found.rows_stored, found.row_nbytes, found.is_table) == ((1, 1), 1, 4, False)
    assert found.open().merged(found.open().base(0, 1), 0).tolist() == [[3.5]]
