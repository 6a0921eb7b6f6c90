"""Laws that import-linter cannot hold: who owns which library, how long a file is, what is never called."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "loraformat"
GENERATED = PACKAGE / "_validators"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != GENERATED)
CODE = [
    path
    for folder in ("loraformat", "tests", "fixtures", "docs", "benchmarks", "web")
    for path in (ROOT / folder).rglob("*.py")
    if path.parent != GENERATED
]

OWNERS = {
    "boto3": ("storage/s3/client.py",),
    "botocore": ("storage/s3/client.py",),
    "click": ("cli/",),
    "fcntl": ("storage/platform.py",),
    "huggingface_hub": ("storage/hub/",),
    "rich": ("report/terminal/text.py",),
    "jinja2": ("report/page/html.py",),
    "matplotlib": ("report/page/figure.py",),
    "yaml": ("strict_yaml.py",),
}
BANNED_IMPORTS = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "transformers",
    "peft",
    "subprocess",
    "marshal",
    "shelve",
}
BANNED_CALLS = {
    "import_module",
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "os.system",
    "os.popen",
    "importlib.import_module",
}
# Commands, public names, PEFT's tuners and quantization schemes are resolved on first use, from constants in the same
# file.
LAZY_TABLES = {
    "__init__.py",
    "cli/__init__.py",
    "containers/quantized/recoding/encoder.py",
    "containers/quantized/scheme.py",
    "formats/__init__.py",
    "formats/peft/tuners/__init__.py",
    "schema.py",
}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def calls(tree: ast.AST) -> Iterator[str]:
    return (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported; not those under TYPE_CHECKING."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            waiting += [*node.body, *node.orelse]
        elif isinstance(node, (ast.Try, ast.With)):
            waiting += node.body


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_longer_than_600_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_no_two_test_modules_have_one_name() -> None:
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


FOLDERS = sorted({path.parent for path in SOURCES})
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_no_folder_has_more_than_14_files(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix not in (".so", ".pyc")]
    assert len([path for path in files if path.name != "py.typed"]) <= 14


def test_every_room_is_on_the_page_and_every_room_of_the_page_is_there() -> None:
    rooms = {relative(folder) for folder in FOLDERS} - {"."}
    assert set(re.findall(r"^\| `([a-z0-9_/]+)` \| ", ARCHITECTURE, re.MULTILINE)) == rooms


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`((?:[a-z0-9_]+/)+[a-z_]+\.(?:py|json|svg))`", ARCHITECTURE))
    assert len(named) > 20
    assert not {name for name in named if not ((PACKAGE / name).is_file() or (ROOT / name).is_file())}


PACKAGES = {
    ".".join(path.parent.relative_to(ROOT).parts): path
    for path in SOURCES
    if path.name == "__init__.py" and path.parent != PACKAGE
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in SOURCES}


def modules_imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, whole or names of them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in names)


def members_needed() -> dict[str, set[str]]:
    """Package → its modules and packages that modules outside of it import."""
    needed: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for path in SOURCES:
        for target in modules_imported(path):
            parts = target.split(".")
            for depth in range(2, len(parts)):
                package = ".".join(parts[:depth])
                if not f"{module_name(path)}.".startswith(f"{package}."):
                    needed[package].add(parts[depth])
    return needed


NEEDED = members_needed()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_all_that_others_may_use(package: str) -> None:
    """What is not in `__all__` is the package's own; a module that others import is in it."""
    home = importlib.import_module(package)
    assert isinstance(home.__all__, list)
    assert not NEEDED[package] - set(home.__all__), "add it to __all__, or do not reach into the package"
    assert not [name for name in home.__all__ if not hasattr(home, name) and f"{package}.{name}" not in MODULES]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_library_has_one_door(path: Path) -> None:
    used = {name.partition(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")))}
    strangers = {
        library for library, owners in OWNERS.items() if library in used and not relative(path).startswith(owners)
    }
    assert not strangers


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_torch_is_never_imported_by_an_import(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    early = {name.partition(".")[0] for node in at_import_time(tree) for name in imports_of_statement(node)}
    # An owner may: whoever imports the owner is asked to do it late (tests/cli looks at sys.modules).
    own = {library for library, owners in OWNERS.items() if relative(path).startswith(owners)} - {
        "rich",
        "jinja2",
        "matplotlib",
    }
    assert not early & (
        {"torch", "numpy", "safetensors", "rich", "jsonschema", "huggingface_hub", "jinja2", "matplotlib"} - own
    )


def imports_of_statement(node: ast.stmt) -> Iterator[str]:
    return imports(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else iter(())


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_unpickles_evaluates_or_starts_a_process(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {name.partition(".")[0] for name in imports(tree)} & BANNED_IMPORTS
    banned = set(calls(tree)) & BANNED_CALLS
    assert not (banned - {"import_module", "importlib.import_module"} if relative(path) in LAZY_TABLES else banned)
