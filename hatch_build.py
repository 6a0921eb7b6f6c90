"""Compiles the merger's inner loop where gcc is there. Without it the package is pure Python and merges more slowly."""

from __future__ import annotations

import os
import platform
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


class KernelBuildHook(BuildHookInterface[Any]):
    """Puts the compiled kernel into the wheel, or for an editable installation beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name the platform; on failure say so and leave a pure wheel."""
        del version
        root = Path(self.root)
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
