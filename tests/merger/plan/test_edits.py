"""Merges onto weights stored in parts, stacks of experts, repeated layers and decomposed bases; strengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, contents, load, low_rank, merge, save_base, weights
from torch import Tensor

from loraformat import schema
from loraformat.containers import open_checkpoint
from loraformat.errors import MergeError, ShapeMismatch, UnmatchedUpdate, UnsupportedUpdate
from loraformat.merger import AdapterSource, plan_merge
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank, Magnitude, Replace, Rows, SubtractedInit

MEMORY, DISK = "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts"
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
Q = "model.layers.0.q_proj.weight"


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack(experts: int, rows: int, cols: int, scale: float = 0.5) -> LowRank:
    return LowRank(LazyTensor.of(random(experts, rows, 3)), LazyTensor.of(random(experts, 3, cols)), scale)


def dense(update: LowRank) -> Tensor:
    return update.scale * (update.up.torch() @ update.down.torch())


def per_expert(rows: int = 75, cols: int = 20) -> dict[str, Tensor]:
    """Three experts whose rows are no whole tiles."""
    shapes = {"w1": (rows, cols), "w3": (rows, cols), "w2": (cols, rows)}
    return {
        f"{DISK}.{n}.{name}.weight": random(*shape, seed=10 * n + len(name))
        for n in range(3)
        for name, shape in shapes.items()
    }


def test_one_stack_is_merged_into_many_tensors(tmp_path: Path) -> None:
    tensors = per_expert()
    base = save_base(tmp_path / "base", tensors, MIXTRAL)
    gate_up, down = stack(3, 150, 20), stack(3, 20, 75)
    result = load(
        merge(base, tmp_path / "out", adapter({f"{MEMORY}.gate_up_proj": gate_up, f"{MEMORY}.down_proj": down}))
    )
    for n in range(3):
        halves = dict(zip(("w1", "w3"), dense(gate_up)[n].chunk(2), strict=True))
        for name, delta in {**halves, "w2": dense(down)[n]}.items():
            expected = tensors[f"{DISK}.{n}.{name}.weight"] + delta
            assert torch.allclose(result[f"{DISK}.{n}.{name}.weight"], expected, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_is_merged_into_a_stack(tmp_path: Path, transposed: bool) -> None:
    weight = random(3, 20, 75) if transposed else random(3, 75, 20)
    base = save_base(tmp_path / "base", {"e.w": weight}, {"model_type": "gpt_oss"})
    update = stack(3, 75, 20)
    result = load(merge(base, tmp_path / "out", adapter({"e.w": update})))["e.w"]
    delta = dense(update).transpose(1, 2) if transposed else dense(update)
    assert torch.allclose(result, weight + delta, atol=1e-5)


def torch_base(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A base of one `.pt` file, whose tensors are stored as they are in memory."""
    save_base(folder, {"x": torch.ones(1)}, {})
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("memory_nbytes", [1, 1 << 24])
def test_a_stack_that_is_a_view_of_a_larger_one_is_merged(tmp_path: Path, memory_nbytes: int) -> None:
    """Its rows stand at equal distances in the file, which is compared with the reference too."""
    whole = random(3, 75, 40)
    base = torch_base(tmp_path / "base", {"whole": whole, "e.w": whole[:, :, ::2]})
    update = stack(3, 75, 20)
    out = merge(base, tmp_path / "out", adapter({"e.w": update}), container="safetensors", memory_nbytes=memory_nbytes)
    assert torch.allclose(load(out)["e.w"], whole[:, :, ::2] + dense(update), atol=1e-5)
    assert torch.equal(load(out)["whole"], whole)


def test_a_stack_whose_rows_stand_at_other_distances_is_refused(tmp_path: Path) -> None:
    base = torch_base(tmp_path / "base", {"e.w": random(3, 20, 75).transpose(1, 2)})
    with pytest.raises(UnsupportedUpdate, match="a stack of experts that is not stored contiguously"):
        merge(base, tmp_path / "out", adapter({"e.w": stack(3, 75, 20)}), container="safetensors")


