"""Generates the validators of the schemas, compiles the loops of a merge, and lists what a wheel is made of.

The variable LORAFORMAT_WHEEL says which wheel is made. Unset: with loops for this machine where gcc or clang is there,
else without. `native`: the same, and it is an error where they cannot be made. `pure`: without. A name in `TARGETS` of
compile_loops.py: for that platform, with Zig. What pre-commit installs only validates, and is pure.

Without the loops the package is pure Python; it gives the same bytes and merges more slowly.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = Path("loraformat/arithmetic/_kernel.so")
SCHEMAS = "loraformat/schemas"
SBOM = "loraformat.cdx.json"


class BuildHook(BuildHookInterface[Any]):
    """Puts what is made at build time into the wheel, or for an editable installation beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the validators, the library and the bill of materials; name the platform that a library is for."""
        root = Path(self.root)
        made = runpy.run_path(str(root / "schemas" / "compile.py"))["write"](root)
        build_data["artifacts"] += [f"/{path.as_posix()}" for path in made]
        self.folder = tempfile.TemporaryDirectory()
        library = Path(self.folder.name) / LIBRARY.name
        tag = self._compile(library)
        if version == "editable":
            (root / LIBRARY).unlink(missing_ok=True)
            if tag:
                shutil.copyfile(library, root / LIBRARY)
        else:
            included = {path: f"{SCHEMAS}/{path.name}" for path in (root / "schemas").glob("*.json")}
            included |= {library: LIBRARY.as_posix()} if tag else {}
            build_data["force_include"] |= {str(path): name for path, name in included.items()}
        if tag:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{tag}"
        sbom = Path(self.folder.name) / SBOM
        content = bill_of_materials(self.metadata.core, self.metadata.version, library if tag else None)
        sbom.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        build_data["sbom_files"].append(str(sbom))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was only made for the wheel."""
        del version, build_data, artifact_path
        self.folder.cleanup()

    def _compile(self, library: Path) -> str:
        """Make the library; the platform that it is for, or nothing where the wheel is to be pure."""
        build = runpy.run_path(str(Path(self.root) / "compile_loops.py"))
        asked = os.environ.get("LORAFORMAT_WHEEL") or ("pure" if os.environ.get("PRE_COMMIT") == "1" else "")
        if asked in build["TARGETS"]:
            target = build["TARGETS"][asked]
            build["compile_for"](target, library)
            return str(target.platform)
        if asked not in ("", "native", "pure"):
            names = ", ".join(("native", "pure", *build["TARGETS"]))
            raise ValueError(f"LORAFORMAT_WHEEL: expected one of {names}, found {asked!r}")
        if asked == "pure":
            return ""
        compiler = build["compiler_of_this_machine"]()
        reason = "no compiler was found" if not compiler else "there are none for this processor"
        if compiler and build["loops_of"](platform.machine()):
            reason = build["why_not"](compiler, library)
        if not reason:
            return str(build["platform_tag"]())
        if asked == "native":
            raise RuntimeError(f"the loops of a merge were not built: {reason}")
        self.app.display_warning(f"the loops of a merge were not built, merges will be slower: {reason}")
        return ""


def bill_of_materials(project: Any, version: str, library: Path | None) -> dict[str, Any]:  # noqa: ANN401 - hatchling's
    """What a wheel contains and needs, as CycloneDX: our code and its library, and what is installed beside it.

    No code of others is in a wheel. What is needed has no version here: the installer chooses it.
    """
    own = f"pkg:pypi/{project.name}@{version}"
    needed = {
        re.split(r"[^\w.-]", text, maxsplit=1)[0].lower().replace("_", "-"): text for text in project.dependencies
    }
    parts: list[dict[str, Any]] = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}",
            "name": name,
            "purl": f"pkg:pypi/{name}",
            "scope": "required",
            "properties": [{"name": "requirement", "value": text}],
        }
        for name, text in sorted(needed.items())
    ]
    if library is not None:
        content = hashlib.sha256(library.read_bytes()).hexdigest()
        path = LIBRARY.as_posix()
        hashes = [{"alg": "SHA-256", "content": content}]
        parts.append({"type": "file", "bom-ref": path, "name": path, "hashes": hashes})
    licenses = [{"license": {"id": "Apache-2.0"}}]
    component = {
        "type": "application",
        "bom-ref": own,
        "name": project.name,
        "version": version,
        "purl": own,
        "licenses": licenses,
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": component},
        "components": parts,
        "dependencies": [{"ref": own, "dependsOn": [each["bom-ref"] for each in parts]}],
    }
