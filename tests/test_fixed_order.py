"""Values that end up in a file are computed in one fixed order, by operations that are the same on every machine.

numpy's products and sums go by the processor, the memory layout and the size; so do its transcendental functions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "loraformat"
FOLDERS = ("formats", "matching", "merger/compute", "merger/plan", "merger/write")
FILES = ("merger/dense_delta.py", "merger/preview.py")

PRODUCTS = {"dot", "einsum", "inner", "linalg", "matmul", "tensordot", "vdot"}
SUMS = {"average", "cumprod", "cumsum", "mean", "nansum", "norm", "prod", "std", "sum", "trace", "var"}
UFUNC_SUMS = {"accumulate", "reduce", "reduceat"}
FUNCTIONS = {"cbrt", "cos", "cosh", "erf", "exp", "exp2", "expm1", "log", "log10", "log1p", "log2", "pow", "power"}
MORE_FUNCTIONS = {"arctan", "arctan2", "fft", "logaddexp", "sigmoid", "sin", "sinh", "softmax", "tan", "tanh"}
BANNED = PRODUCTS | SUMS | UFUNC_SUMS | FUNCTIONS | MORE_FUNCTIONS
# Products of integers: sizes of shapes.
EXACT = {"math.prod"}

# (file, function) → why it may.
_FACTORIZATION = "no fixed order is at hand; docs/merge.md names it"
_DEVICE = "on another processor the last place may differ; docs/merge.md says so"
ALLOWED: dict[tuple[str, str], str] = {
    ("merger/compute/kinds/base_dependent.py", "part_of_base"): _FACTORIZATION,
    ("merger/compute/kinds/base_dependent.py", "_inverse"): _FACTORIZATION,
    **{
        ("merger/compute/cuda.py", name): _DEVICE
        for name in (
            "",
            "add",
            "_on_device",
            "_own_stream",
            "pinned_memory",
            "round_nearest",
            "_tensor_of",
            "_tally_of",
        )
    },
    ("merger/compute/windows.py", ""): "the type of a device",
}


def breaches(source: str) -> Iterator[tuple[str, str]]:
    """(the function it stands in, what it is) of all that the law forbids."""
    yield from _walk(ast.parse(source), "")


def _walk(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        function = node.name
    match node:
        case ast.BinOp(op=ast.MatMult()) | ast.AugAssign(op=ast.MatMult()):
            yield function, "@"
        case ast.Attribute(attr=name) if name in BANNED and ast.unparse(node) not in EXACT:
            yield function, ast.unparse(node)
        case ast.Import(names=names) if any(name.name.split(".")[0] == "torch" for name in names):
            yield function, "import torch"
        case ast.ImportFrom(module=str(module), names=names):
            banned = [name.name for name in names if module in ("math", "numpy") and name.name in BANNED - {"prod"}]
            yield from ((function, f"from {module} import {name}") for name in banned)
            if module.split(".")[0] == "torch":
                yield function, "from torch import"
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, function)


SOURCES = sorted(
    [*(path for folder in FOLDERS for path in (PACKAGE / folder).rglob("*.py")), *map(PACKAGE.joinpath, FILES)]
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_computed_by_what_differs_between_machines(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    found = [(function, what) for function, what in breaches(path.read_text()) if (name, function) not in ALLOWED]
    assert not found, f"{name}: {found}; loraformat.arithmetic has products, sums and functions in a fixed order"


def test_what_is_allowed_is_there() -> None:
    used = {(name, function) for name, function in ALLOWED if function in dict(breaches((PACKAGE / name).read_text()))}
    assert used == set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        *("a @ b", "a @= b", "np.dot(a, b)", "a.dot(b)", "np.einsum('ij->j', a)", "a.sum()", "np.sum(a)", "a.mean(0)"),
        *("np.linalg.inv(a)", "np.linalg.norm(a)", "np.add.reduce(a)", "a.prod()", "np.exp(a)", "math.cos(a)"),
        *("f = np.tanh", "import torch", "from torch import nn", "from math import exp", "from numpy import dot"),
    ],
)
def test_a_breach_is_seen(line: str) -> None:
    assert [function for function, _ in breaches(f"def f(a, b):\n    {line}\n")] == ["f"] * (1 + ("linalg.n" in line))


@pytest.mark.parametrize("line", ["math.prod(a)", "a * b + a / b", "sum(a)", "np.sqrt(a)", "np.add.at(a, b, 1)"])
def test_what_is_exact_is_no_breach(line: str) -> None:
    assert not list(breaches(f"def f(a, b):\n    {line}\n"))
