"""The compiled window gives what exact arithmetic and the passes of torch give, whatever the width of the registers."""

from __future__ import annotations

import itertools
import platform
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merger.checkpoints import adapter, config, contents, load, low_rank, merge_and_tell, save_base, weights
from oracle import HARD, rounded_exactly

from loraformat.merger.compute import computer, kernel
from loraformat.merger.compute.apply import TILE
from loraformat.merger.compute.buffers import Block
from loraformat.merger.compute.kernel import Kernel, Packed, open_kernel
from loraformat.merger.compute.kinds.steps import Product
from loraformat.merger.compute.retention import Tally
from loraformat.merger.compute.rounding import round_nearest
from loraformat.merger.plan.data import Arithmetic
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import LowRank

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def kernels() -> list[Kernel]:
    best = open_kernel()
    if best is None:
        return []
    library = kernel.ctypes.CDLL(str(kernel._LIBRARY))
    return [Kernel(library, width) for width in (256, 512) if width <= best.width]


built = pytest.mark.skipif(not kernels(), reason="the kernel was not built, or this processor has no AVX2")


def can_run() -> bool:
    """Whether this machine can build the kernel and run it, as its own files say."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("gcc") is None:
        return False
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    return {"avx2", "fma", "f16c"} <= set(flags)


@pytest.mark.skipif(not can_run(), reason="no gcc for Linux on x86-64, or a processor without AVX2")
def test_the_kernel_is_there_where_it_can_be() -> None:
    """A source that does not compile, or another version number than ours, must not show as skipped tests only."""
    assert open_kernel() is not None


def factors(rows: int, cols: int, rank: int, seed: int = 0) -> Product:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64) * 0.1
    return Product(left, torch.randn(rank, cols, generator=generator, dtype=torch.float64))


def pack(products: list[Product]) -> Packed:
    left = torch.cat([product.left for product in products], dim=1)
    return kernel.pack(left.numpy(), torch.cat([product.right for product in products]).numpy())


def run(one: Kernel, raw: torch.Tensor, product: Packed, start: int, written: torch.Tensor) -> list[Tally]:
    return one.window(block(raw), product, start, block(written))


def block(values: torch.Tensor) -> Block:
    """The memory of a tensor, which `written` shares."""
    dtype = DType.by_torch_name(str(values.dtype).removeprefix("torch."))
    assert dtype is not None
    return Block(memoryview(values.view(torch.uint8).numpy()).cast("B"), dtype, *values.shape)


def ordered(product: Product) -> torch.Tensor:
    """The product summed in the order of the rank, in float64, one term after the other."""
    total = torch.zeros(product.left.shape[0], product.right.shape[1], dtype=torch.float64)
    for k in range(product.left.shape[1]):
        total += product.left[:, k : k + 1] * product.right[k]
    return total


def assert_close(found: Tally, change: torch.Tensor, update: torch.Tensor) -> None:
    """rtol=1e-9: float64 sums of a few thousand terms."""
    assert found.kept == pytest.approx(float((change * update).sum()), rel=1e-9, abs=1e-15)
    assert found.whole == pytest.approx(float((update * update).sum()), rel=1e-9)
    assert found.largest == pytest.approx(float(update.abs().max()), rel=1e-12)
    assert (found.unchanged, found.numel) == (int((change == 0).sum()), change.numel())


@built
@settings(max_examples=60)
@given(
    rows=st.integers(1, 2 * TILE + 5),
    cols=st.integers(1, 70),
    rank=st.integers(1, 20),
    pair=st.sampled_from(list(itertools.product(DTYPES, DTYPES))),
    size=st.sampled_from([1e-4, 1e-2, 1.0]),
)
def test_values_and_tallies_are_those_of_float64(
    rows: int, cols: int, rank: int, pair: tuple[torch.dtype, torch.dtype], size: float
) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    raw = torch.randn(rows, cols, generator=generator).to(pair[0])
    product = factors(rows, cols, rank)
    product = Product(product.left * size, product.right)
    update = ordered(product)
    exact = raw.double() + update
    wanted = torch.empty(rows, cols, dtype=pair[1])
    round_nearest(wanted, exact)
    for one in kernels():
        found = torch.full((rows, cols), float("nan"), dtype=pair[1])
        tallies = run(one, raw, pack([product]), 0, found)
        # The products are fused into the sums, so a float64 may differ in its last bits; no wider than its rounding.
        unit = (torch.finfo(pair[1]).eps * exact.abs()).clamp(min=torch.finfo(pair[1]).smallest_normal)
        assert ((found.double() - exact).abs() <= unit / 2 + 1e-14).all()
        assert (found != wanted).sum() <= (1 if pair[1] != torch.float32 else rows * cols // 1000 + 1)
        assert len(tallies) == -(-rows // TILE)
        for number, tally in enumerate(tallies):
            tile = slice(number * TILE, (number + 1) * TILE)
            assert_close(tally, found[tile].double() - raw[tile].double(), update[tile])


@built
@pytest.mark.parametrize(("rows", "cols", "rank"), [(1, 1, 1), (8, 16, 4), (130, 67, 9), (64, 4096, 16), (3, 33, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_width_of_the_registers_shows_in_no_bit(rows: int, cols: int, rank: int, dtype: torch.dtype) -> None:
    if len(kernels()) < 2:
        pytest.skip("this processor has registers of one width only")
    raw, product = torch.randn(rows, cols).to(dtype), pack([factors(rows, cols, rank)])
    results = []
    for one in kernels():
        found = torch.empty_like(raw)
        results.append((run(one, raw, product, 0, found), found))
    (first, one), (second, other) = results
    assert first == second
    assert torch.equal(one, other)


@built
def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    raw, product = torch.randn(3 * TILE, 40).bfloat16(), pack([factors(3 * TILE, 40, 7)])
    for one in kernels():
        whole, part = torch.empty_like(raw), torch.empty(TILE + 3, 40, dtype=torch.bfloat16)
        tallies = run(one, raw, product, 0, whole)
        again = run(one, raw[TILE : 2 * TILE + 3], product, TILE, part)
        assert torch.equal(whole[TILE : 2 * TILE + 3], part)
        assert again[0] == tallies[1]


@built
def test_several_products_are_summed_before_rounding() -> None:
    raw, (one, other) = torch.randn(70, 50).bfloat16(), (factors(70, 50, 4), factors(70, 50, 3, seed=1))
    exact = raw.double() + ordered(one) + ordered(other)
    for each in kernels():
        found = torch.empty_like(raw)
        run(each, raw, pack([one, other]), 0, found)
        assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-14).all()


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_values_are_rounded_once(dtype: torch.dtype) -> None:
    """The update alone makes the value: a base of zeros, and a product with one."""
    values = torch.tensor([sign * value for value in HARD for sign in (1, -1)], dtype=torch.float64)
    wanted = torch.tensor([rounded_exactly(float(value), dtype) for value in values], dtype=torch.float64)
    product = pack([Product(torch.ones(1, 1, dtype=torch.float64), values[None])])
    for one in kernels():
        found = torch.empty(1, len(values), dtype=dtype)
        run(one, torch.zeros(1, len(values), dtype=dtype), product, 0, found)
        torch.testing.assert_close(found[0].double(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_without_the_kernel_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    tensors = weights(dtype=dtype)
    base = save_base(tmp_path / "base", tensors, config())
    updates = {"model.layers.0.q_proj.weight": low_rank(24, 24), "model.layers.1.up_proj.weight": low_rank(130, 24)}
    with_kernel = merge_and_tell(base, tmp_path / "with", adapter(updates))
    monkeypatch.setattr(computer, "open_kernel", lambda: None)
    without = merge_and_tell(base, tmp_path / "without", adapter(updates))
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    for name, tally in with_kernel.tallies.items():
        other = without.tallies[name]
        assert (tally.unchanged, tally.numel) == (other.unchanged, other.numel)
        assert (tally.kept, tally.whole, tally.largest) == pytest.approx((other.kept, other.whole, other.largest))


def test_a_kernel_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_VERSION", -1)
    assert open_kernel.__wrapped__() is None


def test_no_kernel_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel, "_LIBRARY", tmp_path / "none.so")
    assert open_kernel.__wrapped__() is None


@pytest.mark.parametrize("is_compiled", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_zero_update_keeps_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_compiled: bool
) -> None:
    """All patterns of 16 bits, -0 and every NaN among them."""
    if not is_compiled:
        monkeypatch.setattr(computer, "open_kernel", lambda: None)
    name = "model.layers.0.q_proj.weight"
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(512, 128)
    base = save_base(tmp_path / "base", {name: patterns}, config())
    update = LowRank(LazyTensor.of(torch.zeros(512, 2)), LazyTensor.of(torch.ones(2, 128)), 1.0)
    merge_and_tell(base, tmp_path / "out", adapter({name: update}))
    assert contents(tmp_path / "out")["model.safetensors"] == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("is_compiled", [True, False], ids=["kernel", "torch"])
def test_values_that_are_not_finite_in_the_base_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    if not is_compiled:
        monkeypatch.setattr(computer, "open_kernel", lambda: None)
    tensors, name = weights(dtype=torch.bfloat16), "model.layers.0.q_proj.weight"
    tensors[name][3, 4], tensors[name][5, 6] = float("nan"), float("-inf")
    base = save_base(tmp_path / "base", tensors, config())
    tally = merge_and_tell(base, tmp_path / "out", adapter({name: low_rank(24, 24)})).tallies[name]
    assert 0.9 < tally.kept / tally.whole < 1.1


def test_neither_threads_nor_memory_change_a_bit_of_what_torch_computes(tmp_path: Path) -> None:
    """A thread has its own number of torch's threads, and a product over several of them has other bits."""
    tensors = weights(dtype=torch.float32)
    base = save_base(tmp_path / "base", tensors, config())
    updates = {name: low_rank(*value.shape) for name, value in tensors.items() if value.ndim == 2 and "proj" in name}
    single = Arithmetic(accumulate="float32")
    one = contents(merge_at(base, tmp_path / "one", updates, single, jobs=1, memory_nbytes=1 << 24))
    for number in range(10):
        many = merge_at(base, tmp_path / f"{number}", updates, single, jobs=3, memory_nbytes=1 << 14)
        assert contents(many) == one


def merge_at(base: Path, out: Path, updates: dict, arithmetic: Arithmetic, **limits: int) -> Path:
    merge_and_tell(base, out, adapter(updates), arithmetic=arithmetic, **limits)
    return out


def test_an_edited_tensor_without_elements_moves_nothing(tmp_path: Path) -> None:
    """It begins where the tensor after it does."""
    one, other = "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"
    for number in range(4):
        names = (one, other) if number % 2 else (other, one)
        tensors = {names[0]: torch.ones(0, 24).bfloat16(), names[1]: torch.ones(130, 24).bfloat16()}
        base = save_base(tmp_path / f"base{number}", tensors, config())
        updates = {name: low_rank(*tensors[name].shape) for name in names}
        merge_and_tell(base, tmp_path / f"out{number}", adapter(updates))
        update = low_rank(130, 24)
        exact = 1 + update.scale * (update.up.torch().double() @ update.down.torch().double())
        found = load(tmp_path / f"out{number}")[names[1]].double()
        assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-9).all()
