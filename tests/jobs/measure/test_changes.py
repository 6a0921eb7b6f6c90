"""What an adapter changes in a base, streamed, against W' - W of the float64 oracle for every kind of update."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, low_rank, save_base, weights
from oracle import merged
from torch import Tensor

from loraformat.containers import open_checkpoint
from loraformat.jobs.measure.changes import changes_of
from loraformat.merger import previews_of
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import (
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    Update,
)

UP, EMBED = "model.layers.1.up_proj.weight", "model.embed_tokens.weight"
ROWS, COLS = 130, 24


def lazy(*shape: int, seed: int = 0, scale: float = 1.0) -> LazyTensor:
    return LazyTensor.of(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale)


def kinds() -> dict[str, Update]:
    plain = low_rank(ROWS, COLS)
    turned = torch.linalg.qr(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4))).Q
    return {
        "linear": plain,
        "dora": LowRank(plain.up, plain.down, 0.5, Magnitude(lazy(ROWS, seed=1))),
        "loha": Hadamard(plain.up, plain.down, lazy(ROWS, 2), lazy(2, COLS), 0.1),
        "lokr": Kronecker((lazy(13, 4),), (lazy(10, 6),), 0.2),
        "dense": Dense(lazy(ROWS, COLS), 0.5),
        "scaled": Scaled(lazy(ROWS), lazy(COLS)),
        "rotated": Rotated(LazyTensor.of(turned), "right"),
        "multiplied": Multiplied(lazy(COLS, 2, scale=0.1), lazy(2, COLS)),
        "replaced": Replace(lazy(ROWS, COLS), follows_tie=False),
    }


def base_of(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, dict[str, Tensor]]:
    tensors = weights(dtype=dtype)
    return save_base(folder / "base", tensors, config(), shards=2), tensors


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("jobs", [1, 3])
def test_norms_and_spectra_of_the_change(tmp_path: Path, kind: str, jobs: int) -> None:
    base, tensors = base_of(tmp_path)
    update = kinds()[kind]
    found = changes_of(open_checkpoint(str(base)), adapter({UP: update}), jobs=jobs, with_spectra=True)
    before = tensors[UP].double()
    change = merged(tensors[UP], [update]) - before
    assert list(found.weights) == [UP]
    assert found.weights[UP].base == pytest.approx(float(before.norm()) ** 2, rel=1e-6)
    assert found.weights[UP].update == pytest.approx(float(change.norm()) ** 2, rel=1e-5)
    assert found.weights[UP].relative == pytest.approx(float(change.norm() / before.norm()), rel=1e-5)
    if kind == "linear":
        assert found.weights[UP].spectrum is None  # its factors tell it without the base
    else:
        expected = torch.linalg.svdvals(change).tolist()
        assert found.weights[UP].spectrum.values == pytest.approx(expected, rel=1e-5, abs=1e-5 * expected[0])


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_histograms", [False, True])
def test_what_survives_rounding_is_what_a_merge_would_keep(
    tmp_path: Path, size: float, dtype: torch.dtype, *, with_histograms: bool
) -> None:
    base, tensors = base_of(tmp_path, dtype)
    update, opened = low_rank(ROWS, COLS, scale=size), open_checkpoint(str(base))
    found = changes_of(opened, adapter({UP: update}), with_histograms=with_histograms).weights[UP]
    before = tensors[UP].double()
    exact = merged(tensors[UP], [update])
    change = exact - before
    assert found.base == pytest.approx(float(before.square().sum()), rel=1e-9)
    assert found.update == pytest.approx(float(change.square().sum()), rel=1e-6)
    for which, narrow in enumerate((torch.bfloat16, torch.float16)):
        kept = float(((exact.to(narrow).double() - before) * change).sum() / change.square().sum())
        assert found.retained(which) == pytest.approx(kept, abs=2e-3)  # float32 sums may round another way


PLAIN = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", [*PLAIN, torch.float64])
def test_plain_floats_are_measured_as_they_are_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    """A weight of float64, and an update of another kind, are computed in float64 instead."""
    base, _ = base_of(tmp_path, dtype)
    for kind, update in kinds().items():
        (preview,) = previews_of(open_checkpoint(str(base)), adapter({UP: update}))
        survey = preview.open().survey(64, ROWS, (DType.BF16, DType.F16))
        assert (survey is not None) == (kind == "linear" and dtype in PLAIN)


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("value", [0.5, math.nan, math.inf, 1e38])
def test_both_ways_give_the_same_figures(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    """With histograms the values are computed in float64; also beside a value that is not finite, or overflows."""
    tensors = weights(dtype=dtype)
    tensors[UP][3, 4] = value
    base = open_checkpoint(str(save_base(tmp_path / "base", tensors, config(), shards=2)))
    changed = adapter({UP: low_rank(ROWS, COLS)})
    stored = changes_of(base, changed).weights[UP]
    computed = changes_of(base, changed, with_histograms=True).weights[UP]
    assert stored.base == pytest.approx(computed.base, rel=1e-12, nan_ok=True)
    assert stored.update == pytest.approx(computed.update, rel=2e-7)
    assert stored.kept == pytest.approx(computed.kept, rel=2e-7)


@pytest.mark.parametrize("with_histograms", [False, True])
def test_figures_do_not_depend_on_threads_and_windows(tmp_path: Path, *, with_histograms: bool) -> None:
    rows = 6000  # several windows
    tensors = {UP: torch.randn(rows, 600, generator=torch.Generator().manual_seed(1)).bfloat16()}
    base = open_checkpoint(str(save_base(tmp_path / "base", tensors, config())))
    update = adapter({UP: low_rank(rows, 600)})
    found = [changes_of(base, update, jobs=jobs, with_histograms=with_histograms).weights[UP] for jobs in (1, 2, 7)]
    assert found[0] == found[1] == found[2]


def test_fused_storage_counts_each_weight_by_its_own_rows(tmp_path: Path) -> None:
    """Three experts of one stacked tensor: each has its rows, and the whole has all."""
    g = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 20, 8, generator=g)
    name = "model.layers.0.experts.down_proj"
    base = save_base(tmp_path / "base", {name: stack, "other.weight": torch.zeros(2)}, {})
    update = LowRank(lazy(3, 20, 2), lazy(3, 2, 8), 0.5)
    found = changes_of(open_checkpoint(str(base)), adapter({name: update})).weights[name]
    change = 0.5 * update.up.torch().double() @ update.down.torch().double()
    assert found.update == pytest.approx(float(change.norm()) ** 2, rel=1e-5)
    assert found.base == pytest.approx(float(stack.double().norm()) ** 2, rel=1e-5)


def test_new_rows_of_a_table_are_told_beside_the_old(tmp_path: Path) -> None:
    tensors = weights(tied=True)
    base = save_base(tmp_path / "base", tensors, config(tied=True))
    before = tensors[EMBED]
    new = torch.full((2, 24), 3.0)
    rows = Rows((5, 70, 71), LazyTensor.of(torch.cat([before[5:6] * 2, new])))
    found = changes_of(open_checkpoint(str(base)), adapter({EMBED: rows}))
    (table,) = found.tables
    assert (table.weight, table.rows_before, table.rows_after, table.changed) == (EMBED, 70, 72, 1)
    assert table.norm_before == pytest.approx(float(before.double().norm(dim=1).quantile(0.5)))
    assert table.norm_changed == pytest.approx(float(before[5].double().norm()) * 2)
    assert table.norm_new == table.norm_new_least == table.norm_new_most == pytest.approx(3 * 24**0.5)
    assert found.weights[EMBED].update == pytest.approx(float(before[5].double().norm()) ** 2, rel=1e-6)


def test_what_does_not_land_or_has_no_scale_is_left_out(tmp_path: Path) -> None:
    base, _ = base_of(tmp_path)
    plain = low_rank(ROWS, COLS)
    some = {UP: plain, "model.layers.7.up_proj.weight": plain, "model.layers.0.q_proj.weight": plain}
    unknown = {"model.layers.0.up_proj.weight": LowRank(plain.up, plain.down, None)}
    assert list(changes_of(open_checkpoint(str(base)), adapter({**some, **unknown})).weights) == [UP]


def test_a_base_that_cannot_be_merged_into_is_said_to_be_left_out(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {UP: torch.zeros(ROWS, COLS, dtype=torch.int8)}, config())
    found = changes_of(open_checkpoint(str(base)), adapter({UP: low_rank(ROWS, COLS)}))
    assert not found.weights
    assert "quantized" in found.skipped[0].reason


def test_histograms_count_the_exponents_of_a_sample(tmp_path: Path) -> None:
    name = "w.weight"
    base = save_base(tmp_path / "base", {name: torch.full((64, 4), 2.0)}, {})
    change = Dense(LazyTensor.of(torch.full((64, 4), 0.25)), 1.0)
    found = changes_of(open_checkpoint(str(base)), adapter({name: change}), with_histograms=True).weights[name]
    assert {at - 127: count for at, count in enumerate(found.base_bins) if count} == {1: 256}
    assert {at - 127: count for at, count in enumerate(found.update_bins) if count} == {-2: 256}


def test_progress_ends_with_all_bytes_read(tmp_path: Path) -> None:
    base, tensors = base_of(tmp_path)
    seen: list[tuple[int, int]] = []
    changes_of(open_checkpoint(str(base)), adapter({UP: low_rank(ROWS, COLS)}), progress=lambda *at: seen.append(at))
    assert seen[-1] == (tensors[UP].nbytes, tensors[UP].nbytes)
