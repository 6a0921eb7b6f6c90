"""ablate: what is left has no component along the directions, in PEFT and merged; bad directions are one error each."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from model_pairs import Tensors, llama, logits, model_of, read, write
from safetensors.torch import save_file

import loraformat
from loraformat.cli import main
from loraformat.errors import (
    AdapterRefused,
    ContainerError,
    LoraFormatError,
    NonFiniteValue,
    ShapeMismatch,
    UnsupportedUpdate,
    UsageError,
)

WRITERS = ["o_proj", "down_proj"]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return llama()


def vectors(count: int = 1, features: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)) * 7


def saved(path: Path, value: torch.Tensor) -> Path:
    """A tensor in the container that the suffix says."""
    if path.suffix == ".npy":
        np.save(path, value.numpy())
    elif path.suffix == ".pt":
        torch.save(value, path)
    else:
        save_file({"direction": value}, path)
    return path


def basis(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(rows.double().T)[0]


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    adapter = loraformat.load_adapter(folder)
    return {name: torch.from_numpy(adapter.delta(name, dtype="float64")) for name in adapter.updates}


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_update_is_the_projection(tmp_path: Path, tensors: Tensors, suffix: str, side: str, count: int) -> None:
    base, rows = write(tmp_path / "base", tensors), vectors(count)
    file = saved(tmp_path / f"d{suffix}", rows if count > 1 else rows[0])
    select = WRITERS if side == "output" else ["q_proj", "up_proj"]
    report = loraformat.ablate(base, tmp_path / "out", direction=[file], select=select, side=side, strength=[0.75])
    q = basis(rows)
    found = deltas(tmp_path / "out")
    assert len(found) == 4
    for name, delta in found.items():
        weight = tensors[name].double()
        wanted = -0.75 * (q @ (q.T @ weight) if side == "output" else (weight @ q) @ q.T)
        assert (delta - wanted).norm() <= 1e-6 * wanted.norm()
    assert {each.rank for each in report.data.weights} == {count}


def test_the_model_writes_nothing_along_it_in_peft_and_merged(tmp_path: Path, tensors: Tensors) -> None:
    from peft import PeftModel

    base, file = write(tmp_path / "base", tensors), saved(tmp_path / "d.npy", vectors()[0])
    select = [*WRITERS, "embed_tokens"]
    loraformat.ablate(base, tmp_path / "out", direction=[file], select=select)
    loraformat.ablate(base, tmp_path / "merged", direction=[file], select=select, merge=True)
    unit = basis(vectors())[:, 0].float()
    before, through = model_of(base), PeftModel.from_pretrained(model_of(base), str(tmp_path / "out")).eval()
    for model in (through, model_of(tmp_path / "merged")):
        ids = torch.arange(10)[None]
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
            old = before(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
        for one, other in zip(hidden, old, strict=True):
            assert float((one @ unit).abs().max()) < 1e-5
            assert float((other @ unit).abs().max()) > 1e-2
    assert torch.allclose(logits(through), logits(model_of(tmp_path / "merged")), atol=1e-4)
    assert loraformat.verify(tmp_path / "merged", base=base).ok


def test_dependent_directions_count_once(tmp_path: Path, tensors: Tensors) -> None:
    base, rows = write(tmp_path / "base", tensors), vectors(2)
    twice = saved(tmp_path / "d.npy", torch.stack([rows[0], -3 * rows[0], rows[1]]))
    one, other = saved(tmp_path / "one.pt", rows[0]), saved(tmp_path / "other.safetensors", rows[1])
    for name, files in (("a", [twice]), ("b", [one, other])):
        report = loraformat.ablate(base, tmp_path / name, direction=files, select=WRITERS)
        assert {each.rank for each in report.data.weights} == {2}
    for name, delta in deltas(tmp_path / "a").items():
        assert torch.allclose(delta, deltas(tmp_path / "b")[name], atol=1e-6)


def test_the_difference_of_means(tmp_path: Path, tensors: Tensors) -> None:
    base = write(tmp_path / "base", tensors)
    one, other = vectors(50, seed=1).reshape(5, 10, 32), vectors(30, seed=2)
    files = saved(tmp_path / "a.npy", one), saved(tmp_path / "b.safetensors", other)
    loraformat.ablate(base, tmp_path / "out", direction_from=[files], select=WRITERS)
    q = basis((one.double().mean((0, 1)) - other.double().mean(0))[None])
    for name, delta in deltas(tmp_path / "out").items():
        wanted = -q @ (q.T @ tensors[name].double())
        assert (delta - wanted).norm() <= 1e-6 * wanted.norm()


def test_strengths_by_pattern(tmp_path: Path, tensors: Tensors) -> None:
    base, file = write(tmp_path / "base", tensors), saved(tmp_path / "d.npy", vectors()[0])
    strengths = ["0.5", "layers=1=2", "model.layers.1.mlp.*=-1"]
    loraformat.ablate(base, tmp_path / "out", direction=[file], select=WRITERS, strength=strengths)
    q = basis(vectors())
    wanted = {"0.self_attn": 0.5, "0.mlp": 0.5, "1.self_attn": 2.0, "1.mlp": -1.0}
    for name, delta in deltas(tmp_path / "out").items():
        strength = next(value for part, value in wanted.items() if part in name)
        change = -strength * q @ (q.T @ tensors[name].double())
        assert (delta - change).norm() <= 1e-6 * change.norm(), name


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_norms_are_kept(tmp_path: Path, tensors: Tensors, side: str, strength: float) -> None:
    base, rows = write(tmp_path / "base", tensors), vectors(2)
    file = saved(tmp_path / "d.npy", rows)
    options: dict[str, Any] = {"direction": [file], "select": ["o_proj"], "side": side, "strength": [strength]}
    report = loraformat.ablate(base, tmp_path / "out", keep_norms=True, rank=32, **options)
    cut = loraformat.ablate(base, tmp_path / "cut", keep_norms=True, rank=5, **options)
    q = basis(rows)
    for at, (name, delta) in enumerate(deltas(tmp_path / "out").items()):
        weight = tensors[name].double()
        unit = weight / weight.norm(dim=1, keepdim=True)
        turned = unit - strength * (q @ (q.T @ unit) if side == "output" else (unit @ q) @ q.T)
        wanted = weight.norm(dim=1, keepdim=True) * turned / turned.norm(dim=1, keepdim=True) - weight
        assert (delta - wanted).norm() <= 1e-5 * wanted.norm()
        assert torch.allclose((weight + delta).norm(dim=1), weight.norm(dim=1), rtol=1e-5)
        values = torch.linalg.svdvals(wanted)
        error = float((deltas(tmp_path / "cut")[name] - wanted).norm() / wanted.norm())
        assert cut.data.weights[at].error == pytest.approx(error, rel=1e-4)
        assert error == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-4)
    assert report.data.error < 1e-5


def test_conv1d_tables_and_convolutions(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"h.0.mlp.c_proj.weight": (40, 24), "wte.weight": (50, 24), "conv.weight": (24, 6, 3, 3)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    base = write(tmp_path / "base", tensors, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    file = saved(tmp_path / "d.npy", vectors(features=24)[0])
    loraformat.ablate(base, tmp_path / "merged", direction=[file], select=["*"], merge=True)
    unit = basis(vectors(features=24))[:, 0].float()
    after = read(tmp_path / "merged")
    for name, axis in (("h.0.mlp.c_proj.weight", 1), ("wte.weight", 1), ("conv.weight", 0)):
        assert float((after[name].movedim(axis, -1) @ unit).abs().max()) < 1e-5, name
        assert float((tensors[name].movedim(axis, -1) @ unit).abs().max()) > 0.1, name


def test_bytes_do_not_depend_on_threads(tmp_path: Path, tensors: Tensors) -> None:
    base, file = write(tmp_path / "base", tensors), saved(tmp_path / "d.npy", vectors()[0])
    for jobs in (1, 4):
        loraformat.ablate(base, tmp_path / f"out{jobs}", direction=[file], select=WRITERS, jobs=jobs)
    assert len({(tmp_path / f"out{jobs}" / "adapter_model.safetensors").read_bytes() for jobs in (1, 4)}) == 1


def refused(base: Path, out: Path, **options: Any) -> LoraFormatError:
    with pytest.raises(LoraFormatError) as found:
        loraformat.ablate(base, out, **{"select": WRITERS, **options})
    assert not out.exists()
    return found.value


def test_bad_directions(tmp_path: Path, tensors: Tensors) -> None:
    base, out = write(tmp_path / "base", tensors), tmp_path / "out"
    good = saved(tmp_path / "good.npy", vectors()[0])
    cases: list[tuple[str, Any, type[LoraFormatError], str]] = [
        ("long.npy", vectors(features=33)[0], ShapeMismatch, "has 32 outputs, but the direction has 33"),
        ("zero.pt", torch.zeros(32), UsageError, "zero"),
        ("nan.safetensors", torch.full((32,), float("nan")), NonFiniteValue, "NaN"),
        ("whole.npy", torch.arange(32), UnsupportedUpdate, "int64"),
        ("cube.npy", torch.ones(2, 3, 32), UnsupportedUpdate, "expected a vector"),
        ("many.npy", vectors(40), UsageError, "40 directions of 32"),
    ]
    for name, value, kind, text in cases:
        found = refused(base, out, direction=[saved(tmp_path / name, value)])
        assert isinstance(found, kind), name
        assert text in found.message, found.message
    side = refused(base, out, direction=[saved(tmp_path / "wide.npy", vectors(features=48)[0])], select=["down_proj"])
    assert "--side input" in side.hint
    both = refused(base, out, direction=[good, saved(tmp_path / "short.npy", vectors(features=8)[0])])
    assert isinstance(both, ShapeMismatch)
    assert "no direction" in refused(base, out).message
    assert "no weight is selected" in refused(base, out, direction=[good], select=[]).message
    assert "matches" in refused(base, out, direction=[good], strength=["nothing=1"]).message
    assert "expected a number" in refused(base, out, direction=[good], strength=["o_proj=x"]).message
    assert "--rank" in refused(base, out, direction=[good], rank=3).where
    assert (
        "an adapter cannot change"
        in refused(
            write(tmp_path / "stack", {**tensors, "experts": torch.ones(2, 32, 32)}),
            out,
            direction=[good],
            select=["experts"],
        ).message
    )
    same = refused(base, out, direction_from=[(good, good)])
    assert "zero" in same.message


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "bfloat16"), ("dtype", "float16"), ("to", "kohya"), ("strict", True)]
)
def test_options_of_adapters_are_refused_where_a_model_is_written(
    tmp_path: Path, tensors: Tensors, option: str, value: Any
) -> None:
    """Factors in 16 bits would leave a share of the direction in the model."""
    base, good = write(tmp_path / "base", tensors), saved(tmp_path / "good.npy", vectors()[0])
    found = refused(base, tmp_path / "out", direction=[good], merge=True, **{option: value})
    assert (found.code, found.where) == ("LF021", f"--{option}")


@pytest.mark.parametrize("strength", [0, 1e300, -1e300, float("inf"), "o_proj=0", "layers=0=1e39"])
@pytest.mark.parametrize("options", [{}, {"keep_norms": True, "rank": 4}, {"merge": True}])
def test_a_strength_that_changes_nothing_or_too_much(
    tmp_path: Path, tensors: Tensors, strength: Any, options: dict[str, Any]
) -> None:
    base, good = write(tmp_path / "base", tensors), saved(tmp_path / "good.npy", vectors()[0])
    found = refused(base, tmp_path / "out", direction=[good], select=["o_proj"], strength=[strength], **options)
    assert (found.code, found.where) == ("LF021", "--strength"), found.message


def test_the_hint_drops_what_does_not_fit(tmp_path: Path, tensors: Tensors) -> None:
    base, good = write(tmp_path / "base", tensors), saved(tmp_path / "good.npy", vectors()[0])
    found = refused(base, tmp_path / "out", direction=[good], select=["o_proj", "lm_head"])
    assert found.hint == "--drop lm_head"
    found = refused(base, tmp_path / "out", direction=[good], select=["*"])
    assert "lm_head.weight has 96 outputs" in found.message
    drops = found.hint.replace("--drop ", "").split()
    loraformat.ablate(base, tmp_path / "out", direction=[good], select=["*"], drop=drops)


def test_a_convolution_of_each_channel_for_itself_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    base = write(tmp_path / "base", {**tensors, "mixer.conv1d.weight": torch.ones(32, 1, 4)})
    good = saved(tmp_path / "good.npy", vectors()[0])
    found = refused(base, tmp_path / "out", direction=[good], select=["conv1d"])
    assert isinstance(found, UnsupportedUpdate)
    assert "mixer.conv1d.weight" in found.message


def test_what_peft_does_not_adapt_can_be_merged(tmp_path: Path) -> None:
    """Mamba reads the weight of out_proj past the module, so PEFT refuses an adapter of it."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    base = write(tmp_path / "base", {"layers.0.mixer.out_proj.weight": weight}, model_type="mamba")
    options: dict[str, Any] = {"direction": [saved(tmp_path / "d.npy", vectors()[0])], "select": ["out_proj"]}
    assert "--merge" in refused(base, tmp_path / "out", **options).hint
    loraformat.ablate(base, tmp_path / "out", merge=True, **options)
    unit = basis(vectors()).double()
    (found,) = read(tmp_path / "out").values()
    assert (unit.T @ found.double()).norm() < 1e-5 * weight.norm()


