"""docs/pictures/architecture.svg: the packages on their floors and the rooms of the merger, from import contracts."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
WIDTH, FLOOR, BOX, GAP, LEFT = 860, 46, 30, 10, 90

WORDS = {
    "__main__": "start",
    "cli": "words",
    "jobs": "verbs",
    "merger": "checkpoints",
    "io": "adapters",
    "containers | formats | rules | report": "files, judgment",
    "algebra | matching": "figures, names",
    "arithmetic": "products, sums",
    "model | naming | storage | engine | schema": "things, bytes",
    "strict_yaml": "settings",
    "budget | extras | machine | strict_json": "limits",
    "_version": "version",
    "errors": "errors",
    "diagnostics": "findings",
}


def floors(name: str) -> list[str]:
    """The layers of an import contract, the top one first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    found: list[str] = next(one["layers"] for one in settings["contracts"] if one["name"] == name)
    return [layer for layer in found if not layer.startswith("(")]  # made when the package is built


def drawing() -> str:
    """The picture as SVG text; a floor may import those below it."""
    outer, inner = floors("Data flows one way"), floors("A merge flows one way")
    height = 2 * GAP + 26 + FLOOR * len(outer)
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    style = 'font-family="sans-serif" font-size="13" role="img"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>',
        "<title>The packages of loraformat on their floors; each imports from the floors below it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="14" y="22" fill="#555">imports go down</text>',
        '<text x="632" y="22" fill="#555">inside merger</text>',
    ]
    for number, layer in enumerate(outer):
        top = GAP + 26 + number * FLOOR
        parts += [
            f'<line x1="0" x2="{WIDTH - 250}" y1="{top + BOX + 8}" y2="{top + BOX + 8}" stroke="#ddd"/>',
            f'<text x="14" y="{top + 20}" fill="#777" font-size="11">{WORDS[layer]}</text>',
            *_boxes(layer, LEFT + 20, top, "#eef3fb", 500),
        ]
    for number, layer in enumerate(inner):
        top = GAP + 26 + number * (FLOOR + 14)
        parts += _boxes(layer, 632, top, "#f3f7ec", 214)
        if number + 1 < len(inner):
            middle = 632 + 107
            parts.append(
                f'<path d="M{middle} {top + BOX} v{FLOOR + 14 - BOX - 2} m-5 -7 l5 7 l5 -7" fill="none" stroke="#888"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _boxes(layer: str, left: int, top: int, fill: str, width: int) -> list[str]:
    names = [name.strip() for name in layer.split("|")]
    each = (width - GAP * (len(names) - 1)) // len(names)
    found = []
    for number, name in enumerate(names):
        x = left + number * (each + GAP)
        found += [
            f'<rect x="{x}" y="{top}" width="{each}" height="{BOX}" rx="4" fill="{fill}" stroke="#8aa"/>',
            f'<text x="{x + each // 2}" y="{top + 20}" text-anchor="middle">{name}</text>',
        ]
    return found
