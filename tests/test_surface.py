"""The public surface is the committed list of it: nothing that others rely on changes by accident."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scripts import script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def surface() -> ModuleType:
    return script("docs/surface.py")


def test_the_package_has_what_the_list_says(surface: ModuleType) -> None:
    gone, new = surface.differences((ROOT / "docs" / "surface.md").read_text(encoding="utf-8"), surface.page())
    listed = "".join(f"\n- {line}" for line in gone) + "".join(f"\n+ {line}" for line in new)
    severities = [line for line in gone if line.startswith("Codes: ") and " > " in line]
    assert gone == severities, f"gone or changed: what is removed must be deprecated first (docs/stability.md){listed}"
    assert not gone, f"another severity: docs/stability.md says which version may have it; run docs/surface.py{listed}"
    assert not new, f"new: run `python docs/surface.py`, and add a line to CHANGELOG.md{listed}"


def test_every_kind_of_promise_is_on_the_list(surface: ModuleType) -> None:
    page = surface.page()
    for line in (
        "    --max-lora-rank INTEGER",
        "130: KeyboardInterrupt",
        "LF202 rank-mismatch\n    error",
        "report.schema.json: loraformat.report/1",
        "    #files/nbytes: integer",
        '    /job: "copy"|"dequantize"|"merge"',
        "[validate]: select, ignore, target, max_lora_rank, fail_on, per_path",
        "LORAFORMAT_LOOP",
        "torch",
        "action input fail-on = error",
        "hook loraformat-validate",
        "class StorageError(LoraFormatError): LF020 storage-error",
        "load_adapter()\n    1 uri: Location\n    base?: Location | Checkpoint | None = None",
    ):
        assert f"\n{line}\n" in page


def sample(first: int, *, second: str = "a", third: tuple[int, ...] = ()) -> bool:
    return bool(first or second or third)


def test_arguments_have_types_and_defaults(surface: ModuleType) -> None:
    assert list(surface._arguments(sample)) == [
        "1 first: int",
        "second?: str = 'a'",
        "third?: tuple[int, ...]",
    ]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "integer"}, "integer"),
        ({"type": ["array", "null"], "items": {"type": "string"}}, "array of string | null"),
        ({"enum": ["b", "a", None]}, '"a"|"b"|null'),
        ({"const": 3}, "3"),
        ({"$ref": "#/$defs/digest"}, "#digest"),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/x"}]}, "string | #x"),
        (True, "anything"),
    ],
)
def test_a_property_has_its_type(surface: ModuleType, schema: object, said: str) -> None:
    assert surface._type(schema) == said


@pytest.mark.parametrize(
    ("before", "after", "gone", "new"),
    [
        ("## A\nx\n    one\n", "## A\nx\n    one\n    two\n", [], ["A: x > two"]),
        ("## A\nx\n    one\ny\n", "## A\nx\ny\n    one\n", ["A: x > one"], ["A: y > one"]),
        ("## A\nx\n## B\n", "## A\n## B\nx\n", ["A: x"], ["B: x"]),
    ],
)
def test_a_change_is_named_with_its_place(
    surface: ModuleType, before: str, after: str, gone: list[str], new: list[str]
) -> None:
    assert surface.differences(before, after) == (gone, new)
