"""Generates the validators of the schemas, and compiles the loops of a merge where gcc or clang is there.

Without the compiled loops the package is pure Python; it gives the same bytes and merges more slowly.
"""

from __future__ import annotations

import platform
import runpy
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = Path("loraformat/arithmetic/_kernel.so")


class BuildHook(BuildHookInterface[Any]):
    """Puts what is made at build time into the wheel, or for an editable installation beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the validators; compile the loops and name the platform, or on failure leave a pure wheel."""
        del version
        root = Path(self.root)
        made = runpy.run_path(str(root / "schemas" / "compile.py"))["write"](root)
        build_data["artifacts"] += [f"/{path.as_posix()}" for path in made]
        (root / LIBRARY).unlink(missing_ok=True)
        build = runpy.run_path(str(root / "compile_loops.py"))
        compiler = build["compiler_of_this_machine"]()
        if not compiler or not build["loops_of"](platform.machine()):
            return
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / LIBRARY.name
            reason = build["why_not"](compiler, library)
            if reason:
                self.app.display_warning(f"the loops of a merge were not built, merges will be slower: {reason}")
                return
            shutil.copyfile(library, root / LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")
