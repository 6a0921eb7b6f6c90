"""The options about who computes an output: what goes together, from the command line and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from jobs.test_merge_pipeline import adapter as image_adapter
from jobs.test_merge_pipeline import files_of, pipeline
from merger.checkpoints import adapter_folder, config, save_base, weights

import loraformat
from loraformat import schema
from loraformat.cli import main
from loraformat.errors import EngineError, StorageError, UsageError
from loraformat.merger import divided
from loraformat.merger.write.receipts import MOST_WORLD

SHAPES = {"model.layers.0.q_proj.weight": (24, 24), "model.layers.1.up_proj.weight": (130, 24)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=3)


@pytest.fixture
def change(tmp_path: Path) -> Path:
    return adapter_folder(tmp_path / "change", SHAPES)


def command(base: Path, change: Path, out: Path, *more: str) -> list[str]:
    return ["merge", str(base), str(change), "-o", str(out), *more]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--rank", "2", "--world", "2"), "expected 0 to 1 of 2, found 2"),
        (("--rank", "-1", "--world", "2"), "expected 0 to 1 of 2, found -1"),
        (("--rank", "0", "--world", "0"), "expected 1 to 100000, found 0"),
        (("--rank", "0", "--world", "1000000000"), "expected 1 to 100000, found 1000000000"),
        (("--rank", "0"), "--rank and --world must be used together"),
        (("--world", "2"), "--rank and --world must be used together"),
        (("--rank", "0", "--world", "2", "--finish"), "--rank cannot be combined with --finish"),
        (("--world", "2", "--finish"), "--finish does not take --world"),
        (("--engine", "dask", "--dry-run"), "expected threads, ray or ray=ADDRESS"),
        (("--engine", "ray=nowhere", "--dry-run"), "expected HOST:PORT"),
        (("--engine", "ray=ray://user:SECRET@host:1"), "found 'ray://…@host:1'"),
        (("--rank", "0", "--world", "2", "--dry-run"), "--dry-run cannot be combined with --rank"),
        (("--rank", "0", "--world", "2", "--resume"), "--resume cannot be combined with --rank"),
        (("--finish", "--dry-run"), "--dry-run cannot be combined with --finish"),
        (("--finish", "--resume"), "--resume cannot be combined with --finish"),
        (("--finish", "--engine", "ray"), "--engine cannot be combined with --finish"),
        (("--rank", "x", "--world", "2"), "not a valid integer"),
        (("--engine", "dask"), "expected threads, ray or ray=ADDRESS"),
        (("--engine", "ray="), "expected threads, ray or ray=ADDRESS"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(
    base: Path, change: Path, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    result = CliRunner().invoke(main, command(base, change, tmp_path / "out", *options))
    assert result.exit_code == 2
    assert expected in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change"]


def test_ranks_at_the_same_time_from_the_command_line(base: Path, change: Path, tmp_path: Path) -> None:
    """More ranks than files: each in a process of its own, all at once."""
    loraformat.merge(base, [change], tmp_path / "plain")
    start = [sys.executable, "-m", "loraformat", *command(base, change, tmp_path / "out")]
    running = [
        subprocess.Popen(
            [*start, "--rank", str(rank), "--world", "4", "--format", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    ended = [(process.communicate(timeout=300), process.returncode) for process in running]
    assert [code for _, code in ended] == [0] * 4, ended
    assert not (tmp_path / "out").exists()
    reports = [json.loads(out) for (out, _), _ in ended]
    for report in reports:
        assert not list(schema.check("report", report))
    assert sorted(len(report["data"]["share"]["files"]) for report in reports) == [0, 1, 1, 1]
    done = subprocess.run([*start, "--finish"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert not list(tmp_path.glob(".out*"))


def test_a_rank_says_what_comes_next(base: Path, change: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, command(base, change, tmp_path / "out", "--rank", "0", "--world", "9"))
    assert result.exit_code == 0
    assert "rank 0 of 9" in result.output
    assert "--finish" in result.output
    result = CliRunner().invoke(main, command(base, change, tmp_path / "out", "--finish"))
    assert result.exit_code == 1
    assert result.output.count("error[") == 1
    assert "2 of 3 weight files are missing" in result.output


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_pipeline_is_divided_over_its_components(tmp_path: Path, world: int) -> None:
    case = "kohya/tiny-flux"
    base, out = pipeline(tmp_path / "base", case), tmp_path / "out"
    loraformat.merge(base, [image_adapter(case)], tmp_path / "plain")
    files: list[str] = []
    for rank in range(world):
        report = loraformat.merge(base, [image_adapter(case)], out, rank=rank, world=world)
        files += report.data.share.files
        if rank < world - 1 and world == 2:
            with pytest.raises(loraformat.MergeError, match="has not written all of its share"):
                loraformat.merge(base, [image_adapter(case)], out, finish=True)
    assert len(files) == len(set(files)) == 2
    assert not out.exists()
    with pytest.raises(StorageError, match="no rank of this run"):
        loraformat.merge(base, [f"{image_adapter(case)}=0.5"], out, finish=True)
    loraformat.merge(base, [image_adapter(case)], out, finish=True)
    assert files_of(out) == files_of(tmp_path / "plain")
    assert not list(tmp_path.glob(".out*"))


def test_an_executor_is_an_engine(base: Path, change: Path, tmp_path: Path) -> None:
    loraformat.merge(base, [change], tmp_path / "plain")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        loraformat.merge(base, [change], tmp_path / "out", engine=executor)
        loraformat.unmerge(tmp_path / "out", [change], tmp_path / "back", base=base, engine=executor)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    loraformat.unmerge(tmp_path / "plain", [change], tmp_path / "again", base=base)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "again")


def test_an_executor_is_given_paths_that_do_not_depend_on_where_it_runs(
    base: Path, change: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loraformat.merge(base, [change], tmp_path / "plain")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        executor.submit(abs, 1).result()  # the worker keeps the folder in which it was started
        monkeypatch.chdir(tmp_path)
        loraformat.merge("base", ["change"], "out", engine=executor)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def test_a_pipeline_goes_through_an_engine_too(tmp_path: Path) -> None:
    case = "kohya/tiny-flux"
    base = pipeline(tmp_path / "base", case)
    loraformat.merge(base, [image_adapter(case)], tmp_path / "plain")
    with ThreadPoolExecutor(2) as executor:
        loraformat.merge(base, [image_adapter(case)], tmp_path / "out", engine=executor)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def test_what_a_task_raises_ends_the_merge(base: Path, change: Path, tmp_path: Path) -> None:
    """Values that are NaN are found in a worker; the others are waited for, and nothing is left."""
    settings = (change / "adapter_model.safetensors").read_bytes()
    (change / "adapter_model.safetensors").write_bytes(settings[:-4] + b"\x00\x00\xc0\x7f")
    with ThreadPoolExecutor(2) as executor, pytest.raises(loraformat.NonFiniteValue):
        loraformat.merge(base, [change], tmp_path / "out", engine=executor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change"]


def test_an_address_where_nothing_listens_is_one_quick_error(base: Path, change: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'loraformat[ray]'")
    with pytest.raises(EngineError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: Connection refused"):
        loraformat.merge(base, [change], tmp_path / "out", engine="ray=127.0.0.1:1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change"]


def test_what_is_not_an_address_is_refused(base: Path, change: Path, tmp_path: Path) -> None:
    for address in ("nowhere", "127.0.0.1", "127.0.0.1:99999", "http://127.0.0.1:1", "a b:1"):
        with pytest.raises(UsageError, match="expected HOST:PORT"):
            loraformat.merge(base, [change], tmp_path / "out", engine=f"ray={address}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change"]


def test_many_more_shares_than_files() -> None:
    sizes = {"a": 5, "b": 0, "c": 7, "d": 0, "e": 5}
    shares = divided(sizes, MOST_WORLD)
    assert len(shares) == MOST_WORLD
    assert shares[:6] == (("c",), ("a",), ("e",), ("b",), ("d",), ())
    assert divided(sizes, 2) == (("b", "c", "d"), ("a", "e"))
    assert divided({"a": 3, "b": 2, "c": 2, "d": 1}, 2) == (("a", "d"), ("b", "c"))
