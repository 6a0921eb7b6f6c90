"""Prints which settings and kinds of adapter each PEFT version knows, for loraformat/rules/runtimes.json.

Run: pip download --no-deps -d WHEELS peft==0.10.0 (and so on); python tests/derive_peft_versions.py WHEELS
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path


def fields_of(source: str, *names: str) -> set[str]:
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name in names]
    return {
        line.target.id
        for node in classes
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def kinds_of(source: str) -> set[str]:
    (kinds,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "PeftType")
    return {
        line.targets[0].id
        for line in kinds.body
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
    }


def version_of(wheel: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in wheel.name.split("-")[1].split("."))


def derive(wheels: list[Path]) -> dict[str, dict[str, str]]:
    """ "fields" and "kinds": name → the minor version that brought it; "" for the first one that is here."""
    since: dict[str, dict[str, str]] = {"fields": {}, "kinds": {}}
    for number, wheel in enumerate(sorted(wheels, key=version_of)):
        with zipfile.ZipFile(wheel) as archive:
            read = {
                name: archive.read(f"peft/{name}").decode()
                for name in ("tuners/lora/config.py", "config.py", "utils/peft_types.py")
            }
        minor = "" if number == 0 else ".".join(map(str, version_of(wheel)[:2]))
        found = fields_of(read["tuners/lora/config.py"], "LoraConfig")
        found |= fields_of(read["config.py"], "PeftConfigMixin", "PeftConfig")
        for kind, names in (("fields", found), ("kinds", kinds_of(read["utils/peft_types.py"]))):
            for name in names:
                since[kind].setdefault(name, minor)
    return {kind: dict(sorted(names.items())) for kind, names in since.items()}


if __name__ == "__main__":
    print(json.dumps(derive(list(Path(sys.argv[1]).glob("peft-*.whl"))), indent=2))
