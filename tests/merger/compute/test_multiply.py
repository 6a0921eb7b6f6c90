"""Whole merges of updates that multiply: windows, threads, missing biases, ties, other updates beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, contents, load, low_rank, merge, save_base, weights
from oracle import merged

from loraformat.errors import ShapeMismatch, UnmatchedUpdate
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import ElementwiseScale, Multiplied, Rotated, Scaled, Update

Q, UP, DOWN = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight", "model.layers.0.down_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def lazy(*shape: int, seed: int = 3) -> LazyTensor:
    return LazyTensor.of(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


FACTORS: dict[str, tuple[Update, ...]] = {
    Q: (Scaled(lazy(24), lazy(24, seed=4)), Rotated(lazy(4, 6, 6), "right"), low_rank(24, 24)),
    UP: (
        low_rank(130, 24),
        Rotated(lazy(13, 10, 10), "left"),
        ElementwiseScale(lazy(130, 2), lazy(2, 24)),
        Scaled(lazy(130)),
    ),
    DOWN: (Multiplied(lazy(130, 2), lazy(2, 130, seed=5)), Rotated(lazy(1, 12, 12), "left", is_shared=True)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_and_sums_apply_in_order_and_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights(dtype=dtype)
    result = load(merge(save_base(tmp_path / "base", tensors, config()), tmp_path / "out", adapter(FACTORS)))
    for name, chain in FACTORS.items():
        exact = merged(tensors[name], list(chain))
        # float32 sums of 130 products (float64 for float64), then half a unit in the last place
        room = torch.finfo(dtype).eps / 2 * exact.abs() + (1e-11 if dtype == torch.float64 else 1e-3)
        assert ((result[name].double() - exact).abs() <= room).all()


def test_neither_memory_nor_threads_change_a_byte(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config(), shards=2)
    one = contents(merge(base, tmp_path / "one", adapter(FACTORS)))
    assert contents(merge(base, tmp_path / "many", adapter(FACTORS), jobs=3, memory_nbytes=1)) == one


def test_a_bias_that_the_base_lacks_is_left_out(tmp_path: Path) -> None:
    tensors = weights() | {"model.layers.1.q_proj.bias": torch.ones(24)}
    base = save_base(tmp_path / "base", tensors, config())
    updates = {f"model.layers.{layer}.q_proj.bias": Scaled(lazy(24), is_bias=True) for layer in (0, 1)}
    result = load(merge(base, tmp_path / "out", adapter(updates | {Q: Scaled(lazy(24))})))
    assert result.keys() == tensors.keys()
    assert torch.equal(result["model.layers.1.q_proj.bias"], lazy(24).torch())
    with pytest.raises(UnmatchedUpdate):
        merge(base, tmp_path / "refused", adapter({"model.layers.0.q_proj.bias": Scaled(lazy(24))}))


@pytest.mark.parametrize(
    "update",
    [
        *(
            Scaled(lazy(23)),
            Scaled(None, lazy(25)),
            Rotated(lazy(5, 5, 5), "right"),
            Multiplied(lazy(25, 2), lazy(2, 25)),
            ElementwiseScale(lazy(24, 2), lazy(2, 25)),
            ElementwiseScale(lazy(24, 3), lazy(2, 24)),
        ),
        *(Rotated(lazy(1, 7, 7), "left", is_shared=True), Rotated(lazy(4, 6, 6), "left", order=(0, 1))),
    ],
)
def test_a_factor_that_does_not_fit_is_refused(tmp_path: Path, update: Update) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    with pytest.raises(ShapeMismatch):
        merge(base, tmp_path / "out", adapter({Q: update}))


def test_a_tied_head_keeps_its_table_where_only_the_embedding_turns(tmp_path: Path) -> None:
    tensors = weights(tied=True)
    base = save_base(tmp_path / "base", tensors, config(tied=True))
    result = load(merge(base, tmp_path / "out", adapter({EMBED: Rotated(lazy(4, 6, 6), "right")})))
    assert torch.equal(result[HEAD], tensors[EMBED])
    assert not torch.equal(result[EMBED], tensors[EMBED])


@pytest.mark.parametrize("update", [Scaled(lazy(72), lazy(24)), Rotated(lazy(12, 6, 6), "left"), Scaled(lazy(72))])
def test_transposed_storage_is_found_by_the_fitting_side(tmp_path: Path, update: Update) -> None:
    tensors = {"h.0.c_attn.weight": torch.randn(24, 72, generator=torch.Generator().manual_seed(0))}
    for number, settings in enumerate(({"model_type": "gpt2"}, {})):
        base = save_base(tmp_path / f"base{number}", tensors, settings)
        result = load(merge(base, tmp_path / f"out{number}", adapter({"h.0.c_attn.weight": update})))
        expected = merged(tensors["h.0.c_attn.weight"], [update], transposed=True)
        assert torch.allclose(result["h.0.c_attn.weight"].double(), expected, atol=1e-5)