def test_single_experts_are_merged_into_a_stack(tmp_path: Path) -> None:
    weight = random(3, 150, 20)
    base = save_base(tmp_path / "base", {f"{MEMORY}.gate_up_proj": weight}, MIXTRAL)
    vector = Magnitude(LazyTensor.of(torch.rand(75) + 1))
    factors = low_rank(75, 20)
    dora = LowRank(factors.up, factors.down, 0.5, vector)
    updates = {f"{DISK}.{place}.weight": low_rank(75, 20) for place in ("0.w1", "1.w3")}
    changes = adapter({**updates, f"{DISK}.2.w1.weight": dora})
    result = load(merge(base, tmp_path / "out", changes))[f"{MEMORY}.gate_up_proj"]
    expected = weight.clone()
    expected[0, :75] += dense(factors)
    expected[1, 75:] += dense(factors)
    moved = expected[2, :75] + dense(factors)
    expected[2, :75] = vector.vector.torch()[:, None] * moved / moved.norm(dim=1, keepdim=True)
    assert torch.allclose(result, expected, atol=1e-5)


def test_neither_threads_nor_memory_change_a_byte_of_parts_and_stacks(tmp_path: Path) -> None:
    tensors = {**per_expert(), "e.w": random(3, 75, 20)}
    base = save_base(tmp_path / "base", {n: t.bfloat16() for n, t in tensors.items()}, MIXTRAL, shards=2)
    change = adapter({f"{MEMORY}.gate_up_proj": stack(3, 150, 20), "e.w": stack(3, 75, 20)})
    first = contents(merge(base, tmp_path / "a", change))
    for number, (jobs, memory) in enumerate([(1, 1), (2, 1), (4, 1 << 18)]):
        assert contents(merge(base, tmp_path / f"b{number}", change, jobs=jobs, memory_nbytes=memory)) == first


def test_a_bias_of_a_cut_weight_is_cut_too(tmp_path: Path) -> None:
    settings = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    bias = random(6)
    base = save_base(tmp_path / "base", {"mlp.weights_in.bias": bias}, settings)
    for number, (name, ones) in enumerate({"gate": [1, 1, 1, 0, 0, 0], "up": [0, 0, 0, 1, 1, 1]}.items()):
        change = adapter({f"mlp.{name}_proj.bias": Dense(LazyTensor.of(torch.ones(3)))})
        result = load(merge(base, tmp_path / f"out{number}", change))["mlp.weights_in.bias"]
        assert torch.equal(result, bias + torch.tensor(ones))
        with pytest.raises(UnsupportedUpdate, match="stores it in parts"):
            merge(base, tmp_path / "no", adapter({f"mlp.{name}_proj.bias": Replace(LazyTensor.of(torch.ones(3)))}))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("recipe", ["pissa", "kasa", "olora"])
def test_what_an_initialization_took_off_is_taken_off_again(tmp_path: Path, recipe: str, transposed: bool) -> None:
    weight = random(30, 70)
    settings = {"model_type": "gpt2"} if transposed else config()
    name = "h.0.attn.c_attn.weight" if transposed else Q
    base = save_base(tmp_path / "base", {name: weight}, settings)
    shape = (70, 30) if transposed else (30, 70)
    change = adapter({name: (SubtractedInit(recipe, 4, 2.0, shape), low_rank(*shape, scale=2.0))})
    result = load(merge(base, tmp_path / "out", change))[name]
    left, values, right = torch.linalg.svd(weight.double())
    if recipe == "olora":
        q, r = torch.linalg.qr(weight.double())
        part = 2 * q[:, :4] @ r[:4]
    else:
        kept = slice(0, 4) if recipe == "pissa" else slice(26, 30)
        part = left[:, kept] * values[kept] @ right[:30][kept]
    delta = dense(low_rank(*shape, scale=2.0))
    assert torch.allclose(result.double(), weight - part + (delta.T if transposed else delta), atol=1e-4)


