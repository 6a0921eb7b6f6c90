"""Merges that are read back, recorded, interrupted and continued."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import config, contents, save_base, weights
from safetensors.torch import load_file, save_file

from loraformat.errors import ConfigError, MergeError, MissingFile
from loraformat.jobs.merge import merge
from loraformat.jobs.verify import verify
from loraformat.merger import Inputs, check
from loraformat.merger.manifest import MANIFEST
from loraformat.schema import check as check_schema
from loraformat.storage import LocalStore

NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(2) for kind in ("q_proj", "up_proj", "down_proj")]


def save_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int = 3, scale: float = 1.0) -> Path:
    folder.mkdir()
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (rows, cols) in shapes.items():
        module = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, cols, generator=g)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=g) * scale
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in shapes})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "x"}))
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    tensors = weights(dtype=torch.bfloat16)
    base = save_base(tmp_path / "base", tensors, config(), shards=3)
    return str(base), str(save_adapter(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in NAMES}))


@pytest.mark.parametrize("mode", ["none", "sample", "full"])
def test_verified_or_not_the_bytes_are_the_same(inputs: tuple[str, str], tmp_path: Path, mode: str) -> None:
    base, change = inputs
    report = merge(base, [change], str(tmp_path / "a"), verify=mode)
    merge(base, [change], str(tmp_path / "b"), jobs=3, memory_nbytes=1)
    assert report.data.verified == mode
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("accumulate", ["float32", "float64"])
def test_a_right_output_passes_the_full_check(tmp_path: Path, dtype: torch.dtype, accumulate: str) -> None:
    tensors = weights(dtype=dtype)
    base = save_base(tmp_path / "base", tensors, config())
    change = save_adapter(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in NAMES})
    merge(str(base), [str(change)], str(tmp_path / "out"), verify="full", accumulate=accumulate)


@pytest.mark.parametrize("name", [NAMES[1], "lm_head.weight"])
def test_a_wrong_byte_is_found_before_the_output_has_its_name(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base, change = inputs
    real = check.check_output

    def damage(plan: object, opened: Inputs, output: LocalStore, *, full: bool, jobs: int) -> None:
        for path in Path(output.folder).glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                tensors[name][65, 3] += 1
                save_file(tensors, path, metadata={"format": "pt"})
        real(plan, opened, LocalStore(output.folder), full=full, jobs=jobs)

    monkeypatch.setattr("loraformat.merger.run.check_output", damage)
    with pytest.raises(MergeError, match=name.replace(".", r"\.")):
        merge(base, [change], str(tmp_path / "out"), verify="full")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_the_manifest_names_everything_and_nothing_of_the_machine(inputs: tuple[str, str], tmp_path: Path) -> None:
    base, change = inputs
    merge(base, [change], str(tmp_path / "out"), hash_files=True)
    text = (tmp_path / "out" / MANIFEST).read_text()
    manifest = json.loads(text)
    assert list(check_schema("manifest", manifest)) == []
    assert str(tmp_path) not in text
    assert {entry["name"] for entry in manifest["outputs"]} == set(os.listdir(tmp_path / "out")) - {MANIFEST}
    for entry in manifest["outputs"]:
        data = (tmp_path / "out" / entry["name"]).read_bytes()
        assert (entry["nbytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert sorted(manifest["weights"]) == sorted(NAMES)
    (term,) = manifest["weights"][NAMES[0]]["terms"]
    assert (term["formula"], term["scale"]) == ("W + s*B@A", 2.0)


def test_verify_accepts_what_was_written_and_names_what_was_changed(inputs: tuple[str, str], tmp_path: Path) -> None:
    base, change = inputs
    out = tmp_path / "out"
    merge(base, [change], str(out))
    assert verify(str(out)).findings == ()
    shard = next(path for path in sorted(out.glob("*.safetensors")) if NAMES[0] in load_file(path))
    tensors = load_file(shard)
    tensors[NAMES[0]][0, 0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    (out / "stray").write_text("x")
    (out / "tokenizer.json").unlink()
    found = {(one.where, one.code) for one in verify(str(out)).findings}
    assert {(NAMES[0], "LF804"), ("stray", "LF804"), ("tokenizer.json", "LF804")} <= found


def test_a_file_that_was_cut_short_is_named(inputs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    shard = min(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    assert shard.name in {one.where for one in verify(str(out)).findings}


def test_verify_needs_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        verify(str(tmp_path))
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ConfigError):
        verify(str(tmp_path))


def command(base: Path, change: Path, out: Path, *more: str) -> list[str]:
    paths = [str(base), str(change), "-o", str(out)]
    return [sys.executable, "-m", "loraformat", "merge", *paths, "--jobs", "2", *more]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """Twelve shards that take a while, an adapter, and what the merge of them is."""
    folder = tmp_path_factory.mktemp("large")
    g = torch.Generator().manual_seed(0)
    shape = (1024, 1536)
    tensors = {f"model.layers.{n}.q_proj.weight": torch.randn(shape, generator=g).bfloat16() for n in range(12)}
    base = save_base(folder / "base", tensors, config(), shards=12)
    change = save_adapter(folder / "adapter", dict.fromkeys(tensors, shape))
    merge(str(base), [str(change)], str(folder / "whole"))
    return base, change, contents(folder / "whole")


def left_beside(out: Path) -> list[Path]:
    return [path for path in out.parent.glob(f".{out.name}.loraformat-*.partial") if path.is_dir()]


def journaled(left: Path) -> list[str]:
    try:
        return list(json.loads((left / ".loraformat-journal.json").read_text())["files"])
    except FileNotFoundError:
        return []


@pytest.mark.parametrize(("number", "shards"), [(signal.SIGKILL, 1), (signal.SIGKILL, 6), (signal.SIGINT, 4)])
def test_a_merge_that_was_stopped_goes_on_to_the_same_bytes(
    large: tuple[Path, Path, dict[str, bytes]], tmp_path: Path, number: int, shards: int
) -> None:
    base, change, whole = large
    out = tmp_path / "out"
    more = () if number == signal.SIGKILL else ("--resume",)
    with subprocess.Popen(command(base, change, out, *more), stderr=subprocess.DEVNULL) as child:
        while child.poll() is None:
            if any(len(journaled(left)) >= shards for left in left_beside(out)):
                os.kill(child.pid, number)
                break
            time.sleep(0.001)
    (left,) = left_beside(out)
    assert not out.exists()
    done = {path.name: path.stat().st_ino for path in left.glob("*.safetensors")}
    complete = journaled(left)
    subprocess.run(command(base, change, out, "--resume"), check=True, capture_output=True)
    assert contents(out) == whole
    assert len(complete) >= shards
    assert all((out / name).stat().st_ino == done[name] for name in complete)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_other_options_or_inputs_do_not_go_on_from_what_is_there(
    large: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    base, change, whole = large
    left = tmp_path / ".out.loraformat-0123abcd.partial"
    left.mkdir()
    (left / "stale.safetensors").write_bytes(b"x")
    journal = {"fingerprint": "other", "files": {"stale.safetensors": {}}}
    (left / ".loraformat-journal.json").write_text(json.dumps(journal))
    merge(str(base), [str(change)], str(tmp_path / "out"), resume=True)
    assert contents(tmp_path / "out") == whole
