"""What starting up may cost: which modules are imported, not how long it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from arithmetic.cases import LOOPS
from safetensors.torch import load_file, save_file

from loraformat.io import load_adapter

FIXTURES = Path(__file__).parent.parent / "fixtures"
HEAVY = ("torch", "numpy", "huggingface_hub", "transformers", "peft", "rich", "jsonschema", "yaml", "jinja2")
PROBE = """
import json, sys
from loraformat.cli import main
try:
    main(sys.argv[1:], prog_name="loraformat")
except SystemExit as left:
    code = left.code
print(json.dumps([code or 0, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


def modules_after(*arguments: str) -> set[str]:
    command = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(modules)


def test_importing_the_package_imports_nothing_of_weight() -> None:
    probe = "import sys, loraformat; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {*HEAVY, "click"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["merge", "--help"], ["validate", "--help"]])
def test_help_imports_nothing_of_weight(arguments: list[str]) -> None:
    assert not modules_after(*arguments) & set(HEAVY)


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_json_about_a_peft_folder_needs_neither_torch_nor_rich(verb: str) -> None:
    found = modules_after(verb, str(FIXTURES / "good" / "peft" / "tiny-llama"), "--format", "json")
    assert not found & {"torch", "numpy", "huggingface_hub", "transformers", "peft", "rich"}


# Half of what a command takes to start is the making of classes that it never uses.
UNUSED = (
    *("algebra", "arithmetic", "containers.quantized", "matching", "merger", "model.patterns.program", "naming"),
    *("storage.hub", "storage.s3"),
)
UNUSED_LIBRARIES = {"concurrent", "ctypes", "decimal", "difflib", "pathlib", "tempfile", "urllib"}
EVERY_MODULE = PROBE.replace('{name.partition(".")[0] for name in sys.modules}', "set(sys.modules) - before").replace(
    "import json, sys", "import json, sys, click; before = set(sys.modules)"
)


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_headers_of_a_plain_adapter_need_nothing_that_computes_or_matches(verb: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EVERY_MODULE, verb, str(FIXTURES / "good" / "peft" / "rslora"), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert f"loraformat.jobs.{verb}" in modules
    rooms = tuple(f"loraformat.{name}" for name in UNUSED)
    assert [name for name in modules if name.startswith(rooms)] == []
    assert {name.partition(".")[0] for name in modules} & UNUSED_LIBRARIES == set()


def test_text_about_a_pt_folder_needs_no_torch() -> None:
    found = modules_after("inspect", str(FIXTURES / "minigpt" / "lora_adapter"))
    assert not found & {"torch", "numpy", "huggingface_hub", "transformers", "peft", "jinja2"}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("options", [(), ("--verify", "full", "--jobs", "4"), ("--dtype", "float16")])
def test_merging_needs_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], loop: str
) -> None:
    """Importing torch takes longer than merging a small model, and more memory than all else together."""
    monkeypatch.setenv("LORAFORMAT_LOOP", loop)
    adapter, base, out = FIXTURES / "good" / "peft" / "rslora", tmp_path / "base", tmp_path / "out"
    base.mkdir()
    updates = load_adapter(str(adapter)).updates
    save_file({name: torch.ones(update.shape) for name, (update,) in updates.items()}, base / "model.safetensors")
    found = modules_after("merge", str(base), str(adapter), "-o", str(out), *options)
    assert not found & {"torch", "huggingface_hub", "transformers", "peft"}
    assert all((value != 1).any() for value in load_file(out / "model.safetensors").values())


def test_verbs_between_models_and_adapters_need_no_torch(tmp_path: Path) -> None:
    base, tuned, fact = (str(FIXTURES / "minigpt" / name) for name in ("base", "full_finetuned", "fact_all"))
    np.save(tmp_path / "direction.npy", np.arange(64.0))
    out = [str(tmp_path / name) for name in ("lora", "merged", "without", "exact", "ablated", "model", "fresh")]
    direction = ["--direction", str(tmp_path / "direction.npy"), "--select", "out_proj"]
    for arguments in (
        ["extract", base, tuned, "--rank", "4", "--rest", "save", "-o", out[0]],
        ["merge", base, fact, "--alpha", "1", "-o", out[1]],
        ["unmerge", out[1], fact, "--alpha", "1", "-o", out[2]],
        ["unmerge", out[1], fact, "--alpha", "1", "--base", base, "-o", out[3]],
        ["ablate", base, *direction, "-o", out[4]],
        ["ablate", base, *direction, "--merge", "-o", out[5]],
        ["init", base, "--rank", "4", "--target", "q_proj", "--init", "pissa", "-o", out[6]],
    ):
        assert not modules_after(*arguments) & {"torch", "huggingface_hub", "transformers", "peft"}


def test_copying_a_tensor_that_is_stored_as_a_view_needs_no_torch(tmp_path: Path) -> None:
    adapter, base, out = FIXTURES / "good" / "peft" / "rslora", tmp_path / "base", tmp_path / "out"
    base.mkdir()
    tensors = {name: torch.ones(update.shape) for name, (update,) in load_adapter(str(adapter)).updates.items()}
    view = torch.randn(6, 4).bfloat16().T
    torch.save(tensors | {"other.weight": view}, base / "pytorch_model.bin")
    found = modules_after("merge", str(base), str(adapter), "-o", str(out), "--verify", "full", "--jobs", "4")
    assert "torch" not in found
    assert torch.equal(torch.load(out / "pytorch_model.bin", weights_only=True)["other.weight"], view)


COMPILED = """
import importlib.machinery, json, sys
IS_BLOCKED, COMMANDS = json.load(sys.stdin)
class Watched(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        is_compiled = spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
        if not is_compiled or name.partition(".")[0] in sys.stdlib_module_names:
            return spec
        found.append(name)
        return None if IS_BLOCKED else spec
found = []
sys.meta_path[:] = [Watched if each is importlib.machinery.PathFinder else each for each in sys.meta_path]
from loraformat.cli import main
for arguments in COMMANDS:
    try:
        main(arguments, prog_name="loraformat")
    except SystemExit as left:
        assert left.code in (0, 1, 3), arguments
print(json.dumps(found), file=sys.stderr)
"""
GOOD = sorted(FIXTURES.glob("good/*/*"))
BAD = sorted(FIXTURES.glob("bad/*"))
# PyYAML, which only settings of LitGPT need, has a compiled part that it can do without.
WITH_YAML = [path for path in GOOD if {"litgpt", "nemo"} & set(path.parts)]


def compiled_after(*commands: list[str], is_blocked: bool = False) -> tuple[list[str], str]:
    """The compiled modules outside the standard library that commands of one process want, and their output."""
    command, given = [sys.executable, "-c", COMPILED], json.dumps([is_blocked, commands])
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return json.loads(done.stderr.splitlines()[-1]), done.stdout


def test_formats_and_codes_need_no_compiled_package() -> None:
    assert compiled_after(["formats"], ["formats", "--format", "json"], ["explain", "LF103"])[0] == []


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_headers_are_read_without_a_compiled_package(verb: str) -> None:
    paths = [path for path in (*GOOD, *BAD) if path not in WITH_YAML]
    commands = [[verb, str(path), "--format", form] for path in paths for form in ("json", "text")]
    found, said = compiled_after(*commands)
    assert found == []
    assert len(said) > 100 * len(paths)


def test_yaml_is_read_without_its_compiled_part_too() -> None:
    commands = [["validate", str(path), "--format", "json"] for path in WITH_YAML]
    found, said = compiled_after(*commands)
    assert set(found) <= {"yaml._yaml"}
    assert compiled_after(*commands, is_blocked=True)[1] == said


DETECT = """
import json, sys
from loraformat import formats
from loraformat.containers import open_bundle
from loraformat.model.format_files import NAMES
module, _ = formats.detect(open_bundle(sys.argv[1]))
print(json.dumps([name for name in NAMES if f"loraformat.formats.{name}" in sys.modules]))
"""


@pytest.mark.parametrize(
    ("case", "asked"),
    [
        ("peft/tiny-llama", ["peft"]),
        ("native/tiny-llama", ["native"]),
        ("mlx/tiny-llama", ["mlx"]),
        ("litgpt/tiny-llama", ["loralib", "litgpt", "dump"]),
        ("minlora/tiny-llama", ["loralib", "minlora", "dump"]),
        ("raschka/tiny-llama", ["raschka", "dump"]),
        ("minimind/tiny-llama", ["minimind", "dump"]),
    ],
)
def test_only_formats_that_may_fit_are_imported(case: str, asked: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DETECT, str(FIXTURES / "good" / case)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == asked
