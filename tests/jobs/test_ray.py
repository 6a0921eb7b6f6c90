"""Workers of a Ray cluster write the files: equal bytes, also where a worker or a whole node is killed.

One cluster for the session: a head without processors and two nodes with one each, on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs.test_merge_pipeline import files_of
from merger.checkpoints import adapter_folder, config, save_base, weights

import loraformat
from loraformat.engine import TaskEngine
from loraformat.errors import EngineError, LoraFormatError, NonFiniteValue, StorageError
from loraformat.merger import FileTask, Receipt

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")

MIB = 1 << 20
SHAPES = {"model.layers.0.q_proj.weight": (24, 24), "model.layers.1.up_proj.weight": (130, 24)}
# What a cluster of the user's has is his own; the death of a node is noticed in a second here.
CONFIG = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 2,
    "health_check_timeout_ms": 500,
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    head = {
        "num_cpus": 0,
        "object_store_memory": 80 * MIB,
        "include_dashboard": False,
        "_system_config": CONFIG,
    }
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=80 * MIB)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=5)


@pytest.fixture
def change(tmp_path: Path) -> Path:
    return adapter_folder(tmp_path / "change", SHAPES)


def test_a_cluster_gives_the_bytes_of_this_process(cluster: Any, base: Path, change: Path, tmp_path: Path) -> None:
    for options in ({}, {"max_shard_nbytes": 8000, "dtype": "float32"}, {"verify": "full", "digests": "sha256"}):
        for engine in ("threads", f"ray={cluster.address}"):
            loraformat.merge(base, [change], tmp_path / engine[:3], engine=engine, overwrite=True, **options)
        assert files_of(tmp_path / "ray") == files_of(tmp_path / "thr")
    assert not list(tmp_path.glob(".*"))


def test_the_command_finds_the_cluster_by_ray_address(cluster: Any, base: Path, change: Path, tmp_path: Path) -> None:
    loraformat.merge(base, [change], tmp_path / "plain")
    command = [sys.executable, "-m", "loraformat", "merge", "base", "change", "-o", "out", "--engine", "ray"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def test_unmerging_and_dequantizing_run_there_too(cluster: Any, base: Path, change: Path, tmp_path: Path) -> None:
    engine = f"ray={cluster.address}"
    loraformat.merge(base, [change], tmp_path / "merged")
    loraformat.unmerge(tmp_path / "merged", [change], tmp_path / "back", base=base, engine=engine)
    loraformat.unmerge(tmp_path / "merged", [change], tmp_path / "plain", base=base)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "plain")
    loraformat.dequantize("fixtures/quantized/nf4", tmp_path / "dense", engine=engine)
    loraformat.dequantize("fixtures/quantized/nf4", tmp_path / "here")
    assert files_of(tmp_path / "dense") == files_of(tmp_path / "here")


class Interrupted:
    """An engine whose task for one file stops in the middle when it is done first, and says where it runs."""

    def __init__(self, engine: TaskEngine, target: str, folder: Path) -> None:
        self.engine, self.target, self.mark = engine, target, folder / "begun"

    def run(self, tasks: Iterable[FileTask]) -> Iterator[Receipt]:
        target, mark = self.target, str(self.mark)

        def once(task: FileTask) -> Receipt:
            """As a closure it goes to the worker as it is, which need not know this module."""
            import json
            import os
            import signal

            import ray

            from loraformat.merger import execute
            from loraformat.storage import open_output

            if task.target == target and not os.path.exists(mark):
                with open_output(task.output, task.permissions).create(target) as writer:
                    writer.write(b"half of it")
                    with open(f"{mark}.new", "w") as file:
                        json.dump({"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}, file)
                    os.rename(f"{mark}.new", mark)
                    signal.pause()
            return execute(task)

        return self.engine.map_unordered(once, list(tasks))

    def where(self) -> dict[str, Any]:
        """Where the task is, once it has begun."""
        while not self.mark.exists():
            time.sleep(0.01)
        return json.loads(self.mark.read_text())


def merged_while(kill: Callable[[dict[str, Any]], None], engine: Interrupted, *inputs: Path, out: Path) -> None:
    """A merge, during which a thread waits for the interrupted task and kills what runs it."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(lambda: kill(engine.where()))
        loraformat.merge(inputs[0], [inputs[1]], out, engine=engine)  # type: ignore[arg-type]
        killed.result()


