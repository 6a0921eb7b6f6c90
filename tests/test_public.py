"""The face of the library: what is exported, that it is documented, typed, and that its examples run."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import loraformat
from loraformat import errors
from loraformat.errors import LoraFormatError
from loraformat.model import updates
from loraformat.model.results import verbs

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "python.md"
VERBS = (
    "inspect",
    "validate",
    "convert",
    "merge",
    "diff",
    "plot",
    "estimate",
    "verify",
    "explain",
    "resize",
    "combine",
    "scale",
    "pick",
    "extract",
    "unmerge",
    "ablate",
    "init",
)
OTHERS = (
    *("Adapter", "AdapterConfig", "Assumptions", "BaseWeight", "Checkpoint", "DType", "Finding", "FindingLocation"),
    *("LazyTensor", "Report", "Severity", "View", "delta", "load_adapter", "open_checkpoint", "save_adapter"),
)

# Data that is got from a call and not made by users: their docstrings list the fields, the calls have the examples.
PLAIN = {
    *("AdapterConfig", "DType", "Finding", "FindingLocation", "Severity", "Summary", "__version__", "Update"),
    *(update.__name__ for update in get_args(updates.Update)),
    "Magnitude",
    *(result.__name__ for result in get_args(verbs.Result)),
    *(
        "Checked",
        "FactorChange",
        "FieldDifference",
        "IgnoredFinding",
        "MemoryEstimate",
        "MergedAdapter",
        "Retention",
        "RoundTrip",
        "UndoneWeight",
    ),
    *("Skipped", "TableRecord", "TargetEstimate", "WeightDifference", "WeightRecord"),
}


def exceptions() -> list[type[LoraFormatError]]:
    return [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, LoraFormatError)]


def test_what_the_package_is_about_is_exported() -> None:
    wanted = {*VERBS, *OTHERS, *(each.__name__ for each in exceptions())}
    wanted |= {each.__name__ for each in (*get_args(updates.Update), *get_args(verbs.Result))}
    assert not wanted - set(loraformat.__all__)


def test_the_names_are_sorted_and_all_there() -> None:
    assert loraformat.__all__ == sorted(set(loraformat.__all__))
    assert dir(loraformat) == loraformat.__all__
    assert all(getattr(loraformat, name) is not None for name in loraformat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        loraformat.marge  # noqa: B018


def test_type_checkers_see_the_names_that_are_there_at_run_time() -> None:
    tree = ast.parse((ROOT / "loraformat" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert seen == loraformat._HOMES
    assert {*seen, "__version__"} == set(loraformat.__all__)


CONSUMER = """
import math
from pathlib import Path

import loraformat
from loraformat import Adapter, Checkpoint, LoraFormatError, LowRank, MergeResult, Report, UsageError


def norm(adapter: Adapter, weight: str, base: Checkpoint | None = None) -> float:
    delta = adapter.delta(weight, base, dtype="float64")
    return math.sqrt(float((delta * delta).sum()))


def rank(adapter: Adapter) -> int:
    pairs = [update for chain in adapter.updates.values() for update in chain if isinstance(update, LowRank)]
    return max((pair.down.load().shape[0] for pair in pairs), default=0)


def retained(base: Path, adapter: Path, out: Path) -> float | None:
    try:
        report: Report = loraformat.merge(base, [adapter], out, alpha=1.0)
    except UsageError as error:
        print(error.code, error.location.file, error.hint)
        raise
    except LoraFormatError:
        return None
    assert isinstance(report.data, MergeResult)
    return report.data.retained


print(norm(loraformat.load_adapter(Path("x"), base=Path("y")), "w", loraformat.open_checkpoint(Path("y"))))
"""


def test_a_type_checker_takes_a_typed_program_and_sees_its_mistakes(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    wrong = CONSUMER.replace("alpha=1.0", "alpha='1'").replace("-> int", "-> str")
    assert wrong != CONSUMER
    for name, source in (("right.py", CONSUMER), ("wrong.py", wrong)):
        (tmp_path / name).write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-version=3.11"]
    done = subprocess.run([*command, "right.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "right.py" not in done.stdout, done.stdout + done.stderr
    assert '"alpha"' in done.stdout or 'incompatible type "str"' in done.stdout
    assert 'expected "str"' in done.stdout


@pytest.fixture
def _checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", sorted(set(loraformat.__all__) - PLAIN))
@pytest.mark.usefixtures("_checkout")
def test_the_example_of_a_public_name_runs(name: str) -> None:
    found = getattr(loraformat, name)
    if isinstance(found, type) and issubclass(found, LoraFormatError) and found is not LoraFormatError:
        return  # the base class shows how all of them are caught
    tests = doctest.DocTestFinder(exclude_empty=True).find(found, name, module=sys.modules[found.__module__])
    assert any(test.examples for test in tests), f"{name} has no example"
    for test in tests:
        report: list[str] = []
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
        assert not failed, "".join(report)


@pytest.mark.parametrize("name", loraformat.__all__)
def test_a_public_name_has_a_docstring(name: str) -> None:
    found = getattr(loraformat, name)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert inspect.getdoc(found)


def test_the_list_of_plain_data_names_nothing_else() -> None:
    assert not PLAIN - set(loraformat.__all__)


def test_the_python_page_has_every_public_name() -> None:
    page = PAGE.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", page, flags=re.DOTALL))
    assert not [name for name in loraformat.__all__ if not re.search(rf"\b{name}\b", code)]


@pytest.mark.usefixtures("_checkout")
def test_the_python_page_runs_as_it_stands() -> None:
    page = PAGE.read_text(encoding="utf-8")
    test = doctest.DocTestParser().get_doctest(page.replace("```", ""), {}, "python.md", str(PAGE), 0)
    assert len(test.examples) > 30
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert not failed, "".join(report)
