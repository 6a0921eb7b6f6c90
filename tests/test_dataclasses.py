"""Data does not change once it is made: every dataclass is frozen and has slots, but for those that collect."""

from __future__ import annotations

import ast
from pathlib import Path

import loraformat

PACKAGE = Path(loraformat.__file__).parent
# Classes that sums, lines or tensors are collected in while a file is read or measured; none of them is public.
COLLECT = {
    "Built",
    "Cell",
    "Change",
    "Changes",
    "Likeness",
    "Page",
    "Pair",
    "Plan",
    "Preimages",
    "RawModule",
    "RawModules",
    "Recent",
    "Resolved",
    "Rows",
    "SignCounts",
    "Written",
    "Budget",
    "_Beside",
    "_Built",
    "_Found",
    "_Keys",
    "_Once",
    "_Seen",
    "_Sorted",
    "_Sums",
    "_Track",
}
# They keep what a cached_property computes, for which slots leave no room.
WITHOUT_SLOTS = {"Adapter", "Source", "Subject"}
KEYWORDS_ONLY = {
    "AdapterConfig",
    "BaseWeight",
    "Dialect",
    "Inputs",
    "PeftConfig",
    "Resources",
    "Rule",
    "Trust",
    "Tuner",
}


def dataclasses() -> dict[tuple[str, str], dict[str, bool]]:
    """(file, class) → the options of its decorator."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for decorator in node.decorator_list:
                    if ast.unparse(decorator).startswith("dataclass"):
                        options = decorator.keywords if isinstance(decorator, ast.Call) else []
                        name = path.relative_to(PACKAGE).as_posix()
                        found[name, node.name] = {each.arg: ast.literal_eval(each.value) for each in options}
    return found


def test_all_are_frozen_but_those_that_collect() -> None:
    mutable = {name for (_, name), options in dataclasses().items() if options.get("frozen") is not True}
    assert mutable == COLLECT


def test_all_have_slots_but_those_that_cache() -> None:
    assert {name for (_, name), options in dataclasses().items() if options.get("slots") is not True} == WITHOUT_SLOTS


def test_fields_of_wide_classes_are_given_by_name() -> None:
    named = {name for (_, name), options in dataclasses().items() if options.get("kw_only") is True}
    assert named >= KEYWORDS_ONLY
