"""Too little memory or too few threads: said in one line with exit code 3, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from loraformat.engine.resources import as_out_of_resources

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
MERGE = ("merge", "base", "adapter", "-o", "out", "--jobs", "4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").symlink_to(FIXTURES / "minigpt" / "base")
    (tmp_path / "adapter").symlink_to(FIXTURES / "minigpt" / "lora_adapter")
    return tmp_path


def run(folder: Path, *arguments: str, memory: int, stack: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command with so many MiB of addresses, and of stack for each thread."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory << 20, memory << 20))
        if stack is not None:
            resource.setrlimit(resource.RLIMIT_STACK, (stack << 20, stack << 20))

    command = [sys.executable, "-m", "loraformat", *arguments, "--alpha", "1"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, preexec_fn=limit, check=False)


@pytest.mark.parametrize("arguments", [MERGE, ("convert", "adapter", "--to", "peft", "-o", "out")])
@pytest.mark.parametrize("memory", [60, 120, 200, 300, 400, 500, 600])
def test_too_little_memory_is_told_and_leaves_nothing(folder: Path, arguments: tuple[str, ...], memory: int) -> None:
    done = run(folder, *arguments, memory=memory)
    if done.returncode:
        assert done.returncode == 3, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error[LF023] ")
        assert "Traceback" not in done.stderr
    left = {path.name for path in folder.iterdir()} - {"base", "adapter"}
    assert left == (set() if done.returncode else {"out"})


def test_less_memory_than_any_library_takes_is_an_error(folder: Path) -> None:
    done = run(folder, "inspect", "adapter", "--norms", memory=100)
    assert (done.returncode, done.stdout) == (3, "")
    assert "not enough memory" in done.stderr


def test_too_few_threads_are_told_and_are_no_interruption(folder: Path) -> None:
    """A stack of 700 MB for each of them, and room for one."""
    done = run(folder, "merge", "base", "adapter", "-o", "out", "--jobs", "4", memory=1500, stack=700)
    assert done.returncode == 3, done.stderr
    assert "no more threads can be started" in done.stderr
    assert {path.name for path in folder.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("can't start new thread"), "threads"),
        (MemoryError(), "memory"),
        (OSError(12, os.strerror(12)), "memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), "memory"),
    ],
)
def test_what_libraries_say_of_it_is_known(error: Exception, said: str) -> None:
    found = as_out_of_resources(error)
    assert found is not None
    assert said in found.message


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(2, os.strerror(2)), KeyError("memory")])
def test_other_errors_are_other_errors(error: Exception) -> None:
    assert as_out_of_resources(error) is None
