"""Adapter.delta: what every kind of update adds, against float64 oracles and against PEFT."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merger.checkpoints import adapter, config, low_rank, save_base, weights
from oracle import dense, merged
from peft_models import Case, Gpt, Net, make, saved
from strategies import lazy
from torch import Tensor

import loraformat
from loraformat.errors import MergeError, NonFiniteValue, ShapeMismatch, UnmatchedUpdate, UsageError
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import (
    BiasFromWeight,
    BlockAffine,
    Dense,
    ElementwiseScale,
    FRoD,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    SubtractedInit,
    Update,
    WeightNetwork,
)

Q, UP, DOWN = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight", "model.layers.0.down_proj.weight"
BIAS, EMBED = "model.layers.1.up_proj.bias", "model.embed_tokens.weight"
FIXTURES = Path(__file__).parent.parent.parent / "fixtures"

SUMS: dict[str, tuple[Update, ...]] = {
    "low-rank": (low_rank(130, 24), low_rank(130, 24, seed=8)),
    "hadamard": (Hadamard(lazy(130, 3), lazy(3, 24), lazy(130, 2, seed=1), lazy(2, 24, seed=1), -0.5),),
    "kronecker": (Kronecker((lazy(10, 2), lazy(2, 6)), (lazy(13, 4, dtype=torch.bfloat16),), 2.0),),
    "dense": (Dense(lazy(130, 24), 3.0), low_rank(130, 24)),
}
OF_BASE: dict[str, tuple[str, tuple[Update, ...]]] = {
    "dora": (UP, (LowRank(lazy(130, 2), lazy(2, 24), 0.5, Magnitude(lazy(130, seed=3))),)),
    "replace": (UP, (Replace(lazy(130, 24)),)),
    "new-table": (EMBED, (Replace(lazy(75, 24), follows_tie=False), low_rank(75, 24))),
    "rows": (EMBED, (Rows((3, 70, 71), lazy(3, 24)),)),
    "scaled": (UP, (Scaled(lazy(130), lazy(24, seed=1)),)),
    "scaled-bias": (BIAS, (Scaled(lazy(130), is_bias=True), Dense(lazy(130, seed=4)))),
    "rotated-left": (UP, (low_rank(130, 24), Rotated(lazy(13, 10, 10), "left"))),
    "rotated-right": (UP, (Rotated(lazy(4, 6, 6), "right", order=tuple(reversed(range(24)))),)),
    "multiplied": (DOWN, (Multiplied(lazy(130, 2), lazy(2, 130, seed=5)),)),
    "modulated": (UP, (ElementwiseScale(lazy(130, 2), lazy(2, 24)), low_rank(130, 24))),
    "tiled": (UP, (BlockAffine(lazy(65, 2, 2)),)),
    "projected": (DOWN, (WeightNetwork(lazy(24, 3), lazy(3, 24, seed=4), 0.1),)),
    "recoded": (UP, (FRoD(lazy(24, 24), lazy(24, 24, seed=9)),)),
}


def base_weights() -> dict[str, Tensor]:
    return weights() | {BIAS: torch.randn(130, generator=torch.Generator().manual_seed(8))}


def exact(weight: Tensor, chain: Sequence[Update], **more: Any) -> Tensor:
    """W' - W in float64; rows that the base lacks count as zero."""
    after = merged(weight, list(chain), **more)
    before = torch.zeros_like(after)
    before[: weight.shape[0]] = weight
    return after - before


def close(found: np.ndarray, wanted: Tensor, room: float = 1e-11) -> None:
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted.numpy(), rtol=room, atol=room)


@pytest.mark.parametrize("kind", SUMS)
def test_sums_need_no_base(kind: str) -> None:
    found = adapter({UP: SUMS[kind]}).delta(UP, dtype="float64")
    close(found, torch.stack([dense(update) for update in SUMS[kind]]).sum(dim=0))


@pytest.mark.parametrize("kind", SUMS)
def test_float32_is_float64_rounded_once(kind: str) -> None:
    one = adapter({UP: SUMS[kind]})
    found = one.delta(UP)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, one.delta(UP, dtype="float64").astype(np.float32))