def test_a_killed_worker_s_file_is_made_again(cluster: Any, base: Path, change: Path, tmp_path: Path) -> None:
    from loraformat.engine.ray import RayEngine

    loraformat.merge(base, [change], tmp_path / "plain")
    engine = Interrupted(RayEngine.open(cluster.address), "model-00002-of-00005.safetensors", tmp_path)
    merged_while(lambda where: os.kill(where["pid"], signal.SIGKILL), engine, base, change, out=tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert not list(tmp_path.glob(".*"))


def test_a_killed_node_s_files_are_made_again(cluster: Any, base: Path, change: Path, tmp_path: Path) -> None:
    from loraformat.engine.ray import RayEngine

    loraformat.merge(base, [change], tmp_path / "plain")
    engine = Interrupted(RayEngine.open(cluster.address), "model-00003-of-00005.safetensors", tmp_path)

    def kill(where: dict[str, Any]) -> None:
        node = next(one for one in cluster.list_all_nodes() if one.node_id == where["node"])
        cluster.remove_node(node, allow_graceful=False)

    try:
        merged_while(kill, engine, base, change, out=tmp_path / "out")
        assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    finally:
        cluster.add_node(num_cpus=1, object_store_memory=80 * MIB)
        cluster.wait_for_nodes()
    assert not list(tmp_path.glob(".*"))


def test_a_file_whose_worker_always_dies_is_one_error(cluster: Any, base: Path, change: Path, tmp_path: Path) -> None:
    from loraformat.engine.ray import RayEngine

    class Deadly:
        def run(self, tasks: Iterable[FileTask]) -> Iterator[Receipt]:
            def die(task: FileTask) -> Receipt:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGKILL)
                raise AssertionError("unreachable")

            return RayEngine.open(cluster.address).map_unordered(die, list(tasks))

    with pytest.raises(EngineError, match="a task failed 4 times because its worker died: WorkerCrashedError"):
        loraformat.merge(base, [change], tmp_path / "out", engine=Deadly())  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change"]


def test_an_error_of_a_task_is_the_error_of_the_merge(cluster: Any, base: Path, change: Path, tmp_path: Path) -> None:
    data = (change / "adapter_model.safetensors").read_bytes()
    (change / "adapter_model.safetensors").write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(NonFiniteValue) as error:
        loraformat.merge(base, [change], tmp_path / "out", engine=f"ray={cluster.address}")
    assert type(error.value) is NonFiniteValue
    command = [sys.executable, "-m", "loraformat", "merge", str(base), str(change), "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, "--engine", f"ray={cluster.address}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("error[") == 1
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change"]


def test_a_node_that_does_not_see_the_folder_says_so(cluster: Any, base: Path, change: Path, tmp_path: Path) -> None:
    """The folder is not where the task looks for it, as on a node that does not mount the file system."""
    from loraformat.engine.ray import RayEngine
    from loraformat.merger import TaskFiles, tasks_of
    from loraformat.merger.plan.data import MergePlan

    plan = MergePlan.from_json(loraformat.merge(base, [change], "nowhere", dry_run=True).data.plan)
    tasks = tasks_of(plan, str(tmp_path / "elsewhere"))
    with pytest.raises(StorageError, match=r"no such file or folder, on node .*shared folder, or a bucket"):
        list(TaskFiles(RayEngine.open(cluster.address)).run(tasks))


def test_workers_get_credentials_and_the_variables_that_the_user_names(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraformat.engine.ray import RayEngine

    def seen(name: str) -> str | None:
        import os

        return name if name in os.environ else None

    names = ["TOY_SECRET_KEY", "TOY_REGION", "OTHER_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"]
    for name in names:
        monkeypatch.setenv(name, "x")
    named = (("", []), ("TOY_*", names[:2]), (" OTHER_TOKEN,TOY", names[2:3]), ("*", []))
    for sent, expected in ((None, ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY"]), *named):
        if sent is not None:
            monkeypatch.setenv("LORAFORMAT_RAY_ENV", sent)
        with contextlib.closing(RayEngine.open(cluster.address).map_unordered(seen, names)) as found:
            assert {one for one in found if one} == set(expected)


def test_a_gpu_that_no_node_has_is_an_error(cluster: Any, base: Path, change: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no node of the cluster has a GPU"):
        loraformat.merge(base, [change], tmp_path / "out", engine=f"ray={cluster.address}", device="cuda")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change"]


def test_an_interrupt_stops_the_tasks_and_leaves_nothing(
    cluster: Any, base: Path, change: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loraformat.merge(base, [change], tmp_path / "out", engine=f"ray={cluster.address}", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change"]


def test_something_else_that_listens_is_one_error(base: Path, change: Path, tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(LoraFormatError, match=r"no Ray cluster answers at .*: something else listens there"):
            loraformat.merge(base, [change], tmp_path / "out", engine=f"ray={address}")
        server.shutdown()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change"]


def test_this_machine_is_a_cluster_where_there_is_none(base: Path, change: Path, tmp_path: Path) -> None:
    loraformat.merge(base, [change], tmp_path / "plain")
    command = [sys.executable, "-m", "loraformat", "merge", str(base), str(change), "-o", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([*command, "--engine", "ray"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
