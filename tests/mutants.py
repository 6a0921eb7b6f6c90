"""Changes the source in one place at a time and sees whether a test notices: `make mutants`.

    python tests/mutants.py --trace              which tests run which lines, and how long each takes (the whole suite)
    python tests/mutants.py --seed 1a2b3c4d      draws mutants, runs the tests that cover each, prints a table

The places and the changes are cosmic-ray's; a mutant is killed where a test that covers its line fails. A line that
runs when its module is imported, in a table or a signature, is covered by all tests that run anything of the file, and
by those that hold the tables against lists of their own. Tests run in a process that is forked from one which has
imported the heavy libraries, on a copy of the package with the change in it, the quickest first, for at most
`--most-seconds` of what they took when they were traced.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
AREAS = {
    "merger": "loraformat/merger/**/*.py",
    "algebra": "loraformat/algebra/*.py",
    "matching": "loraformat/matching/*.py",
    "readers": "loraformat/formats/**/read.py",
    "tuners": "loraformat/formats/peft/**/*.py",
    "rules": "loraformat/rules/**/*.py",
}
TRACES, DURATIONS = ROOT / "build" / "coverage", ROOT / "build" / "durations.json"
# Operators that only make what is a type, or text for people, different.
_LEFT_OUT = ("VariableReplacer", "VariableInserter", "StringReplacer")
_ONE_RUN_S = 15  # to start, and to collect
# They read the source as text, so no trace says which lines they cover: each mutant meets them.
_READ_THE_SOURCE = ("tests/test_dataclasses.py",)
# They look at what a module holds once it is imported, without running anything of it.
_READ_TABLES = {"loraformat/rules/": ("tests/rules/test_tables.py",)}
_UNCOVERED = 64  # no code of pytest's: what reads the source passed, and no test runs the line
# 1: a test failed; 2: one could not be imported. Anything else is a fault of this script.
_ENDINGS = {0: "survived", 1: "killed", 2: "killed", _UNCOVERED: "no test covers it"}
_NOT_COLLECTED = 4  # pytest's exit code where a test is gone: one with a rule or a kind as its parameter


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change: the n-th place of an operator in a file."""

    area: str
    file: str
    operator: str
    occurrence: int
    line: int


class Durations:
    """A plugin of pytest: seconds of each test, by its name."""

    def __init__(self) -> None:
        self.found: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: object) -> None:
        self.found[report.nodeid] += report.duration  # type: ignore[attr-defined]

    def pytest_sessionfinish(self) -> None:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            known = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
            DURATIONS.write_text(json.dumps({**known, **self.found}))