@pytest.mark.parametrize("kind", OF_BASE)
def test_other_kinds_are_computed_from_the_base(kind: str, tmp_path: Path) -> None:
    tensors = base_weights()
    base = loraformat.open_checkpoint(save_base(tmp_path / "base", tensors, config(), shards=2))
    name, chain = OF_BASE[kind]
    wanted = exact(tensors[name], chain)
    head = {"lm_head.weight": Replace(lazy(len(wanted), 24, seed=7))} if name == EMBED else {}  # a merge asks for both
    one = adapter({name: chain, Q: low_rank(24, 24), **head})
    room = 1e-6 if kind == "recoded" else 1e-11
    close(one.delta(name, base, dtype="float64"), wanted, room)
    close(one.delta(name, tensors[name].numpy(), dtype="float64"), wanted, room)
    with pytest.raises(UsageError, match="pass base=open_checkpoint"):
        one.delta(name)


@pytest.mark.parametrize("recipe", ["pissa", "olora"])
def test_what_an_initialization_took_off_the_base(recipe: str, tmp_path: Path) -> None:
    tensors = base_weights()
    base = loraformat.open_checkpoint(save_base(tmp_path / "base", tensors, config()))
    one = adapter({UP: (SubtractedInit(recipe, 3, 0.5, (130, 24)), low_rank(130, 24))})
    weight = tensors[UP].double()
    if recipe == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        part = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    else:
        q, r = torch.linalg.qr(weight)
        part = 0.5 * q[:, :3] @ r[:3]
    for values in (base, tensors[UP].numpy()):
        close(one.delta(UP, values, dtype="float64"), dense(low_rank(130, 24)) - part, 1e-9)


def test_a_bias_from_a_weight_needs_the_whole_base(tmp_path: Path) -> None:
    tensors = base_weights()
    base = loraformat.open_checkpoint(save_base(tmp_path / "base", tensors, config()))
    one = adapter({BIAS: BiasFromWeight(UP, lazy(24, seed=6), 130), UP: low_rank(130, 24)})
    close(one.delta(BIAS, base, dtype="float64"), tensors[UP].double() @ lazy(24, seed=6).torch().double())
    with pytest.raises(UsageError, match="another weight"):
        one.delta(BIAS, tensors[BIAS].numpy())


TURNED: dict[str, Update] = {
    "dora": LowRank(lazy(72, 2), lazy(2, 24), 0.5, Magnitude(lazy(72, seed=3))),
    "tiled": BlockAffine(lazy(12, 6, 6)),
    "rotated": Rotated(lazy(12, 6, 6), "left"),
    "scaled": Scaled(lazy(72), lazy(24)),
    "low-rank": low_rank(72, 24),
}


@pytest.mark.parametrize("kind", TURNED)
def test_the_orientation_is_that_of_a_linear_layer(kind: str, tmp_path: Path) -> None:
    name = "h.0.attn.c_attn.weight"
    stored = torch.randn(24, 72, generator=torch.Generator().manual_seed(0))
    base = loraformat.open_checkpoint(save_base(tmp_path / "base", {name: stored}, {"model_type": "gpt2"}))
    one = adapter({name: TURNED[kind]})
    wanted = exact(stored.T, [TURNED[kind]])
    assert wanted.shape == (72, 24)
    close(one.delta(name, base, dtype="float64"), wanted)
    close(one.delta(name, stored.T.numpy(), dtype="float64"), wanted)


def test_olora_takes_its_part_of_the_matrix_as_it_is_stored(tmp_path: Path) -> None:
    name = "h.0.attn.c_attn.weight"
    stored = torch.randn(24, 72, generator=torch.Generator().manual_seed(0))
    base = loraformat.open_checkpoint(save_base(tmp_path / "base", {name: stored}, {"model_type": "gpt2"}))
    one = adapter({name: SubtractedInit("olora", 3, 0.5, (72, 24))}, fan_in_fan_out=True)
    q, r = torch.linalg.qr(stored.double())
    wanted = -(0.5 * q[:, :3] @ r[:3]).T
    close(one.delta(name, base, dtype="float64"), wanted, 1e-9)
    close(one.delta(name, stored.T.numpy(), dtype="float64"), wanted, 1e-9)