def test_nothing_in_a_file_is_executed_and_damage_is_told(tmp_path: Path, tensors: Tensors) -> None:
    base, out = write(tmp_path / "base", tensors), tmp_path / "out"
    np.save(tmp_path / "objects.npy", np.array([print, None], dtype=object), allow_pickle=True)
    found = refused(base, out, direction=[tmp_path / "objects.npy"])
    assert isinstance(found, ContainerError)
    assert "not executed" in found.message
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"d": [1.0] * 32}))
    assert isinstance(refused(base, out, direction=[tmp_path / "pickle.pt"]), ContainerError)
    whole = saved(tmp_path / "d.npy", vectors()[0]).read_bytes()
    for cut in (3, 9, 60, len(whole) - 3):
        (tmp_path / "cut.npy").write_bytes(whole[:cut])
        assert isinstance(refused(base, out, direction=[tmp_path / "cut.npy"]), ContainerError)
    save_file({"a": vectors()[0], "b": vectors()[0]}, tmp_path / "two.safetensors")
    two = refused(base, out, direction=[tmp_path / "two.safetensors"])
    assert "2 tensors" in two.message
    assert "a, b" in two.hint
    loraformat.ablate(base, out, direction=[f"{tmp_path / 'two.safetensors'}:a"], select=WRITERS)


