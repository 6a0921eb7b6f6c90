"""One table of the kinds of update: complete, read by everybody, and all that a new kind has to be put into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import toy_kind
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.algebra.factors import MATRICES
from loraformat.cli import main
from loraformat.formats.kit.base import CONTENTS
from loraformat.merger.compute.kinds.arithmetic import ARITHMETIC
from loraformat.merger.verify.reference.kinds.effects import EFFECTS
from loraformat.model import updates
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import (
    KINDS,
    LowRank,
    Magnitude,
    Update,
    every_kind,
    kind_of,
    map_tensors,
    settings,
    tensors,
)

CLASSES = get_args(Update)
Q, K, V = (f"model.layers.{name}_proj.weight" for name in ("0.q", "1.q", "0.v"))
WEIGHTS = "model.safetensors"


def unlike(tables: Mapping[str, Iterable[type[Any]]]) -> list[str]:
    """ "table: class" of every class that one of the tables lacks and another has."""
    every = {kind for table in tables.values() for kind in table}
    return sorted(f"{name}: {kind.__name__}" for name, table in tables.items() for kind in every - set(table))


def test_every_kind_is_in_every_table() -> None:
    tables = {"Update": CLASSES, "KINDS": KINDS, "ARITHMETIC": ARITHMETIC, "EFFECTS": EFFECTS}
    assert unlike(tables) == []
    assert unlike({"MATRICES": MATRICES, "is_sum": [kind for kind, line in KINDS.items() if line.is_sum]}) == []


@pytest.mark.parametrize("lacking", ["Update", "KINDS", "ARITHMETIC", "EFFECTS"])
def test_a_kind_that_one_table_lacks_is_named(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    toy_kind.add(monkeypatch, without=lacking)
    classes = CLASSES if lacking == "Update" else (*CLASSES, toy_kind.Shifted)
    tables = {"Update": classes, "KINDS": KINDS, "ARITHMETIC": ARITHMETIC, "EFFECTS": EFFECTS}
    assert unlike(tables) == [f"{lacking}: Shifted"]


def test_names_are_unique_and_families_those_of_the_conversion_matrix() -> None:
    every = list(every_kind())
    assert len({kind.name for kind in every}) == len(every) == len(CLASSES) + 1  # DoRA is a low-rank update
    assert {kind.family for kind in every} <= set(CONTENTS)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_line_says_what_the_class_has(kind: type[Any]) -> None:
    line, names = KINDS[kind], {field.name for field in fields(kind)}
    assert not line.has_scale or "scale" in names
    assert not line.has_rank or hasattr(kind, "rank")
    assert hasattr(kind, "fits")
    assert hasattr(kind, "shape")
    assert kind.__name__ in updates.__all__


def test_dora_has_a_line_of_its_own() -> None:
    plain = LowRank(lazy(4, 2), lazy(2, 3), 1.0)
    dora = LowRank(lazy(4, 2), lazy(2, 3), 1.0, Magnitude(lazy(4)))
    assert (kind_of(plain).name, kind_of(plain).has_strength) == ("low-rank", True)
    assert (kind_of(dora).name, kind_of(dora).has_strength) == ("dora", False)


def lazy(*shape: int) -> LazyTensor:
    return LazyTensor.of(torch.zeros(shape))


def instance(kind: type[Any]) -> Any:
    """An update of the kind whose tensors are all there."""
    values: dict[str, object] = {}
    for field in fields(kind):
        annotation = str(field.type)
        if annotation.startswith("tuple[LazyTensor"):
            values[field.name] = (lazy(2, 2), lazy(2, 2))
        elif annotation.startswith("LazyTensor"):
            values[field.name] = lazy(2, 2)
        elif annotation.startswith("Magnitude"):
            values[field.name] = Magnitude(lazy(2), axis=0)
        else:
            values[field.name] = {"weight": "w"}.get(field.name, field.default)
    return kind(**values)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_tensor_of_every_kind_is_found_and_changed(kind: type[Any]) -> None:
    update = instance(kind)
    types = [str(field.type) for field in fields(kind)]
    wanted = sum(2 if "tuple[LazyTensor" in one else "LazyTensor" in one or "Magnitude" in one for one in types)
    found = list(tensors(update))
    assert len(found) == len({role for role, _ in found}) == wanted
    changed = map_tensors(update, lambda tensor: tensor.reshape(1, *tensor.shape))
    assert [(role, tensor.shape) for role, tensor in tensors(changed)] == [(r, (1, *t.shape)) for r, t in found]
    assert settings(changed) == settings(update)


def test_roles_are_the_names_of_the_fields() -> None:
    dora = LowRank(lazy(4, 2), lazy(2, 3), 1.0, Magnitude(lazy(4), axis=1))
    assert [role for role, _ in tensors(dora)] == ["up", "down", "magnitude"]
    assert settings(dora) == {"scale": 1.0, "magnitude.axis": 1, "kernel": (), "is_embedding": False}
    sides = updates.Kronecker((lazy(2, 2),), (lazy(2, 1), lazy(1, 2)), 2.0)
    assert [role for role, _ in tensors(sides)] == ["left0", "right0", "right1"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(24, 24, generator=generator) for name in (Q, K, V)}, folder / WEIGHTS)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    vectors = {f"base_model.model.{name.removesuffix('.weight')}.toy_shift": torch.randn(24) for name in (Q, K)}
    save_file(vectors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "TOY", "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_new_kind_is_merged_inspected_recorded_and_verified(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_kind.add(monkeypatch)
    out = tmp_path / "out"
    done = run("merge", base, adapter, "-o", out, "--verify", "full")
    assert done.exit_code == 0, done.output
    before, after, stored = (
        load_file(base / WEIGHTS),
        load_file(out / WEIGHTS),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name in (Q, K):
        vector = stored[f"base_model.model.{name.removesuffix('.weight')}.toy_shift"]
        exact = before[name].double() + torch.ones(24, 1, dtype=torch.float64) @ vector.double()[None]
        assert torch.equal(after[name], exact.float())
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {Q, K})
    terms = json.loads((out / "loraformat.manifest.json").read_text())["weights"][Q]["terms"]
    assert [(term["kind"], term["formula"], term["scale"]) for term in terms] == [("shifted", "W + 1@v.T", None)]
    assert run("verify", out, "--base", base).exit_code == 0
    shown = run("inspect", adapter)
    assert shown.exit_code == 0
    assert "2 shifts" in shown.output
    vector = stored["base_model.model.model.layers.0.q_proj.toy_shift"].numpy()
    change = loraformat.load_adapter(adapter).delta(Q, before[Q].numpy())
    np.testing.assert_allclose(change, np.broadcast_to(vector, (24, 24)), atol=1e-6)
    record = json.loads(run("inspect", adapter, "--format", "json", "--base", base, "--norms").stdout)
    (first, _) = record["data"]["weights"]
    assert (first["kind"], first["parameters"], first["scale"]) == ("shifted", 24, None)
    vector = stored["base_model.model.model.layers.0.q_proj.toy_shift"].double()
    assert first["norm"] == pytest.approx(float(vector.norm()) * 24**0.5, rel=1e-6)


@pytest.mark.parametrize("lacking", ["KINDS", "ARITHMETIC", "EFFECTS"])
@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--verify", "none")], ids=["merge", "dry-run", "unverified"])
def test_a_kind_that_a_table_lacks_is_refused_when_a_merge_is_planned(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str, options: tuple[str, ...]
) -> None:
    toy_kind.add(monkeypatch, without=lacking)
    done = run("merge", base, adapter, "-o", tmp_path / "out", *options)
    assert done.exit_code == 1
    assert f"updates of the class Shifted have no line in {lacking} in loraformat/" in done.output
    assert "KeyError" not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
