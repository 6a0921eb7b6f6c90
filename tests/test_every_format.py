"""What holds for every format of the table, and for every fixture of theirs."""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from bundles import content_of

from loraformat import formats
from loraformat.containers import open_bundle
from loraformat.diagnostics import Severity
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.kit.base import Hints, WriteOptions
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import TensorFile
from loraformat.model.format_files import FORMAT_FILES

ROOT = Path(__file__).parents[1]
GOOD = ROOT / "fixtures" / "good"
CASES = sorted(path.parent.relative_to(GOOD).as_posix() for path in GOOD.glob("*/*/expect.json"))
NAMES = [each.NAME for each in formats.FORMATS]
# What the writers of image formats are given; the others get an adapter of a language model.
WRITTEN = dict.fromkeys(("diffusers", "kohya", "comfy", "lycoris"), "kohya/tiny-flux")
WRITERS = [(each.NAME, container) for each in formats.FORMATS for container in each.CONTAINERS]


# The base of the fixtures: for formats with names of their own for its weights, or groups of layers. No rows permuted.
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 20, "head_dim": 4}
BASE = Hints(
    config={
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **SIZES,
    }
)


def options_of(container: str | None = None) -> WriteOptions:
    """What every writer has enough of."""
    return WriteOptions(container=container, base=BASE)


def expected(case: str) -> dict[str, object]:
    return json.loads((GOOD / case / "expect.json").read_text(encoding="utf-8"))


def read(case: str) -> Adapter:
    bundle = open_bundle(str(GOOD / case))
    return formats.detect(bundle)[0].read(bundle)


@pytest.mark.parametrize("name", NAMES)
def test_a_format_has_a_page_and_fixtures(name: str) -> None:
    each = formats.get(name)
    assert f"docs/formats/{name}.md" == each.SPEC
    assert (ROOT / each.SPEC).read_text(encoding="utf-8").startswith("# ")
    assert each.TITLE
    assert any(case.startswith(f"{name}/") for case in CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_fixture_gives_what_is_expected(case: str) -> None:
    wanted = expected(case)
    bundle = open_bundle(str(GOOD / case))
    found, _ = formats.detect(bundle)
    adapter = found.read(bundle)
    updates = [update for several in adapter.updates.values() for update in several]
    layers = [update for update in updates if hasattr(update, "rank")]
    assert {
        "format": found.NAME,
        "updates": len(updates),
        "ranks": sorted({update.rank for update in layers}),
        "declares": bool(adapter.config.declared_ranks),
        "scales": sorted({update.scale for update in layers}),
        "codes": sorted(note.code for note in adapter.notes),
    } == wanted
    assert not adapter.unclaimed
    assert set(adapter.config.declared_ranks.values()) == (set(wanted["ranks"]) if wanted["declares"] else set())


@pytest.mark.parametrize("case", CASES)
def test_a_fixture_is_taken_for_no_other_format(case: str) -> None:
    bundle = open_bundle(str(GOOD / case))
    matches = {each.NAME: match for each in formats.FORMATS if (match := each.sniff(bundle))}
    # A dump is whatever holds pairs and is nothing else, and so is what has loralib's spelling.
    wanted = case.partition("/")[0]
    certain = [name for name, match in matches.items() if match.certain]
    assert certain == [wanted] or list(matches) == [wanted]
    assert wanted in certain or wanted in ("dump", "loralib")


@pytest.mark.parametrize("case", CASES)
def test_no_format_that_would_fit_is_left_unasked(case: str) -> None:
    """Each fixture as a folder, and each of its files alone: what `sniff` finds, detection has asked for."""
    folder = open_bundle(str(GOOD / case))
    parts = [open_bundle(str(GOOD / case / file.name)) for file in folder.tensor_files() if (GOOD / case).is_dir()]
    for bundle in (folder, *parts):
        fitting = {each.NAME for each in formats.FORMATS if each.sniff(bundle)}
        assert fitting <= {row.name for row in FORMAT_FILES if row.may_fit(bundle)}


@pytest.mark.parametrize("name", NAMES)
def test_a_format_writes_or_says_that_it_does_not(name: str) -> None:
    each, adapter = formats.get(name), read(WRITTEN.get(name, "peft/rslora"))
    losses = [found for found in each.losses(adapter, options_of()) if found.severity is Severity.ERROR]
    assert bool(losses) is not each.WRITES
    if not each.WRITES:
        with pytest.raises(UnsupportedUpdate):
            each.write(adapter, options_of())


@pytest.mark.parametrize(("name", "container"), WRITERS)
def test_equal_adapters_give_equal_files(name: str, container: str) -> None:
    each, options = formats.get(name), options_of(container)
    first, second = (each.write(read(WRITTEN.get(name, "peft/rslora")), options) for _ in range(2))
    assert list(first.files) == list(second.files)
    for one, other in zip(first.files.values(), second.files.values(), strict=True):
        if isinstance(one, TensorFile):
            assert isinstance(other, TensorFile)
            assert one.open().container == container
            assert list(content_of(one)) == list(content_of(other)) == sorted(content_of(one))
        else:
            assert one.read() == other.read()


@pytest.mark.parametrize("case", CASES)
def test_reading_does_not_import_torch(case: str) -> None:
    """Law 5: opening is cheap."""
    script = (
        "import sys; from loraformat import formats; from loraformat.containers import open_bundle;"
        f"b = open_bundle({str(GOOD / case)!r}); formats.detect(b)[0].read(b); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_format_knows_no_other() -> None:
    """Law 1: N formats are N modules."""
    for name in NAMES:
        package = importlib.import_module(f"loraformat.formats.{name}")
        assert isinstance(package, ModuleType)
        folder = ROOT / "loraformat" / "formats"
        for path in [*(folder / name).glob("*.py"), *folder.glob(f"{name}.py")]:
            imported = [
                node.module or ""
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.ImportFrom)
            ]
            others = {f"loraformat.formats.{other}" for other in NAMES if other != name}
            assert not [module for module in imported if module.startswith(tuple(others))], path


def test_findings_can_be_sent_elsewhere() -> None:
    notes = read("peft/modules-to-save").notes
    assert pickle.loads(pickle.dumps(notes)) == notes
