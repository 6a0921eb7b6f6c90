"""Merges that are killed at a chosen byte and continued: the output is that of a run that nothing disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import adapter_folder, config, contents, save_base, weights

from loraformat.jobs.merge import merge

NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(2) for kind in ("q_proj", "up_proj", "down_proj")]

# Kills itself as soon as a share of all bytes is written.
KILLED = """
import os, signal, sys
from loraformat.jobs.merge import merge
base, change, out, jobs, share = sys.argv[1:]
def progress(done, total):
    if done > float(share) * total:
        os.kill(os.getpid(), signal.SIGKILL)
merge(base, [change], out, jobs=int(jobs), memory_nbytes=1, resume=True, progress=progress)
"""


@pytest.fixture(params=["safetensors", "torch"])
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    tensors = weights(dtype=torch.bfloat16)
    base = save_base(tmp_path / "base", tensors, config(), shards=4)
    if request.param == "torch":
        as_torch(base)
    return str(base), str(adapter_folder(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in NAMES}))


def as_torch(base: Path) -> None:
    """Turn a base into the `.bin` shards that older ones have."""
    from safetensors.torch import load_file

    for path in base.glob("*.safetensors"):
        torch.save(load_file(path), base / path.name.replace("safetensors", "bin"))
        path.unlink()
    index = base / "model.safetensors.index.json"
    (base / "pytorch_model.bin.index.json").write_text(index.read_text().replace(".safetensors", ".bin"))
    index.unlink()


def unfinished(out: Path) -> list[Path]:
    return [path for path in out.parent.glob(f".{out.name}.loraformat-*.partial") if path.is_dir()]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_merge_that_is_killed_twice_goes_on_to_the_same_bytes(
    inputs: tuple[str, str], tmp_path: Path, jobs: int
) -> None:
    base, change = inputs
    out = tmp_path / "out"
    for share in ("0", "0.6"):
        command = [sys.executable, "-c", KILLED, base, change, str(out), str(jobs), share]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert len(unfinished(out)) == 1
        assert not out.exists()
    merge(base, [change], str(out), jobs=jobs, resume=True, verify="full")
    merge(base, [change], str(tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out", "whole"]


def test_progress_begins_with_what_is_there(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    base, change = inputs
    with monkeypatch.context() as patched:
        patched.setattr("loraformat.merger.run.check_output", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(base, [change], str(tmp_path / "out"), resume=True)
    seen: list[tuple[int, int]] = []
    merge(base, [change], str(tmp_path / "out"), resume=True, progress=lambda done, total: seen.append((done, total)))
    ((done, total),) = seen
    assert done == total > 0


def test_an_incomplete_file_under_its_own_name_is_written_again(inputs: tuple[str, str], tmp_path: Path) -> None:
    """What a journal does not list may be cut anywhere, or be longer than it should."""
    base, change = inputs
    merge(base, [change], str(tmp_path / "whole"))
    left = tmp_path / ".out.loraformat-0123abcd.partial"
    left.mkdir()
    for name, data in contents(tmp_path / "whole").items():
        (left / name).write_bytes(data[: len(data) // 2] + bytes(len(data)))
    merge(base, [change], str(tmp_path / "out"), resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
