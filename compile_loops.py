"""Compiles the loops of a merge: `compile_library`, run by hatch_build.py and by the tests."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "loraformat" / "arithmetic"
# Every sum is a chain of fused multiply-adds (-ffp-contract): loops.c relies on it, tests/arithmetic holds it.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# For each machine the options with which loops.c is compiled, once for each instruction set.
LOOPS = {
    "x86_64": (AVX2, (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")),
    "aarch64": ((),),
}
NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


def compiler_of_this_machine() -> str | None:
    """The command of a C compiler: CC, or one on the PATH. Visual Studio's own has no vector extensions."""
    names = ("clang-cl",) if sys.platform == "win32" else ("gcc", "clang", "cc")
    return os.environ.get("CC") or next(filter(None, map(shutil.which, names)), None)


def loops_of(machine: str) -> tuple[tuple[str, ...], ...]:
    """For each instruction set of a machine the compiler's options; none where there is no code for it."""
    name = machine.lower()
    return LOOPS.get(NAMES.get(name, name), ())


def compile_library(compiler: str, library: Path) -> None:
    """The shared library for this machine; object files are put beside it.

    Raises: OSError, CalledProcessError: there is no such compiler, or it does not take the code.
    """
    objects = compile_objects(compiler, loops_of(platform.machine()), library.parent)
    if is_msvc_like(compiler):
        run(compiler, "/LD", *objects, f"/Fe{library}")
    else:
        run(compiler, "-shared", *objects, "-o", library)


def compile_objects(compiler: str, loops: tuple[tuple[str, ...], ...], folder: Path) -> list[Path]:
    """Object files of kernel.c and of loops.c for each instruction set, in `folder`."""

    def compiled(unit: tuple[int, tuple[str, ...]]) -> Path:
        number, options = unit
        source, made = SOURCES / ("loops.c" if number else "kernel.c"), folder / f"{number}.o"
        if is_msvc_like(compiler):
            flags = ("/O2", *(f"/clang:{flag}" for flag in ("-ffp-contract=fast", "-fno-math-errno")))
            run(compiler, *flags, *options, "/c", source, f"/Fo{made}")
        else:
            run(compiler, *FLAGS, *options, "-c", source, "-o", made)
        return made

    with ThreadPoolExecutor() as pool:  # a compiler takes some seconds for each
        return list(pool.map(compiled, enumerate(((), *loops))))


def is_msvc_like(compiler: str) -> bool:
    """Whether a compiler takes the options of Visual Studio's."""
    return "clang-cl" in Path(compiler).name


def run(compiler: str, *arguments: object) -> None:
    """One call of the compiler, whose messages are in the error."""
    command = [*compiler.split(), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own compiler call
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, f"{' '.join(command)}\n{done.stderr[:500]}")