def test_a_stack_of_experts_and_a_convolution_keep_their_axes() -> None:
    stack = LowRank(lazy(3, 5, 2), lazy(3, 2, 4), 1.5)
    convolution = LowRank(lazy(4, 2), lazy(2, 3 * 4), 1.5, kernel=(2, 2))
    one = adapter({"mlp.experts.weight": stack, "stem.conv.weight": convolution})
    close(one.delta("mlp.experts.weight", dtype="float64"), dense(stack))
    close(one.delta("stem.conv.weight", dtype="float64"), dense(convolution))
    assert one.delta("stem.conv.weight").shape == (4, 3, 2, 2)


def test_what_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    base = loraformat.open_checkpoint(save_base(tmp_path / "base", base_weights(), config()))
    one = adapter({UP: Scaled(lazy(130)), "model.layers.0.q_proj.bias": Scaled(lazy(24), is_bias=True)})
    with pytest.raises(UsageError, match=r"no update for model\.layers\.1\.up_proj\.wieght.*did you mean"):
        one.delta("model.layers.1.up_proj.wieght")
    with pytest.raises(UsageError, match="kind scaled"):
        one.delta(UP)
    with pytest.raises(UsageError, match="expected a Checkpoint or an array, found str"):
        one.delta(UP, "base")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="dtype"):
        one.delta(UP, base, dtype="float16")
    with pytest.raises(UnmatchedUpdate, match="no such weight"):
        one.delta("model.layers.0.q_proj.bias", base)
    with pytest.raises(ShapeMismatch):
        one.delta(UP, np.zeros((24, 130)))
    with pytest.raises(ShapeMismatch):
        adapter({Q: Hadamard(lazy(4, 1), lazy(1, 6), lazy(4, 1), lazy(1, 6), 1.0)}).delta(Q, np.zeros((5, 6)))
    with pytest.raises(MergeError, match="scale is unknown"):
        adapter({UP: LowRank(lazy(4, 2), lazy(2, 4), None)}).delta(UP)
    with pytest.raises(ShapeMismatch, match="cannot be multiplied"):
        adapter({UP: LowRank(lazy(4, 2), lazy(3, 4), 1.0)}).delta(UP)
    with pytest.raises(NonFiniteValue):
        adapter({UP: Dense(LazyTensor.of(torch.tensor([[1.0, float("nan")]])))}).delta(UP)


