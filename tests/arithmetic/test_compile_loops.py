"""Compilers that do not do what they should: the build goes on without the loops, and says why."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compile_loops

COMPILER = shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform == "win32" or not compile_loops.loops_of(platform.machine()),
    reason="no gcc and no clang here, or no loops for this machine",
)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def test_a_compiler_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    silent = program(tmp_path / "silent", "exit 0\n")
    with pytest.raises(OSError, match="wrote no"):
        compile_loops.compile_library(str(silent), tmp_path / "kernel.so")


def test_a_library_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    """It writes an empty file for whatever is asked for."""
    empty = program(tmp_path / "empty", 'for last; do :; done\n: > "$last"\n')
    with pytest.raises(subprocess.CalledProcessError, match="kernel"):
        compile_loops.compile_library(str(empty), tmp_path / "kernel.so")


@pytest.mark.parametrize("form", ["{path}", "'{path}' -pipe", '"{path}"'])
def test_a_path_with_spaces_is_a_compiler(tmp_path: Path, form: str) -> None:
    wrapped = program(tmp_path / "my tools" / "cc", f'exec {COMPILER} "$@"\n')
    (tmp_path / "one.c").write_text("int one(void) { return 1; }")
    made = tmp_path / "one.o"
    compile_loops.run(form.format(path=wrapped), "-c", tmp_path / "one.c", "-o", made, makes=made)
    assert made.stat().st_size


@pytest.mark.parametrize("option", ["-ffast-math", "-Ofast", "-funsafe-math-optimizations"])
def test_options_that_break_the_arithmetic_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(OSError, match=option):
        compile_loops.compile_library(f"{COMPILER} {option}", tmp_path / "kernel.so")


@pytest.mark.parametrize("option", ["-ffast-math", "-ffinite-math-only"])
def test_a_wrapper_that_adds_them_does_not_compile(tmp_path: Path, option: str) -> None:
    wrapped = program(tmp_path / "cc", f'exec {COMPILER} "$@" {option}\n')
    with pytest.raises(subprocess.CalledProcessError, match="fast-math"):
        compile_loops.compile_library(str(wrapped), tmp_path / "kernel.so")


@pytest.mark.parametrize("text", ["", "'", "no-such-compiler"])
def test_a_compiler_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(OSError, match=r"CC|no-such-compiler"):
        compile_loops.compile_library(text, tmp_path / "kernel.so")


@pytest.mark.parametrize("text", ["no-such-compiler", "gcc -ffast-math", "'"])
def test_the_build_goes_on_and_says_why(tmp_path: Path, text: str) -> None:
    """hatch_build.py warns of what this tells, and leaves a wheel without the loops."""
    assert compile_loops.why_not(text, tmp_path / "kernel.so")


def test_a_compiler_that_works_is_no_reason(tmp_path: Path) -> None:
    assert not compile_loops.why_not(f"{COMPILER}", tmp_path / "kernel.so")
    assert (tmp_path / "kernel.so").stat().st_size
