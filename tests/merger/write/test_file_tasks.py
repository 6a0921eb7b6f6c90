"""A plan is all that another process needs: each file made in a fresh interpreter has the same bytes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merger.checkpoints import adapter_folder, config, save_base, weights
from safetensors.torch import load_file

import loraformat
from loraformat.errors import ConfigError, MergeError, StorageError
from loraformat.jobs.inputs.subject import Assumptions
from loraformat.merger import (
    FileTask,
    MergePlan,
    Receipt,
    Resources,
    Trust,
    execute,
    open_inputs,
    run_merge,
    source_of,
    tasks_of,
)
from loraformat.storage import stage

SHAPES = {f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in (("q_proj", (24, 24)),)}
SHAPES["model.layers.1.up_proj.weight"] = (130, 24)

BY_JSON = """
import json, sys
from loraformat.merger import FileTask, execute
print(json.dumps(execute(FileTask.from_json(json.load(sys.stdin))).to_json()))
"""
BY_PICKLE = """
import json, pickle, sys
from loraformat.merger import execute
print(json.dumps(execute(pickle.load(sys.stdin.buffer)).to_json()))
"""


class FreshInterpreters:
    """An engine: every task in an interpreter of its own, which is given nothing but the task."""

    def __init__(self, form: str = "json") -> None:
        self.form = form

    def run(self, tasks: Iterable[FileTask]) -> Iterator[Receipt]:
        for task in tasks:
            sent = json.dumps(task.to_json()).encode() if self.form == "json" else pickle.dumps(task)
            code = BY_JSON if self.form == "json" else BY_PICKLE
            done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr.decode()
            yield Receipt.from_json(json.loads(done.stdout))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=2)


@pytest.fixture
def change(tmp_path: Path) -> Path:
    return adapter_folder(tmp_path / "change", SHAPES)


def planned(base: Path, adapters: list[str], **options: Any) -> MergePlan:
    """The plan, as it comes out of `--dry-run --format json`."""
    report = loraformat.merge(str(base), adapters, "nowhere", dry_run=True, **options)
    return MergePlan.from_json(json.loads(json.dumps(report.data.plan)))


def merged_by(engine: object, plan: MergePlan, out: Path) -> None:
    inputs = open_inputs(plan)
    with stage(str(out), overwrite=False) as output:
        sources = [source_of(bundle) for bundle in inputs.bundles]
        run_merge(plan, inputs, sources, output, Resources(), Trust(), engine=engine)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("form", "options", "strength"),
    [
        ("json", {}, ""),
        ("pickle", {}, "=0.7"),
        ("json", {"container": "torch"}, ""),
        ("json", {"max_shard_nbytes": 8000, "dtype": "float32"}, "=-2"),
        ("pickle", {"dtype": "float16", "rounding": "stochastic", "seed": 7}, ""),
    ],
)
def test_a_plan_alone_gives_the_same_folder(
    base: Path, change: Path, tmp_path: Path, form: str, options: dict[str, Any], strength: str
) -> None:
    adapters = [f"{change}{strength}"]
    loraformat.merge(str(base), adapters, str(tmp_path / "here"), **options)
    merged_by(FreshInterpreters(form), planned(base, adapters, **options), tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere") == contents(tmp_path / "here")


def test_what_the_caller_said_of_an_adapter_is_in_the_plan(base: Path, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    factors = {"lora_A": torch.randn(3, 24, generator=g), "lora_B": torch.randn(24, 3, generator=g)}
    names = {f"model.layers.0.q_proj.{name}": value for name, value in factors.items()}
    torch.save(names, tmp_path / "hand.pt")
    options = {"assumptions": Assumptions(alpha=6.0)}
    loraformat.merge(str(base), [str(tmp_path / "hand.pt")], str(tmp_path / "here"), **options)
    plan = planned(base, [str(tmp_path / "hand.pt")], **options)
    merged_by(FreshInterpreters(), plan, tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere") == contents(tmp_path / "here")


def test_a_plan_and_its_tasks_come_back_from_json_as_they_were(base: Path, change: Path) -> None:
    plan = planned(base, [str(change)])
    assert MergePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    for task in tasks_of(plan, "out"):
        assert FileTask.from_json(json.loads(json.dumps(task.to_json()))) == task


@pytest.mark.parametrize("changed", ["model-00002-of-00002.safetensors", "config.json", "tokenizer.json"])
def test_a_base_that_changed_since_is_refused(base: Path, change: Path, tmp_path: Path, changed: str) -> None:
    plan = planned(base, [str(change)])
    path = base / changed
    data = bytearray(path.read_bytes())
    data[-8 if changed.endswith(".json") else 40] ^= 1
    path.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises((StorageError, loraformat.LoraFormatError)):
        execute(tasks_of(plan, str(tmp_path / "out"))[0])
    assert not list((tmp_path / "out").iterdir())


def test_an_adapter_that_changed_since_is_refused_by_name(base: Path, change: Path, tmp_path: Path) -> None:
    plan = planned(base, [str(change)])
    settings = json.loads((change / "adapter_config.json").read_text())
    (change / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 12}))
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match=r"adapter_config\.json: the file changed after the merge was planned"):
        execute(tasks_of(plan, str(tmp_path / "out"))[0])


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("version",), 1, "version: expected 3, found 1"),
        (("extra",), 1, "extra"),
        (("base",), 7, r"plan\.base"),
        (("shards", 0, "edits", 0, "terms", 0, "index"), "x", r"terms\[0\]\.index"),
        (("shards", 0, "tensors", 0, "shape"), [1.5], r"shape\[0\]"),
        (("adapters", 0, "strength"), "much", "strength"),
        (("shards",), {}, "expected a list"),
        (("shards", 0, "edits", 0, "terms", 0, "adapter"), -1, "adapter"),
        (("arithmetic", "rounding"), "x", "rounding"),
    ],
)
def test_a_plan_that_is_not_of_its_form_is_refused(
    base: Path, change: Path, path: tuple[Any, ...], value: object, expected: str
) -> None:
    plain = json.loads(json.dumps(planned(base, [str(change)]).to_json()))
    level = plain
    for key in path[:-1]:
        level = level[key]
    level[path[-1]] = value
    with pytest.raises(ConfigError, match=expected) as error:
        MergePlan.from_json(plain)
    assert "plan" in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("adapters",), []),
        (("shards", 0, "source"), "x"),
        (("shards", 0, "edits", 0, "source"), "x"),
        (("shards", 0, "edits", 0, "terms", 0, "index"), 9),
        (("shards", 0, "edits", 0, "terms", 0, "adapter"), 9),
        (("shards", 0, "edits", 0, "terms", 0, "weight"), "x"),
    ],
)
def test_a_plan_that_names_what_is_not_there_is_refused(
    base: Path, change: Path, tmp_path: Path, path: tuple[Any, ...], value: object
) -> None:
    plain = json.loads(json.dumps(planned(base, [str(change)]).to_json()))
    plain["shards"] = [next(shard for shard in plain["shards"] if shard["edits"])]
    level = plain
    for key in path[:-1]:
        level = level[key]
    level[path[-1]] = value
    (tmp_path / "out").mkdir()
    (task,) = tasks_of(MergePlan.from_json(plain), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="plan"):
        execute(task)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("value", [None, [], "x", 5, {}])
def test_what_is_no_task_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError):
        FileTask.from_json(value)


@pytest.mark.parametrize(
    "changed", [{"jobs": 0}, {"memory_nbytes": 0}, {"plan": "all files"}, {"plan": "no file"}], ids=str
)
def test_a_task_is_one_file_with_a_job_and_a_byte(base: Path, change: Path, changed: dict[str, Any]) -> None:
    plan = planned(base, [str(change)])
    task = next(iter(tasks_of(plan, "out"))).to_json()
    assert FileTask.from_json({**task, "jobs": 1, "memory_nbytes": 1}).target == plan.shards[0].target
    shards = plan.shards if changed == {"plan": "all files"} else ()
    if "plan" in changed:
        changed = {"plan": replace(plan, shards=shards).to_json()}
    with pytest.raises(ConfigError, match=r"expected one weight file, at least one job and one byte|shards"):
        FileTask.from_json({**task, **changed})


def test_a_retrained_adapter_is_noticed_by_its_values(base: Path, change: Path, tmp_path: Path) -> None:
    plan = planned(base, [str(change)])
    path = change / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="adapter_model"):
        open_inputs(plan)


def test_a_file_of_an_engine_is_as_private_as_the_others(base: Path, change: Path, tmp_path: Path) -> None:
    plan = planned(base, [str(change)])
    inputs = open_inputs(plan)
    with stage(str(tmp_path / "out"), overwrite=False, permissions=0o700) as output:
        sources = [source_of(bundle) for bundle in inputs.bundles]
        run_merge(plan, inputs, sources, output, Resources(), Trust(), engine=FreshInterpreters())
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "out").iterdir()} == {0}


def test_two_files_that_would_have_one_name_are_refused(base: Path, change: Path, tmp_path: Path) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    renames = {"model-00001-of-00002.safetensors": "x.bin", "model-00002-of-00002.safetensors": "x.pt"}
    for old, new in renames.items():
        torch.save(load_file(base / old), base / new)
        (base / old).unlink()
    index["weight_map"] = {name: renames[file] for name, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").unlink()
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(MergeError, match=r"x\.bin and x\.pt would both become x\.safetensors"):
        loraformat.merge(base, [change], tmp_path / "out", container="safetensors")


def test_a_file_without_a_receipt_ends_the_merge(base: Path, change: Path, tmp_path: Path) -> None:
    class Forgetful(FreshInterpreters):
        def run(self, tasks: Iterable[FileTask]) -> Iterator[Receipt]:
            return super().run(list(tasks)[1:])

    with pytest.raises(MergeError, match="no receipt"):
        merged_by(Forgetful(), planned(base, [str(change)]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
