"""Compiles the loops of a merge, for this machine or for another: run by hatch_build.py and by the tests."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "loraformat" / "arithmetic"
# Every sum is a chain of fused multiply-adds (-ffp-contract): loops.c relies on it, tests/arithmetic holds it.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# For each machine the options with which loops.c is compiled, once for each instruction set.
LOOPS = {
    "x86_64": (AVX2, (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")),
    "aarch64": ((),),
}
# In CC: loops.c does not compile with the first, and where they are linked with, loading the library changes the
# control bits of the processor for the whole process.
FAST_MATH = ("-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-mdaz-ftz", "-ffp-model=fast", "/fp:fast")
# Run in a process of its own: what was built may crash.
CHECK = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.loraformat_kernel_width()"
NAMES = {"amd64": "x86_64", "arm64": "aarch64"}
# The first macOS that runs the library, by the machine's name in the tags of wheels.
OLDEST_MACOS = {"x86_64": "10.13", "arm64": "11.0"}


class Target(NamedTuple):
    """A platform for which `zig cc` compiles on any machine.

    Attributes:
        triple: its name as Zig has it, with the oldest C library or system that runs the result.
        machine: its processor, a key of LOOPS.
        platform: its name in the tag of a wheel, as PyPI takes it.
    """

    triple: str
    machine: str
    platform: str


TARGETS = {
    "manylinux-x86_64": Target("x86_64-linux-gnu.2.17", "x86_64", "manylinux2014_x86_64.manylinux_2_17_x86_64"),
    "manylinux-aarch64": Target("aarch64-linux-gnu.2.17", "aarch64", "manylinux2014_aarch64.manylinux_2_17_aarch64"),
    "musllinux-x86_64": Target("x86_64-linux-musl", "x86_64", "musllinux_1_2_x86_64"),
    "musllinux-aarch64": Target("aarch64-linux-musl", "aarch64", "musllinux_1_2_aarch64"),
    "macos-x86_64": Target("x86_64-macos.10.13", "x86_64", "macosx_10_13_x86_64"),
    "macos-arm64": Target("aarch64-macos.11.0", "aarch64", "macosx_11_0_arm64"),
    "windows-x86_64": Target("x86_64-windows-gnu", "x86_64", "win_amd64"),
}


def compiler_of_this_machine() -> str | None:
    """The command of a C compiler: CC, or one on the PATH. Visual Studio's own has no vector extensions."""
    names = ("clang-cl",) if sys.platform == "win32" else ("gcc", "clang", "cc")
    return os.environ.get("CC") or next(filter(None, map(shutil.which, names)), None)


def loops_of(machine: str) -> tuple[tuple[str, ...], ...]:
    """For each instruction set of a machine the compiler's options; none where there is no code for it."""
    name = machine.lower()
    return LOOPS.get(NAMES.get(name, name), ())


def why_not(compiler: str, library: Path) -> str:
    """Makes the shared library; the reason where that fails, which no build stops for."""
    try:
        compile_library(compiler, library)
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)
    return ""


def compile_for(target: Target, library: Path) -> None:
    """The shared library for another platform, which is not loaded; object files are put beside it.

    Raises: OSError, CalledProcessError: Zig is not on the PATH, or does not compile it.
    """
    zig = next(filter(None, map(shutil.which, ("zig", "python-zig"))), None)
    if zig is None:
        raise OSError("zig is not on the PATH: pip install ziglang")
    compiler = f"{shlex.quote(zig)} cc -target {target.triple}"
    objects = compile_objects(compiler, LOOPS[target.machine], library.parent)
    # -s: what a debugger wants names the folder of the build.
    run(compiler, "-shared", "-s", *objects, "-o", library, *linked_as(target.triple), makes=library)


def linked_as(system: str) -> tuple[str, ...]:
    """Options of the linker without which a library for macOS holds the path at which it was made."""
    return ("-Wl,-install_name,@rpath/_kernel.so",) if "macos" in system or system == "darwin" else ()


def for_this_system() -> tuple[str, ...]:
    """Options that name the platform where a compiler makes code for several, or for newer systems than it must."""
    machine = platform.machine()
    return ("-arch", machine, f"-mmacosx-version-min={OLDEST_MACOS[machine]}") if sys.platform == "darwin" else ()


def platform_tag() -> str:
    """The platform of this machine in the tag of a wheel; PyPI takes `linux_…` only after auditwheel renamed it."""
    machine = platform.machine()
    if sys.platform == "darwin":
        return f"macosx_{OLDEST_MACOS[machine].replace('.', '_')}_{machine}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def compile_library(compiler: str, library: Path) -> None:
    """The shared library for this machine, loaded once as a check; object files are put beside it.

    Raises: OSError, CalledProcessError: there is no such compiler, it does not take the code or makes nothing of it,
        its options break the arithmetic, or the library cannot be loaded.
    """
    system = for_this_system()
    objects = compile_objects(compiler, loops_of(platform.machine()), library.parent, system)
    if is_msvc_like(compiler):
        run(compiler, "/LD", *objects, f"/Fe{library}", makes=library)
    else:
        run(compiler, "-shared", *system, *objects, "-o", library, *linked_as(sys.platform), makes=library)
    call([sys.executable, "-c", CHECK, str(library)])


def compile_objects(
    compiler: str, loops: tuple[tuple[str, ...], ...], folder: Path, system: tuple[str, ...] = ()
) -> list[Path]:
    """Object files of kernel.c and of loops.c for each instruction set, in `folder`."""

    def compiled(unit: tuple[int, tuple[str, ...]]) -> Path:
        number, options = unit
        source, made = SOURCES / ("loops.c" if number else "kernel.c"), folder / f"{number}.o"
        if is_msvc_like(compiler):
            flags = ("/O2", *(f"/clang:{flag}" for flag in ("-ffp-contract=fast", "-fno-math-errno")))
            run(compiler, *flags, *options, "/c", source, f"/Fo{made}", makes=made)
        else:
            run(compiler, *FLAGS, *system, *options, "-c", source, "-o", made, makes=made)
        return made

    with ThreadPoolExecutor() as pool:  # a compiler takes some seconds for each
        return list(pool.map(compiled, enumerate(((), *loops))))


def is_msvc_like(compiler: str) -> bool:
    """Whether a compiler takes the options of Visual Studio's."""
    return "clang-cl" in Path(command_of(compiler)[0]).name


def command_of(compiler: str) -> list[str]:
    """The words of CC, which may be a path with spaces, or a command with options as a shell reads it.

    Raises: OSError: an option breaks the arithmetic, or there is no word.
    """
    if shutil.which(compiler):
        return [compiler]
    try:
        words = shlex.split(compiler)
    except ValueError as error:
        raise OSError(f"CC: {error}: {compiler!r}") from None
    if not words:
        raise OSError("CC names no compiler")
    for word in words[1:]:
        if word in FAST_MATH:
            raise OSError(f"{word} in CC breaks the arithmetic: leave it out")
    return words


def run(compiler: str, *arguments: object, makes: Path | None = None) -> None:
    """One call of the compiler, whose messages are in the error.

    Args:
        makes: the file that is there afterwards.
    """
    command = [*command_of(compiler), *map(str, arguments)]
    call(command)
    if makes is not None and not makes.exists():
        raise OSError(f"{command[0]} ended without an error and wrote no {makes.name}")


def call(command: list[str]) -> None:
    """A command, whose messages are in the error."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own compiler call
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, f"{' '.join(command)}\n{done.stderr[:500]}")
