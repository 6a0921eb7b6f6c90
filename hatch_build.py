"""Generates the validators of the schemas, and compiles the merger's inner loop where gcc is there.

Without the inner loop the package is pure Python and merges more slowly.
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

SOURCE = Path("loraformat/merger/compute/kernel.c")
LIBRARY = Path("loraformat/merger/compute/_kernel.so")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared")


class BuildHook(BuildHookInterface[Any]):
    """Puts what is made at build time into the wheel, or for an editable installation beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the validators; compile the kernel and name the platform, or on failure leave a pure wheel."""
        del version
        root = Path(self.root)
        made = runpy.run_path(str(root / "schemas" / "compile.py"))["write"](root)
        build_data["artifacts"] += [f"/{path.as_posix()}" for path in made]
        (root / LIBRARY).unlink(missing_ok=True)
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
        if not compiler or sys.platform != "linux" or platform.machine() != "x86_64":
            return
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / LIBRARY.name
            command = [*compiler.split(), *FLAGS, "-o", str(made), str(root / SOURCE)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own compiler call
            except (OSError, subprocess.CalledProcessError) as error:
                self.app.display_warning(f"the merge kernel was not built, merges will be slower: {error}")
                return
            shutil.copyfile(made, root / LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")
