"""Generates the validators of the schemas, and compiles the loops of a merge where gcc or clang is there.

Without the compiled loops the package is pure Python; it gives the same bytes and merges more slowly.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("loraformat/arithmetic")
LIBRARY = SOURCES / "_kernel.so"
# Every sum is a chain of fused multiply-adds (-ffp-contract): loops.c relies on it, tests/arithmetic holds it.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# For each machine the options with which loops.c is compiled, once for each instruction set.
LOOPS = {
    "x86_64": (AVX2, (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")),
    "aarch64": ((),),
}
NAMES = {"amd64": "x86_64", "arm64": "aarch64"}
COMPILERS = {"win32": ("clang",)}  # of the LLVM toolset, where Visual Studio's own compiler has no such vectors


class BuildHook(BuildHookInterface[Any]):
    """Puts what is made at build time into the wheel, or for an editable installation beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the validators; compile the loops and name the platform, or on failure leave a pure wheel."""
        del version
        root = Path(self.root)
        made = runpy.run_path(str(root / "schemas" / "compile.py"))["write"](root)
        build_data["artifacts"] += [f"/{path.as_posix()}" for path in made]
        (root / LIBRARY).unlink(missing_ok=True)
        compiler, loops = compiler_of_this_machine(), loops_of(platform.machine())
        if not compiler or not loops:
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                library = compile_library(compiler, root / SOURCES, loops, Path(folder))
            except (OSError, subprocess.CalledProcessError) as error:
                self.app.display_warning(f"the loops of a merge were not built, merges will be slower: {error}")
                return
            shutil.copyfile(library, root / LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")


def compiler_of_this_machine() -> str | None:
    """The command of a C compiler: CC, or one that is on the PATH."""
    names = COMPILERS.get(sys.platform, ("gcc", "clang", "cc"))
    return os.environ.get("CC") or next(filter(None, map(shutil.which, names)), None)


def loops_of(machine: str) -> tuple[tuple[str, ...], ...]:
    """For each instruction set of a machine the compiler's options; none where there is no code for it."""
    name = machine.lower()
    return LOOPS.get(NAMES.get(name, name), ())


def compile_library(compiler: str, sources: Path, loops: tuple[tuple[str, ...], ...], folder: Path) -> Path:
    """The shared library in `folder`.

    Raises: OSError, CalledProcessError: there is no such compiler, or it does not take the code.
    """
    units = [("kernel.c", ()), *(("loops.c", options) for options in loops)]
    objects = []
    flags = [flag for flag in FLAGS if sys.platform != "win32" or flag != "-fPIC"]
    for number, (source, options) in enumerate(units):
        objects.append(folder / f"{number}.o")
        run(compiler, *flags, *options, "-c", sources / source, "-o", objects[-1])
    library = folder / LIBRARY.name
    run(compiler, "-shared", *objects, "-o", library)
    return library


def run(compiler: str, *arguments: object) -> None:
    """One call of the compiler, whose messages are in the error."""
    command = [*compiler.split(), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own compiler call
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, f"{command}: {done.stderr[:500]}")
