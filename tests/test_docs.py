"""The pages that are made from the source are current, the README's outputs among them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from safetensors.torch import load_file
from scripts import script

import loraformat

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py as a module. After a change of the source: python docs/generate.py."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(ROOT / "docs")
    module = script("docs/generate.py")
    monkeypatch.undo()
    return module


def test_the_pages_of_the_codes_are_what_the_source_says(generate: ModuleType) -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "rules").glob("*.md")}
    assert written == generate.documents()


def test_the_command_line_page_is_what_the_commands_say(generate: ModuleType) -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generate.cli()


def test_the_page_of_runtimes_is_what_the_table_says(generate: ModuleType) -> None:
    assert (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8") == generate.runtimes()


def test_the_page_of_schemas_is_what_their_files_say(generate: ModuleType) -> None:
    assert (ROOT / "docs" / "schemas.md").read_text(encoding="utf-8") == generate.schemas_page()


def test_every_field_of_every_schema_is_on_the_page() -> None:
    page = (ROOT / "docs" / "schemas.md").read_text(encoding="utf-8")
    for path in (ROOT / "schemas").glob("*.schema.json"):
        section = page.partition(f"\n## {path.name.removesuffix('.schema.json')}\n")[2].partition("\n## ")[0]
        fields = {name.rpartition(".")[2] for name in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)}
        assert fields == fields_of(json.loads(path.read_text(encoding="utf-8")))


def fields_of(schema: object) -> set[str]:
    """Names of all properties, wherever they stand; conditions about them repeat some."""
    if isinstance(schema, list):
        return set().union(*map(fields_of, schema))
    if not isinstance(schema, dict):
        return set()
    own = set(schema.get("properties", {})) if isinstance(schema.get("properties"), dict) else set()
    return own.union(*(fields_of(value) for key, value in schema.items() if key not in ("examples", "const", "enum")))


def test_the_drawing_of_the_packages_is_what_the_import_contracts_say(generate: ModuleType) -> None:
    assert (ROOT / "docs" / "pictures" / "architecture.svg").read_text(encoding="utf-8") == generate.drawing()


def test_the_readme_shows_what_its_commands_print(generate: ModuleType) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page == generate.readme(page)


@pytest.mark.parametrize("name", ["guides/hand-written.md", "inspect.md", "models.md", "validate.md"])
def test_a_walk_shows_what_its_commands_print(generate: ModuleType, name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert "$ loraformat" in page
    assert page == generate.walk(page)


def test_the_walk_through_inspect_runs_as_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(code, "docs/inspect.md", "exec"), {})


def test_the_python_page_has_the_kinds_and_errors_that_there_are(generate: ModuleType) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert page == generate.python(page)


def test_the_recipe_for_names_of_ones_own_ends_in_a_merge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "formats" / "dump.md").read_text(), flags=re.DOTALL)
    base = tmp_path / "base"
    tiny.llama().save_pretrained(str(base))
    mine = {"layers.0.attn.q.lora_A": torch.randn(2, 16), "layers.0.attn.q.lora_B": torch.randn(16, 2)}
    torch.save(mine, tmp_path / "mine.pt")
    monkeypatch.chdir(tmp_path)
    exec(compile(recipe, "docs/formats/dump.md", "exec"), {})
    loraformat.merge(base, ["renamed.pt"], "out", alpha=2.0)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (base, tmp_path / "out"))
    torch.testing.assert_close(after, before + mine["layers.0.attn.q.lora_B"] @ mine["layers.0.attn.q.lora_A"])


def test_a_report_prints_as_on_the_command_line() -> None:
    report = loraformat.inspect(ROOT / "fixtures" / "minigpt" / "lora_adapter", alpha=1.0)
    assert str(report).startswith(f"{ROOT / 'fixtures' / 'minigpt' / 'lora_adapter'}  native  17 tensors")


def test_the_page_of_the_formats_is_what_their_table_says(generate: ModuleType) -> None:
    assert (ROOT / "docs" / "formats" / "README.md").read_text(encoding="utf-8") == generate.formats_page()


def test_the_schema_of_reports_has_the_kinds_of_their_table(generate: ModuleType) -> None:
    schema = (ROOT / "schemas" / "report.schema.json").read_text(encoding="utf-8")
    assert schema == generate.report_schema(schema)
    assert '"weight-network"' in schema


def test_links_inside_the_repository_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "fixtures").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