def test_plain_lora_needs_no_torch() -> None:
    probe = (
        "import sys, loraformat\n"
        f"adapter = loraformat.load_adapter({str(FIXTURES / 'good' / 'peft' / 'rslora')!r})\n"
        "print(*[adapter.delta(weight).shape for weight in adapter.updates], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


LINEAR = ["wide", "tall", "square"]
ALL = [*LINEAR, "conv", "point"]
TUNERS = {
    "lora": Case("LoraConfig", {"target_modules": [*ALL, "embed"], "r": 3, "lora_alpha": 5}),
    "rslora": Case("LoraConfig", {"target_modules": LINEAR, "r": 3, "lora_alpha": 5, "use_rslora": True}),
    "lora-conv1d": Case("LoraConfig", {"target_modules": ["c_attn", "c_proj"], "r": 3, "fan_in_fan_out": True}, Gpt),
    "dora": Case("LoraConfig", {"target_modules": [*ALL, "embed"], "r": 3, "lora_alpha": 5, "use_dora": True}),
    "loha": Case("LoHaConfig", {"target_modules": ALL, "r": 3, "alpha": 5, "init_weights": False}),
    "lokr": Case("LoKrConfig", {"target_modules": ALL, "r": 2, "alpha": 5, "init_weights": False}),
    "ia3": Case("IA3Config", {"target_modules": [*LINEAR, "conv"], "feedforward_modules": ["tall"]}),
    "ia3-conv1d": Case(
        "IA3Config", {"target_modules": ["c_attn"], "feedforward_modules": [], "fan_in_fan_out": True}, Gpt
    ),
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_it_is_what_merging_with_peft_changes(tuner: str, tmp_path: Path) -> None:
    merged_by_peft, before = make(TUNERS[tuner], tmp_path), saved(tmp_path / "base")
    one = loraformat.load_adapter(tmp_path / "adapter", base=tmp_path / "base")
    base = loraformat.open_checkpoint(tmp_path / "base")
    weight_names = [name for name in one.updates if name in before]
    assert weight_names
    for name in weight_names:
        change = merged_by_peft[name] - before[name]
        is_turned = TUNERS[tuner].model is Gpt and change.ndim == 2
        # A difference of float32 values of some units.
        np.testing.assert_allclose(one.delta(name, base), (change.T if is_turned else change).numpy(), atol=2e-5)


@pytest.mark.parametrize("tuner", ["lora", "rslora", "dora", "loha", "lokr"])
def test_it_is_what_peft_calls_the_delta_weight(tuner: str, tmp_path: Path) -> None:
    """For DoRA get_delta_weight is s·BA; magnitude and norm are applied by `dora.py`, in float64 here."""
    import peft

    make(TUNERS[tuner], tmp_path)
    before = saved(tmp_path / "base")
    model = Net()
    model.load_state_dict(before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").base_model.model
    one = loraformat.load_adapter(tmp_path / "adapter")
    base = loraformat.open_checkpoint(tmp_path / "base")
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and name in TUNERS[tuner].fields["target_modules"]
    }
    assert layers.keys() == set(TUNERS[tuner].fields["target_modules"])
    for name, layer in layers.items():
        wanted, weight = layer.get_delta_weight("default").detach().double(), before[f"{name}.weight"].double()
        if tuner == "dora":
            axes = 0 if name == "embed" else tuple(range(1, weight.ndim))
            magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
            changed = weight + wanted
            norm = changed.pow(2).sum(dim=axes, keepdim=True).sqrt()
            wanted = magnitude.reshape(norm.shape) / norm * changed - weight
        np.testing.assert_allclose(one.delta(f"{name}.weight", base), wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_a_base_that_does_not_fit_is_refused_for_every_kind(tmp_path: Path) -> None:
    change = adapter({"q_proj.weight": low_rank(24, 8)})
    for wrong in (np.zeros((3, 3)), np.zeros(()), torch.zeros(8, 24)):
        with pytest.raises(ShapeMismatch):
            loraformat.delta(change, "q_proj.weight", wrong)
    for wrong in ("gpt2", np.array(["a"]), np.zeros((24, 8), complex)):
        with pytest.raises(UsageError):
            loraformat.delta(change, "q_proj.weight", wrong)
    with pytest.raises(NonFiniteValue):
        loraformat.delta(change, "q_proj.weight", np.full((24, 8), np.nan))
    for name in (3, []):
        with pytest.raises(UsageError):
            loraformat.delta(change, name)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="load_adapter"):
        loraformat.delta("path", "q_proj.weight")  # type: ignore[arg-type]


def test_values_of_torch_are_taken_in_any_dtype(tmp_path: Path) -> None:
    change = adapter({"q_proj.weight": low_rank(24, 8)})
    plain = loraformat.delta(change, "q_proj.weight")
    for values in (torch.zeros(24, 8, dtype=torch.bfloat16), torch.zeros(24, 8, requires_grad=True)):
        assert np.array_equal(loraformat.delta(change, "q_proj.weight", values), plain)


def test_a_delta_beyond_float32_is_refused() -> None:
    large = LowRank(LazyTensor.of(torch.full((2, 1), 1e30)), LazyTensor.of(torch.full((1, 2), 1e30)), 1.0)
    with pytest.raises(NonFiniteValue, match="float64"):
        loraformat.delta(adapter({"q_proj.weight": large}), "q_proj.weight")
    assert loraformat.delta(adapter({"q_proj.weight": large}), "q_proj.weight", dtype="float64").max() > 1e59
