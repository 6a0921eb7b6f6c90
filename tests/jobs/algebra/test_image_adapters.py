"""resize, combine, scale and pick on adapters of image and video models: in their own formats, against float64 sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_models import FAMILIES, adapter_of
from oracle import dense

import loraformat
from loraformat.errors import AdapterRefused
from loraformat.io import open_files, read_bundle, save_adapter
from loraformat.model.adapter import Adapter
from loraformat.naming.families import family_named

TARGETS = ["diffusers", "kohya", "comfy"]


def save(folder: Path, family: str, target: str, seed: float = 1.0, kind: str = "linear") -> tuple[str, Adapter]:
    """A file of a whole model, whose scales are `seed` times those of another."""
    adapter = adapter_of(family_named(family), kind, is_whole_model=True)
    updates = {w: tuple(replace(one, scale=one.scale * seed) for one in chain) for w, chain in adapter.updates.items()}  # type: ignore[operator, call-arg, type-var]
    adapter = replace(adapter, updates=updates)
    save_adapter(adapter, str(folder), to=target)
    return str(next(folder.iterdir())), adapter


def read(folder: Path) -> Adapter:
    return read_bundle(open_files(str(next(folder.glob("*.safetensors"))))).adapter


def changes(adapter: Adapter) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {weight: sum(np.asarray(dense(one)) for one in chain) for weight, chain in adapter.updates.items()}  # type: ignore[misc]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sum_of_two(tmp_path: Path, family: str, target: str) -> None:
    one, exact = save(tmp_path / "a", family, target)
    other, _ = save(tmp_path / "b", family, target, seed=3.0)
    loraformat.combine([f"{one}=0.5", f"{other}=0.25"], tmp_path / "o")
    found, wanted = changes(read(tmp_path / "o")), changes(exact)
    assert found.keys() == wanted.keys()
    for weight, value in wanted.items():
        assert np.allclose(found[weight], 1.25 * value, rtol=1e-5, atol=1e-6 * np.abs(value).max()), weight
    assert loraformat.inspect(tmp_path / "o").format == target


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_by_itself(tmp_path: Path, family: str, target: str) -> None:
    one, exact = save(tmp_path / "a", family, target)
    wanted = changes(exact)
    loraformat.scale(f"{one}=0.5", tmp_path / "s")
    loraformat.resize(one, tmp_path / "r", energy=1.0)
    for folder, factor in (("s", 0.5), ("r", 1.0)):
        found = changes(read(tmp_path / folder))
        assert found.keys() == wanted.keys()
        for weight, value in wanted.items():
            assert np.allclose(found[weight], factor * value, rtol=1e-5, atol=1e-6 * np.abs(value).max()), weight
    dropped = min(wanted)
    loraformat.pick(one, tmp_path / "p", drop=[dropped])
    found = changes(read(tmp_path / "p"))
    assert found.keys() == wanted.keys() - {dropped}
    assert all(np.allclose(found[weight], wanted[weight], rtol=1e-5) for weight in found)


def test_families_and_plain_models_do_not_mix(tmp_path: Path) -> None:
    one, _ = save(tmp_path / "a", "sdxl", "kohya")
    other, _ = save(tmp_path / "b", "wan", "kohya")
    with pytest.raises(AdapterRefused, match="it is for wan, but another adapter is for sdxl"):
        loraformat.combine([one, other], tmp_path / "o")
    with pytest.raises(AdapterRefused, match="for a single model, but another adapter is for a pipeline"):
        loraformat.combine([one, "fixtures/good/peft/tiny-llama"], tmp_path / "o")
    assert not (tmp_path / "o").exists()