def test_a_direction_that_is_not_there(tmp_path: Path, tensors: Tensors) -> None:
    """W has nothing along it: there is nothing to write."""
    weight = "model.layers.0.self_attn.o_proj.weight"
    changed = {**tensors, weight: tensors[weight].clone()}
    changed[weight][5] = 0
    base, unit = write(tmp_path / "base", changed), torch.zeros(32)
    unit[5] = 1
    with pytest.raises(AdapterRefused, match="no component along the directions"):
        loraformat.ablate(
            base, tmp_path / "out", direction=[saved(tmp_path / "d.npy", unit)], select=["layers.0.self_attn.o_proj"]
        )
    report = loraformat.ablate(base, tmp_path / "out", direction=[tmp_path / "d.npy"], select=WRITERS)
    assert report.data.left_out == (weight,)


def test_the_command_line(tmp_path: Path, tensors: Tensors) -> None:
    base, file = write(tmp_path / "base", tensors), saved(tmp_path / "d.npy", vectors()[0])
    arguments = ["ablate", str(base), "--direction", str(file), "--select", "*.o_proj", "--strength", "layers=0=0.5"]
    for more in ([], ["--merge"]):
        done = CliRunner().invoke(
            main, [*arguments, *more, "-o", str(tmp_path / f"out{len(more)}"), "--format", "json"]
        )
        assert done.exit_code == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["job"] == "ablate"
        assert document["data"]["is_dry_run"] is False
