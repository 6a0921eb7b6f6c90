"""A merge computed on a device: the CPU's values within one unit in the last place, or a refusal."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from merger.checkpoints import adapter_folder, config, load, save_base, weights

from loraformat.cli import main
from loraformat.engine import open_device
from loraformat.errors import UsageError
from loraformat.jobs.merge import merge

NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(2) for kind in ("q_proj", "up_proj", "down_proj")]


def merged_on(folder: Path, dtype: torch.dtype, device: str) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors of a merge, and how much of the update survived."""
    if not (folder / "base").exists():
        tensors = weights(dtype=dtype)
        save_base(folder / "base", tensors, config())
        adapter_folder(folder / "adapter", {name: tuple(tensors[name].shape) for name in NAMES})
    out = folder / device.replace(":", "")
    report = merge(str(folder / "base"), [str(folder / "adapter")], str(out), jobs=2, device=device)
    return load(out), report.data.retained


def assert_within_one_unit(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        other = found[name].double()
        size = torch.maximum(value.double().abs(), other.abs())
        assert ((other - value.double()).abs() <= torch.finfo(value.dtype).eps * size).all(), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cuda_device_computes_what_the_cpu_does(tmp_path: Path, dtype: torch.dtype) -> None:
    (found, retained), (wanted, share) = (merged_on(tmp_path, dtype, device) for device in ("cuda", "cpu"))
    assert_within_one_unit(found, wanted)
    assert retained == pytest.approx(share, rel=1e-6)


@pytest.mark.gpu
def test_tasks_of_an_engine_use_the_device_too(tmp_path: Path) -> None:
    """Each in a process of its own, which is given nothing but the task."""
    wanted, _ = merged_on(tmp_path, torch.bfloat16, "cpu")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        merge(
            str(tmp_path / "base"),
            [str(tmp_path / "adapter")],
            str(tmp_path / "out"),
            device="cuda",
            engine=executor,
        )
    assert_within_one_unit(load(tmp_path / "out"), wanted)


def test_the_device_path_computes_what_the_cpu_path_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code on a device that every machine has."""
    wanted, share = merged_on(tmp_path, torch.bfloat16, "cpu")
    monkeypatch.setattr("loraformat.jobs.merge.distribution.open_device", lambda name: torch.device("cpu"))
    found, retained = merged_on(tmp_path, torch.bfloat16, "other")
    assert_within_one_unit(found, wanted)
    assert retained == pytest.approx(share, rel=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there_is_refused_and_nothing_written(tmp_path: Path) -> None:
    arguments = ["merge", "base", "adapter", "-o", str(tmp_path / "out"), "--device", "cuda:1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0
    assert "cuda:1 is not available: torch finds no CUDA device" in result.output
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", ""])
def test_a_name_that_means_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not a device"):
        open_device(name)
