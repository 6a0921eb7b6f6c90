"""A merge needs no PyTorch but for a CUDA device, and gives the same bytes without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter_folder, config, contents, save_base, weights
from merger.without_torch import BIAS, CONV, KINDS

from loraformat.arithmetic import VARIABLE

SCRIPT = Path(__file__).with_name("without_torch.py")
# The command line in a process in which PyTorch is not installed.
COMMAND = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent.parent)!r})
from merger.without_torch import NoTorch
from loraformat.cli import main
sys.meta_path.insert(0, NoTorch())
main(sys.argv[1:], prog_name="loraformat")
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    g = torch.Generator().manual_seed(9)
    tensors = weights(dtype=torch.bfloat16, tied=True) | {
        CONV: torch.randn(8, 5, 3, 3, generator=g).bfloat16(),
        BIAS: torch.randn(130, generator=g).bfloat16(),
    }
    return save_base(tmp_path_factory.mktemp("merges") / "base", tensors, config(tied=True))


def merged(
    base: Path, name: str, *, jobs: int = 1, memory: int = 1 << 24, blocked: bool = True, loop: str = ""
) -> Path:
    out = base.parent / name
    command = [sys.executable, str(SCRIPT), str(base), str(out), str(jobs), str(memory), "yes" if blocked else "no"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, VARIABLE: loop}, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
    return out


@pytest.fixture(scope="module")
def blocked(base: Path) -> Path:
    return merged(base, "blocked")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("with-torch", {"blocked": False}),
        ("small-windows", {"jobs": 3, "memory": 1}),
        ("threads", {"jobs": 4, "memory": 1 << 20, "blocked": False}),
        ("numpy", {"loop": "numpy"}),
    ],
)
def test_bytes_do_not_depend_on_torch_threads_memory_or_the_loop(
    base: Path, blocked: Path, name: str, how: dict[str, object]
) -> None:
    other = merged(base, name, **how)
    for kind in KINDS:
        assert contents(other / kind) == contents(blocked / kind), kind
        assert contents(other / kind)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_merges_and_verifies_in_full_without_torch(base: Path, tmp_path: Path) -> None:
    names = {"model.layers.0.q_proj.weight": (24, 24), "model.layers.0.up_proj.weight": (130, 24)}
    change = adapter_folder(tmp_path / "adapter", names)
    done = run("merge", base, change, "-o", tmp_path / "out", "--verify", "full", "--rounding", "stochastic")
    assert done.returncode == 0, done.stderr
    assert run("verify", tmp_path / "out", "--base", base).returncode == 0


def test_a_device_without_torch_is_refused_with_the_remedy(base: Path, tmp_path: Path) -> None:
    change = adapter_folder(tmp_path / "adapter", {"model.layers.0.q_proj.weight": (24, 24)})
    done = run("merge", base, change, "-o", tmp_path / "out", "--device", "cuda")
    assert done.returncode != 0
    assert "LF029" in done.stderr
    assert "pip install 'loraformat[torch]'" in done.stderr
    assert not (tmp_path / "out").exists()
