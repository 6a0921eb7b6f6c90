"""The JSON Schemas of input and output: load one, check a value against it.

The validators are Python that schemas/compile.py generates from the schemas when the package is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

from loraformat.diagnostics import json_path

if TYPE_CHECKING:
    from pathlib import Path

Place: TypeAlias = "tuple[str | int, ...]"

SUFFIX = ".schema.json"
_LONGEST = 80


class Fault(Exception):
    """One place that breaks a schema, as a generated validator finds it.

    Attributes:
        name: `data`, and the keys and indices that lead to the place: `data.rank_pattern.q_proj`, `data.groups[0]`.
        value: what stands there.
        keyword, stated: of the schema, and its value where that is short.
        description: what the schema expects, in words; None where it does not say.
    """

    def __init__(self, name: str, value: object, keyword: str, stated: object, description: str | None) -> None:
        super().__init__(name)
        self.name, self.value, self.keyword, self.stated, self.description = name, value, keyword, stated, description

    def messages(self) -> Iterator[str]:
        """What is wrong, a message for each missing key."""
        if self.keyword == "required":
            assert isinstance(self.stated, list)
            assert isinstance(self.value, dict)
            yield from (f"'{key}' is a required property" for key in self.stated if key not in self.value)
            return
        found = json.dumps(self.value, ensure_ascii=True, default=str)
        shown = found if len(found) <= _LONGEST else f"{found[:_LONGEST]}…"
        if self.description:
            yield f"expected {self.description}, found {shown}"
        else:
            stated = "" if self.stated is None else f" {json.dumps(self.stated)}"
            yield f"{self.keyword}{stated} is violated by {shown}"


class Faults(Exception):
    """All faults of one value."""

    def __init__(self, errors: list[Fault]) -> None:
        super().__init__(f"{len(errors)} faults")
        self.errors = errors


def names() -> tuple[str, ...]:
    """The schemas that there are: "native-config-1", "report" and so on."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in _folder().iterdir() if path.name.endswith(SUFFIX)))


@lru_cache(maxsize=32)
def load(name: str) -> dict[str, Any]:
    """The schema called `name`, parsed. Raises KeyError: there is none."""
    path = _folder() / f"{name}{SUFFIX}"
    if not path.is_file():
        raise KeyError(name)
    schema = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(schema, dict)
    return schema


def check(name: str, value: Mapping[str, Any] | list[Any]) -> Iterator[tuple[Place, str]]:
    """What breaks the schema called `name`: (keys and indices, none for the whole; what is wrong), sorted by place.

    Values are shown in part; nothing in `value` makes this slow, for our schemas have no patterns over free text.
    """
    try:
        _validator(name)(value)
    except Faults as found:
        errors = {(_path_of(fault, value), message) for fault in found.errors for message in fault.messages()}
        yield from sorted(errors, key=lambda error: (json_path(error[0]), error[1]))


@lru_cache(maxsize=32)
def _validator(name: str) -> Callable[[object], object]:
    module = name.replace("-", "_")
    try:
        return import_module(f"loraformat._validators.{module}").validate  # type: ignore[no-any-return]
    except ModuleNotFoundError:
        return _compiled(name)


def _compiled(name: str) -> Callable[[object], object]:
    """The validator, generated in memory: in a checkout that was never installed."""
    import runpy

    made: Callable[[object], object] = runpy.run_path(str(_folder() / "compile.py"))["validator_of"](load(name))
    return made


def _path_of(fault: Fault, value: object) -> Place:
    """Keys and indices to the value of a fault; a key may hold dots and brackets, so the value itself decides."""
    return next(_paths(fault.name.removeprefix("data"), value, fault.value), ())


def _paths(rest: str, value: object, wanted: object) -> Iterator[Place]:
    if not rest:
        if value is wanted:
            yield ()
        return
    steps: list[tuple[str, str | int, object]] = []
    if isinstance(value, dict):
        steps = [(f".{key}", key, item) for key, item in value.items()]
    elif isinstance(value, list):
        steps = [(f"[{number}]", number, item) for number, item in enumerate(value)]
    for start, key, item in steps:
        if rest.startswith(start):
            yield from ((key, *path) for path in _paths(rest[len(start) :], item, wanted))


def _folder() -> Path:
    """Inside the package where it is installed, beside it in a checkout."""
    from pathlib import Path

    package = Path(__file__).parent
    inside = package / "schemas"
    return inside if inside.is_dir() else package.parent / "schemas"