def trace(arguments: Sequence[str]) -> int:
    """Run the suite, and note which lines each test runs."""
    import pytest

    TRACES.parent.mkdir(exist_ok=True)
    os.environ["COVERAGE_FILE"] = str(TRACES)
    options = [
        "--cov=loraformat",
        "--cov-append",
        "--cov-context=test",
        "--cov-report=",
        "-n",
        "2",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    return int(pytest.main([*options, *arguments], plugins=[Durations()]))


def candidates() -> Iterator[Mutant]:
    """Every change that the operators can make, annotations left out."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    names = [name for name in plugins.operator_names() if not name.endswith(_LEFT_OUT)]
    operators = [(name, plugins.get_operator(name)()) for name in sorted(names)]
    seen: set[str] = set()
    for area, pattern in AREAS.items():
        for path in sorted(ROOT.glob(pattern)):
            file = path.relative_to(ROOT).as_posix()
            if file in seen:
                continue
            seen.add(file)
            source = path.read_text(encoding="utf-8")
            nodes, unseen = list(ast_nodes(get_ast(source))), _for_type_checkers(source)
            for name, operator in operators:
                occurrence = 0
                for node in nodes:
                    for position in operator.mutation_positions(node):
                        if not _is_annotation(node) and position[0][0] not in unseen:
                            yield Mutant(area, file, name, occurrence, position[0][0])
                        occurrence += 1


def _for_type_checkers(source: str) -> set[int]:
    """The lines under `if TYPE_CHECKING:`, and that line itself: no program runs them."""
    blocks = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {line for node in blocks for line in range(node.lineno, (node.body[-1].end_lineno or 0) + 1)}


def _is_annotation(node: object) -> bool:
    while node is not None:
        kind = getattr(node, "type", "")
        parent = getattr(node, "parent", None)
        if kind in ("annassign", "tfpdef"):
            return True
        if getattr(parent, "type", "") == "funcdef" and getattr(parent, "annotation", None) is node:
            return True
        node = parent
    return False


def drawn(seed: int, count: int) -> list[Mutant]:
    """A sample, as many of each file as it has lines that can change: first a line, then a change of it."""
    by_line: dict[tuple[str, int], list[Mutant]] = defaultdict(list)
    for mutant in candidates():
        by_line[mutant.file, mutant.line].append(mutant)
    chance = random.Random(seed)
    lines = sorted(by_line)
    chance.shuffle(lines)
    mutants: list[Mutant] = []
    for line in lines:
        if len(mutants) == count:
            break
        changes = by_line[line]
        chance.shuffle(changes)
        # Some changes are not valid Python: an operator takes the `*` between parameters for a product, say.
        valid = next((mutant for mutant in changes if _is_python(difference(mutant)[0])), None)
        mutants += [valid] if valid is not None else []
    return mutants


def _is_python(source: str) -> bool:
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def covering(mutants: Sequence[Mutant]) -> Mapping[Mutant, list[str]]:
    """The tests that run the line of each mutant, the quickest first."""
    from coverage import CoverageData

    data = CoverageData(str(TRACES))
    data.read()
    durations = json.loads(DURATIONS.read_text())
    found: dict[Mutant, list[str]] = {}
    for mutant in mutants:
        by_line = data.contexts_by_lineno(str(ROOT / mutant.file))
        lines = by_line.keys() if _runs_at_import(mutant) else _statement_at(mutant)
        tests = {context.partition("|")[0] for line in lines for context in by_line.get(line, [])} & durations.keys()
        found[mutant] = sorted(tests, key=lambda name: (durations[name], name))
    return found


def _statement_at(mutant: Mutant) -> range:
    """The lines of the innermost statement on a line, of which a trace may have only some; without its body."""
    found = range(mutant.line, mutant.line + 1)
    for node in ast.walk(ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.stmt):
            continue
        body = getattr(node, "body", None) or getattr(node, "cases", None)
        inner = getattr(body[0], "pattern", body[0]).lineno if body else (node.end_lineno or 0) + 1
        lines = range(min(_decorated_at(node)), max(inner, node.lineno + 1))
        if mutant.line in lines:
            found = lines
    return found


def _decorated_at(node: ast.stmt) -> list[int]:
    return [node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]


def _runs_at_import(mutant: Mutant) -> bool:
    """Whether a line is outside of all functions: a table, a decorator, a default."""
    tree = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return not any(min(_decorated_at(body[0])) <= mutant.line <= (body[-1].end_lineno or 0) for body in bodies)


def _reads_it(mutant: Mutant) -> tuple[str, ...]:
    """The files of tests that a mutant meets whatever was traced."""
    tables = [tests for start, tests in _READ_TABLES.items() if mutant.file.startswith(start)]
    return (*_READ_THE_SOURCE, *(name for tests in tables if _runs_at_import(mutant) for name in tests))


def lived(results: Path) -> set[tuple[str, int, str]]:
    """File, line and change of the mutants that no test killed, out of earlier results."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {(one["file"], one["line"], one["change"]) for one in lines if one["ended"] != "killed"}


def difference(mutant: Mutant) -> tuple[str, str]:
    """(the changed source, the change as a diff)."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    before = (ROOT / mutant.file).read_text(encoding="utf-8")
    after = mutate_code(before, plugins.get_operator(mutant.operator)(), mutant.occurrence)
    assert after is not None
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return after, "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def within(tests: Sequence[str], most_seconds: float) -> list[str]:
    """The tests that together took at most so long."""
    durations, chosen, total = json.loads(DURATIONS.read_text()), [], 0.0
    for name in tests:
        total += durations[name]
        if chosen and total > most_seconds:
            break
        chosen.append(name)
    return chosen


def start(mutant: Mutant, source: str, tests: Sequence[str], folder: Path) -> int:
    """Fork a process that runs tests on a copy of the package with the change; its number."""
    shutil.copytree(ROOT / "loraformat", folder / "loraformat", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "schemas").symlink_to(ROOT / "schemas")
    (folder / mutant.file).write_text(source, encoding="utf-8")
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        os.setsid()
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        import pytest

        quiet = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
        base = f"--basetemp={folder / 'tmp'}"
        options = ["-x", "-q", base, "-p", "no:cacheprovider", "-W", quiet]
        code = int(pytest.main([*_reads_it(mutant), *options]))
        if not tests and code == 0:
            code = _UNCOVERED
        code = code or int(pytest.main([*tests, *options]))
        if code == _NOT_COLLECTED:
            files = dict.fromkeys(test.partition("::")[0] for test in tests)
            code = int(pytest.main([*files, *options]))
    except BaseException:  # noqa: BLE001 - a fork must not run on
        traceback.print_exc()
    finally:
        os._exit(code)


def run(mutants: Mapping[Mutant, list[str]], jobs: int, most_seconds: float, out: Path) -> list[dict[str, object]]:
    """How each mutant ended, as it is known; written to `out` line by line."""
    waiting = list(mutants.items())
    running: dict[int, tuple[Mutant, str, float, float, Path]] = {}
    results: list[dict[str, object]] = []

    def note(mutant: Mutant, ended: str, change: str) -> None:
        results.append(
            {"file": mutant.file, "line": mutant.line, "area": mutant.area, "ended": ended, "change": change}
        )
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(results[-1]) + "\n")

    durations = json.loads(DURATIONS.read_text())
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant, tests = waiting.pop()
            source, change = difference(mutant)
            chosen = within(tests, most_seconds)
            folder = Path(tempfile.mkdtemp(prefix="mutant-"))
            limit = time.monotonic() + _ONE_RUN_S * 4 + 6 * sum(durations[name] for name in chosen)
            running[start(mutant, source, chosen, folder)] = (mutant, change, limit, time.monotonic(), folder)
        _reap(running, note)
    return results


def _reap(running: dict[int, tuple[Mutant, str, float, float, Path]], note: object) -> None:
    time.sleep(0.05)
    for number in list(running):
        mutant, change, limit, _, folder = running[number]
        done, status = os.waitpid(number, os.WNOHANG)
        if not done and time.monotonic() < limit:
            continue
        ended = "timeout"
        if done:
            code = os.waitstatus_to_exitcode(status)
            ended = _ENDINGS.get(code, "not run")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(number, signal.SIGKILL)
        if not done:
            os.waitpid(number, 0)
        del running[number]
        note(mutant, ended, change)  # type: ignore[operator]
        shutil.rmtree(folder, ignore_errors=True)


def table(results: Sequence[Mapping[str, object]]) -> str:
    """The figures by area, then every mutant that lives."""
    lines = ["area       mutants  killed  survived  timeout  uncovered"]
    ended = defaultdict(Counter)  # type: ignore[var-annotated]
    for one in results:
        ended[one["area"]][one["ended"]] += 1
        ended["all"][one["ended"]] += 1
    for area in (*AREAS, "all"):
        counts = ended[area]
        figures = (counts["killed"], counts["survived"], counts["timeout"], counts["no test covers it"])
        lines.append(
            f"{area:<10} {sum(counts.values()):>7} {figures[0]:>7} {figures[1]:>9} {figures[2]:>8} {figures[3]:>10}"
        )
    counts = ended["all"]
    judged = sum(counts.values()) - counts["timeout"]
    lines.append(f"killed: {counts['killed'] / max(1, judged):.1%} of {judged}, timeouts apart")
    for one in results:
        if one["ended"] not in ("killed", "timeout"):
            lines += ["", f"{one['file']}:{one['line']}: {one['ended']}", str(one["change"])]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true", help="run the suite and note what each test covers")
    parser.add_argument("--seed", default="0", help="first eight hexadecimal digits of a commit")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--most-seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.jsonl")
    parser.add_argument("--again", type=Path, help="earlier results: only the mutants that lived")
    arguments, rest = parser.parse_known_args()
    if arguments.trace:
        return trace(rest)
    import peft  # noqa: F401 - imported once, for all that are forked
    import safetensors.torch  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    os.chdir(ROOT)
    sample = drawn(int(arguments.seed, 16), arguments.count)
    if arguments.again is not None:
        left = lived(arguments.again)
        sample = [one for one in sample if (one.file, one.line, difference(one)[1]) in left]
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.unlink(missing_ok=True)
    mutants = covering(sample)
    print(table(run(mutants, arguments.jobs, arguments.most_seconds, arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