def test_repeated_layers_are_written_as_layers_of_their_own(tmp_path: Path) -> None:
    tensors = weights()
    base = save_base(tmp_path / "base", tensors, config(num_hidden_layers=2), shards=2)
    changes = adapter({f"model.layers.{n}.q_proj.weight": low_rank(24, 24, seed=n) for n in (1, 2)}, layers=(0, 1, 1))
    out = tmp_path / "out"
    result = load(merge(base, out, changes))
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    for n, source in enumerate((0, 1, 1)):
        expected = tensors[f"model.layers.{source}.q_proj.weight"]
        expected = expected + dense(low_rank(24, 24, seed=n)) if n else expected
        assert torch.allclose(result[f"model.layers.{n}.q_proj.weight"], expected, atol=1e-5)
        assert torch.equal(result[f"model.layers.{n}.norm.weight"], tensors[f"model.layers.{source}.norm.weight"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == result.keys()


def test_adapters_on_different_stacks_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config(num_hidden_layers=2))
    repeated, plain = adapter({Q: low_rank(24, 24)}, layers=(0, 0)), adapter({Q: low_rank(24, 24)})
    with pytest.raises(MergeError, match="different stacks"):
        merge(base, tmp_path / "out", repeated, plain)


def test_strengths_scale_what_is_added_and_are_summed_before_rounding(tmp_path: Path) -> None:
    tensors = weights(dtype=torch.bfloat16)
    base = open_checkpoint(str(save_base(tmp_path / "base", tensors, config())))
    one, two = adapter({Q: low_rank(24, 24)}), adapter({Q: low_rank(24, 24, seed=6)})
    plan = plan_merge(base, [one, two], [AdapterSource("a", "x", strength=0.7), AdapterSource("b", "x", strength=-2.0)])
    assert [(term.adapter, term.strength) for term in plan.edits[0].terms] == [(0, 0.7), (1, -2.0)]


@pytest.mark.parametrize(
    "update",
    [
        Replace(LazyTensor.of(torch.zeros(24, 24))),
        LowRank(
            LazyTensor.of(torch.ones(24, 2)),
            LazyTensor.of(torch.ones(2, 24)),
            1.0,
            Magnitude(LazyTensor.of(torch.ones(24))),
        ),
        SubtractedInit("pissa", 2, 1.0, (24, 24)),
    ],
    ids=["replace", "dora", "from-base"],
)
def test_what_is_no_sum_has_no_strength(tmp_path: Path, update: Replace | LowRank | SubtractedInit) -> None:
    base = open_checkpoint(str(save_base(tmp_path / "base", weights(), config())))
    with pytest.raises(UnsupportedUpdate, match=r"q_proj.*cannot be merged at a strength of 0\.5"):
        plan_merge(base, [adapter({Q: update})], [AdapterSource("a", "x", strength=0.5)])


def test_a_plan_of_parts_follows_its_schema(tmp_path: Path) -> None:
    base = open_checkpoint(str(save_base(tmp_path / "base", {**per_expert(), "e.w": random(3, 75, 20)}, MIXTRAL)))
    change = adapter({f"{MEMORY}.gate_up_proj": stack(3, 150, 20), "e.w": stack(3, 75, 20)})
    plan = json.loads(json.dumps(plan_merge(base, [change], [AdapterSource("a", "x", strength=0.5)]).to_json()))
    assert list(schema.check("merge-plan", plan)) == []
    (edits,) = [shard["edits"] for shard in plan["shards"]]
    assert {edit["row_axes"] for edit in edits} == {1, 2}


@pytest.mark.parametrize("rows", [(71,), (70, 72), (3, 71)])
def test_rows_behind_the_end_of_a_table_are_without_gaps(tmp_path: Path, rows: tuple[int, ...]) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    change = adapter({"model.embed_tokens.weight": Rows(rows, LazyTensor.of(random(len(rows), 24)))})
    first = min(row for row in rows if row >= 70)
    with pytest.raises(ShapeMismatch, match=f"the adapter has row {first}, but the table has 70 rows and those"):
        merge(base, tmp_path / "out", change)


def test_what_lands_nowhere_or_does_not_fit_is_counted_and_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    right, wide = low_rank(24, 24), low_rank(24, 25)
    with pytest.raises(
        UnmatchedUpdate, match=r"matches 2 of 3 updates, first model\.layers\.8.*; nearest in the base: "
    ):
        merge(base, tmp_path / "out", adapter({Q: right, **{Q.replace("0", n): right for n in ("8", "9")}}))
    with pytest.raises(
        ShapeMismatch, match=r"q_proj\.weight: the update is \(24, 25\), but the base weight is \(24, 24\) \("
    ):
        merge(base, tmp_path / "out", adapter({Q: wide}))
    with pytest.raises(ShapeMismatch, match=r"^merge: adapter 2: .*\(24, 24\), and 1 more do not fit"):
        merge(base, tmp_path / "out", adapter({Q: right}), adapter({Q: wide, Q.replace("0", "1"): wide}))


def test_two_adapters_that_replace_the_same_tensor_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    full, right = adapter({Q: Replace(LazyTensor.of(random(24, 24)))}), adapter({Q: low_rank(24, 24)})
    with pytest.raises(MergeError, match=r"q_proj\.weight: adapters 1, 3 each replace the whole tensor"):
        merge(base, tmp_path / "out", full, right, full)
    result = load(merge(base, tmp_path / "one", full, right))[Q]
    assert torch.allclose(result, random(24, 24) + dense(low_rank(24, 24)), atol=1e-5)
