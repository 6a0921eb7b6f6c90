"""Runs the library of a wheel as its system would load it, where this machine has that system or an emulator of it.

tests/arithmetic then compares it with the library of this machine, byte by byte. tests/arithmetic/driver.c, which Zig
compiles for the same target, takes the place of Python, which is rarely there for another system.
"""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from artifacts import ROOT, TARGETS, Failed, run
from contents import KERNEL

TESTS = ROOT / "tests" / "arithmetic"


class System(NamedTuple):
    """How a program for a target starts on this machine.

    Attributes:
        command: what stands before the program.
        needs: the program or file that must be there, and what Debian calls its package.
        options: for the compiler of the program.
        environment: of the program.
    """

    command: tuple[str, ...]
    needs: tuple[str, str] | None = None
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


# What a release leaves to other machines of its workflow. On x86-64, Ubuntu's usual package sources have no musl:arm64.
ELSEWHERE = ("macos-arm64", "macos-x86_64", "musllinux-aarch64")
_AARCH64_ROOT = "/usr/aarch64-linux-gnu"
_MUSL = "/lib/ld-musl-{}.so.1"
SYSTEMS = {
    "manylinux-x86_64": System(()),
    "manylinux-aarch64": System(
        ("qemu-aarch64", "-L", _AARCH64_ROOT), (f"{_AARCH64_ROOT}/lib/libc.so.6", "libc6-arm64-cross")
    ),
    "musllinux-x86_64": System((), (_MUSL.format("x86_64"), "musl"), ("-dynamic",)),
    "musllinux-aarch64": System(("qemu-aarch64",), (_MUSL.format("aarch64"), "musl:arm64"), ("-dynamic",)),
    "windows-x86_64": System(("wine",), ("wine", "wine"), environment=(("WINEDEBUG", "-all"),)),
}


def check(target: str, wheel: Path, folder: Path) -> str:
    """What the tests say of one target's library. Raises: Failed: it gives other bytes, or does not start."""
    if reason := why_not(target):
        return f"{target}: not run: {reason}"
    program = build(target, wheel, folder)
    system = SYSTEMS[target]
    environment = {"LORAFORMAT_DRIVER": shlex.join([*system.command, str(program)]), **dict(system.environment)}
    tests = (TESTS / "test_compiled.py", TESTS / "test_codes.py")  # the others need PyTorch
    said = run(sys.executable, "-m", "pytest", "-q", "-rs", *tests, "-k", "another_machine", **environment)
    last = said.strip().splitlines()[-1]
    if "passed" not in last or "skipped" in last:
        raise Failed(f"{target}: {last}")
    return f"{target}: {last}"


def missing(which: Callable[[str], str | None] = shutil.which) -> list[str]:
    """What this machine lacks to run the libraries that a release must run."""
    found = {target: why_not(target, which) for target in TARGETS if target not in ELSEWHERE}
    return [f"{target}: {reason}" for target, reason in found.items() if reason]


def why_not(target: str, which: Callable[[str], str | None] = shutil.which) -> str:
    """What this machine lacks to run a program for a target; empty if nothing."""
    if target not in SYSTEMS:
        return "no emulator of its system"
    system = SYSTEMS[target]
    needed = [system.needs] if system.needs else []
    if system.command[:1] == ("qemu-aarch64",):
        needed.append(("qemu-aarch64", "qemu-user"))
    elif platform.system() != "Linux" or platform.machine() != TARGETS[target].machine:
        return f"needs Linux on {TARGETS[target].machine}"
    missing = [package for name, package in needed if not (Path(name).exists() if "/" in name else which(name))]
    return f"no {' and no '.join(missing)}" if missing else ""


def build(target: str, wheel: Path, folder: Path) -> Path:
    """The driver for a target, beside the library that the wheel holds."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        library = folder / Path(KERNEL).name
        library.write_bytes(archive.read(KERNEL))
    program = folder / "driver.exe" if target.startswith("windows") else folder / "driver"
    linked = library
    if target.startswith("windows"):  # the linker tells a library from a program by its ending
        linked = library.with_suffix(".dll")
        shutil.copyfile(library, linked)
    zig = ("python-zig", "cc", "-target", TARGETS[target].triple)
    # Optimized, since otherwise Zig adds checks whose own library needs a newer system.
    run(*zig, "-O2", *SYSTEMS[target].options, TESTS / "driver.c", linked, "-o", program)
    if not program.exists():
        raise Failed(f"{target}: no driver was made")
    return program
