"""A merge that is computed or planned wrongly does not get its name: the reference of `--verify` says otherwise."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merger.checkpoints import adapter, adapter_folder, config, low_rank, merge_and_tell, save_base, weights
from oracle import dense
from safetensors.torch import load_file, save_file

from loraformat.arithmetic import VARIABLE
from loraformat.containers import open_checkpoint
from loraformat.errors import MergeError
from loraformat.io import open_adapter
from loraformat.jobs.merge import merge
from loraformat.matching import names, rows
from loraformat.merger import AdapterSource, Arithmetic, Inputs, MergePlan, plan_merge
from loraformat.merger.compute import apply, computer, prepared
from loraformat.merger.compute import low_rank as products
from loraformat.merger.compute.kinds import sums
from loraformat.merger.compute.kinds.arithmetic import ARITHMETIC
from loraformat.merger.plan import edits, layer_replication, planner
from loraformat.merger.verify import check_output, reference
from loraformat.merger.write import other_files, run, tasks
from loraformat.model.adapter import Adapter
from loraformat.model.results.verbs import Checked
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Magnitude, Replace
from loraformat.storage import LocalStore

Q, UP = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight"
MODES = pytest.mark.parametrize("mode", ["sample", "full"])


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    tensors = weights(dtype=torch.bfloat16)
    base = save_base(tmp_path / "base", tensors, config(), shards=2)
    return str(base), str(adapter_folder(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in (Q, UP)}))


def refused(base: str, change: str, out: Path, match: str, **options: Any) -> None:
    """A merge that is refused, and leaves nothing."""
    with pytest.raises(MergeError, match=match):
        merge(base, [change], str(out), **options)
    assert not os.path.lexists(out)


@MODES
@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("strength", ["", "=0.5", "=-3"])
def test_what_is_right_passes(
    inputs: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    is_compiled: bool,
    strength: str,
) -> None:
    if not is_compiled:
        monkeypatch.setenv(VARIABLE, "numpy")
    report = merge(inputs[0], [inputs[1] + strength], str(tmp_path / "out"), verify=mode)
    assert report.data.checked == Checked(changed=2, followed=2, compared=2, copied=8, copies_compared=8, unscaled=0)


def factors(*shape: int) -> LazyTensor:
    return LazyTensor.of(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))


@pytest.mark.parametrize(
    "update",
    [
        Hadamard(factors(24, 3), factors(3, 24), factors(24, 2), factors(2, 24), 0.5),
        Kronecker((factors(4, 3),), (factors(6, 2), factors(2, 8)), 0.5),
        Dense(factors(24, 24), 2.0),
        low_rank(24, 24),
    ],
    ids=["hadamard", "kronecker", "difference", "low-rank"],
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_sum_is_added_as_strongly_as_the_caller_said(tmp_path: Path, update: Any, model_type: str) -> None:
    name, weight = "h.0.attn.c_attn.weight", torch.randn(24, 24)
    base = save_base(tmp_path / "base", {name: weight}, {"model_type": model_type})
    merge_and_tell(base, tmp_path / "out", adapter({name: update}), strengths=[-0.5])
    delta = dense(update).T if model_type == "gpt2" else dense(update)
    result = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.allclose(result.double(), weight.double() - 0.5 * delta, atol=1e-5)


@MODES
@pytest.mark.parametrize("is_product", [True, False], ids=["product", "steps"])
def test_a_flipped_sign_of_the_scale_is_found(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, is_product: bool
) -> None:
    if is_product:
        real = prepared.factors_of
        monkeypatch.setattr(prepared, "factors_of", lambda *given: (-real(*given)[0], real(*given)[1]))
    else:
        monkeypatch.setattr(prepared, "is_plain", lambda *_: False)
        stated = sums.stated_scale
        monkeypatch.setattr(sums, "stated_scale", lambda *given: -stated(*given))
    refused(
        *inputs,
        tmp_path / "out",
        r"(q|up)_proj\.weight: row \d+, column \d+ is .* the independent computation",
        verify=mode,
    )


@MODES
def test_a_dropped_strength_is_found(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    real = products._oriented
    monkeypatch.setattr(products, "_oriented", lambda term, opened: real(replace(term, strength=1.0), opened))
    refused(inputs[0], f"{inputs[1]}=0.5", tmp_path / "out", "the independent computation", verify=mode)


@MODES
def test_a_strength_that_the_steps_drop_is_found(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(prepared, "is_plain", lambda *_: False)
    monkeypatch.setitem(ARITHMETIC, LowRank, lambda update, place: sums.low_rank(update, replace(place, strength=1.0)))
    refused(inputs[0], f"{inputs[1]}=0.5", tmp_path / "out", "the independent computation", verify=mode)


@MODES
def test_a_strength_that_the_plan_drops_is_found(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    real = planner.edits_of
    monkeypatch.setattr(planner, "edits_of", lambda base, read, _strengths, same: real(base, read, [1.0], same))
    refused(inputs[0], f"{inputs[1]}=0.5", tmp_path / "out", "times 1, it must be .* times 0.5", verify=mode)


@MODES
def test_a_scale_by_another_formula_is_found(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("loraformat.formats.kit.scaling.Scaling.factor", lambda _, alpha, rank: alpha / rank**0.5)
    refused(*inputs, tmp_path / "out", r"merged with the scale 3\.46.* formula of its format it is 2", verify=mode)


def dora(rows: int, cols: int, axis: int = 1) -> LowRank:
    factors = low_rank(rows, cols)
    vector = torch.rand(rows if axis else cols, generator=torch.Generator().manual_seed(4)) + 1
    return LowRank(factors.up, factors.down, 0.5, Magnitude(LazyTensor.of(vector), axis), is_embedding=not axis)


def _norm_of_the_base(tile: Any, origin: Any, step: Any, norms: Any, low: int, high: int) -> None:
    lengths = np.linalg.norm(origin, axis=1, keepdims=True) if norms is None else norms
    tile += step.delta(low, high)
    tile *= (step.magnitude[low:high] if norms is None else step.magnitude) / lengths


def _without_factor(tile: Any, origin: Any, step: Any, norms: Any, low: int, high: int) -> None:
    tile += step.delta(low, high)


@pytest.mark.parametrize("wrong", [_norm_of_the_base, _without_factor])
def test_a_wrong_factor_of_dora_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., None]
) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config())
    merge_and_tell(base, tmp_path / "right", adapter({Q: dora(24, 24)}))
    monkeypatch.setattr(apply, "_add", wrong)
    with pytest.raises(MergeError, match=r"q_proj\.weight: row \d+, column \d+ is .* the independent computation"):
        merge_and_tell(base, tmp_path / "out", adapter({Q: dora(24, 24)}))


def test_norms_of_columns_that_leave_out_the_update_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config())
    change = adapter({"model.embed_tokens.weight": dora(70, 24, axis=0)})
    merge_and_tell(base, tmp_path / "right", change)

    def of_the_base(total: Any, window: Any, *_: Any) -> None:
        total += (window**2).sum(axis=0)

    monkeypatch.setattr(prepared, "add_column_squares", of_the_base)
    with pytest.raises(MergeError, match=r"embed_tokens\.weight: row"):
        merge_and_tell(base, tmp_path / "out", change)


def test_a_square_weight_that_is_wrongly_transposed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "h.0.attn.c_proj.weight"
    base = save_base(tmp_path / "base", {name: torch.randn(24, 24)}, {"model_type": "gpt2"})
    real = names.is_stored_transposed
    merge_and_tell(base, tmp_path / "right", adapter({name: low_rank(24, 24)}))
    monkeypatch.setattr(names, "is_stored_transposed", lambda *given: (not real(*given)[0], False))
    with pytest.raises(MergeError, match=r"c_proj\.weight: planned with .* as it is, .* it must be .* transposed"):
        merge_and_tell(base, tmp_path / "out", adapter({name: low_rank(24, 24)}))


def test_factors_that_are_transposed_the_wrong_way_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "h.0.attn.c_proj.weight"
    base = save_base(tmp_path / "base", {name: torch.randn(24, 24)}, {"model_type": "gpt2"})
    real = products._oriented
    monkeypatch.setattr(products, "_oriented", lambda term, opened: real(replace(term, transposed=False), opened))
    with pytest.raises(MergeError, match=r"c_proj\.weight: row \d+, column"):
        merge_and_tell(base, tmp_path / "out", adapter({name: low_rank(24, 24)}))


MEMORY, DISK = "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts"
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}


def stack_of_experts(rows: int, cols: int) -> LowRank:
    g = torch.Generator().manual_seed(3)
    up, down = torch.randn(3, rows, 2, generator=g), torch.randn(3, 2, cols, generator=g)
    return LowRank(LazyTensor.of(up), LazyTensor.of(down), 0.5)


@pytest.mark.parametrize("is_planned", [True, False])
def test_experts_that_get_the_update_of_their_neighbour_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_planned: bool
) -> None:
    base = save_base(tmp_path / "base", {f"{MEMORY}.down_proj": torch.randn(3, 20, 30)}, MIXTRAL)
    change = adapter({f"{MEMORY}.down_proj": stack_of_experts(20, 30)})
    merge_and_tell(base, tmp_path / "right", change)
    if is_planned:
        real = edits._for_each_expert

        def shifted(*given: Any) -> tuple[Any, ...]:
            parts = [term.part for term in real(*given)]
            return tuple(
                replace(term, part=replace(parts[n], expert=parts[n - 1].expert)) for n, term in enumerate(real(*given))
            )

        monkeypatch.setattr(edits, "_for_each_expert", shifted)
    else:

        def neighbour(update: Any, place: Any) -> Any:
            other = replace(place.part, expert=(place.part.expert + 1) % 3)
            return sums.low_rank(update, replace(place, part=other))

        monkeypatch.setitem(ARITHMETIC, LowRank, neighbour)
    with pytest.raises(MergeError, match=r"down_proj: (planned with .* of expert 2 .* of expert 0|row \d+, column)"):
        merge_and_tell(base, tmp_path / "out", change)


def test_experts_that_are_stored_apart_and_counted_from_one_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"{DISK}.{n}.w2.weight": torch.randn(20, 30) for n in range(3)}
    base = save_base(tmp_path / "base", tensors, MIXTRAL)
    change = adapter({f"{MEMORY}.down_proj": stack_of_experts(20, 30)})
    merge_and_tell(base, tmp_path / "right", change)
    real = rows._joined

    def from_one(several: Any, expert: int | None = None) -> Any:
        return real(several, None if expert is None else (expert + 1) % 3)

    monkeypatch.setattr(rows, "_joined", from_one)
    with pytest.raises(MergeError, match=r"w2\.weight: planned with .* of expert 1 .* of expert 0"):
        merge_and_tell(base, tmp_path / "out", change)


def test_a_matrix_of_a_stack_that_lands_on_the_next_expert_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", {f"{MEMORY}.gate_up_proj": torch.randn(3, 40, 24)}, MIXTRAL)
    change = adapter({f"{DISK}.1.w3.weight": low_rank(20, 24)})
    merge_and_tell(base, tmp_path / "right", change)
    real = rows._slice_of_stack
    monkeypatch.setattr(rows, "_slice_of_stack", lambda spelled, home: real(replace(spelled, expert=2), home))
    with pytest.raises(MergeError, match=r"gate_up_proj: planned with .* at 100, .* must be .* row 0 at 60"):
        merge_and_tell(base, tmp_path / "out", change)


def test_rows_of_a_joined_weight_that_are_exchanged_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    base = save_base(tmp_path / "base", {"mlp.weights_in.weight": torch.randn(40, 24)}, settings)
    change = adapter({"mlp.gate_proj.weight": low_rank(20, 24)})
    merge_and_tell(base, tmp_path / "right", change)
    real = rows._cut

    def exchanged(name: str, stored: Any) -> Any:
        first, second = stored.spelled.names
        return real(second if name == first else first, stored)

    monkeypatch.setattr(rows, "_cut", exchanged)
    with pytest.raises(MergeError, match=r"weights_in\.weight: planned with .* row 0 at 20, .* must be .* row 0 at 0"):
        merge_and_tell(base, tmp_path / "out", change)


def test_rows_that_are_added_in_another_place_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    base = save_base(tmp_path / "base", {"mlp.weights_in.weight": torch.randn(40, 24)}, settings)

    def moved(update: Any, place: Any) -> Any:
        return sums.low_rank(update, replace(place, part=replace(place.part, at=20 - place.part.at)))

    monkeypatch.setitem(ARITHMETIC, LowRank, moved)
    with pytest.raises(MergeError, match=r"weights_in\.weight: row \d+, column"):
        merge_and_tell(base, tmp_path / "out", adapter({"mlp.gate_proj.weight": low_rank(20, 24)}))


def test_layers_that_are_repeated_in_another_order_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", weights(), config(num_hidden_layers=2))
    change = adapter({"model.layers.2.q_proj.weight": low_rank(24, 24)}, layers=(0, 1, 1))
    merge_and_tell(base, tmp_path / "right", change)
    real = layer_replication.replicated
    monkeypatch.setattr(layer_replication, "replicated", lambda of, layers: real(of, layers and layers[::-1]))
    with pytest.raises(MergeError, match=r"layers\.[02]"):
        merge_and_tell(base, tmp_path / "out", change)


@MODES
def test_an_update_that_is_left_out_is_found(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    real = planner.edits_of

    def without(*given: Any) -> Any:
        found = real(*given)
        return replace(found, edits={name: edit for name, edit in found.edits.items() if name != UP})

    monkeypatch.setattr(planner, "edits_of", without)
    refused(*inputs, tmp_path / "out", rf"{UP}: planned as a copy, it must change", verify=mode)


@MODES
def test_a_tensor_that_no_update_reaches_and_that_is_computed_is_found(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    real, other = planner.edits_of, "model.layers.1.q_proj.weight"

    def more(*given: Any) -> Any:
        found = real(*given)
        edit = replace(found.edits[Q], tensor=other, source=other)
        return replace(found, edits={**found.edits, other: edit})

    monkeypatch.setattr(planner, "edits_of", more)
    refused(*inputs, tmp_path / "out", rf"{other}: it must be a copy", verify=mode)


def test_a_head_that_must_leave_its_table_and_does_not_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", weights(tied=True), config(tied=True))
    change = adapter({"model.embed_tokens.weight": low_rank(70, 24)})
    merge_and_tell(base, tmp_path / "right", change)
    real = planner.edits_of

    def tied(*given: Any) -> Any:
        found = real(*given)
        return replace(found, edits={name: edit for name, edit in found.edits.items() if name != "lm_head.weight"})

    monkeypatch.setattr(planner, "edits_of", tied)
    with pytest.raises(MergeError, match=r"lm_head\.weight: the output lacks this tensor"):
        merge_and_tell(base, tmp_path / "out", change)


def described(kind: str, place: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A base, an adapter and options with which the files beside the weights must change."""
    tensors, options = weights(tied=kind == "tie"), {}
    settings = config(tied=kind == "tie", torch_dtype="float32")
    change = adapter_folder(place / "adapter", {Q: tuple(tensors[Q].shape)})
    file = change / "adapter_model.safetensors"
    prefix = "base_model.model."
    if kind == "tie":
        factors = {"lora_A": torch.ones(3, 24), "lora_B": torch.ones(70, 3)}
        save_file({f"{prefix}lm_head.{name}.weight": factor for name, factor in factors.items()}, file)
        (change / "adapter_config.json").write_text(
            (change / "adapter_config.json").read_text().replace("q_proj", "lm_head")
        )
    elif kind == "vocabulary":
        tables = {f"{prefix}{name}.weight": torch.ones(75, 24) for name in ("model.embed_tokens", "lm_head")}
        save_file({**load_file(file), **tables}, file)
    elif kind == "tokenizer":
        (change / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    else:
        options = {"dtype": "bfloat16"}
    return save_base(place / "base", tensors, settings, shards=2), change, options


@MODES
@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("tie", r"config\.json: tie_word_embeddings is True, it must be False"),
        ("vocabulary", r"config\.json: vocab_size is 70, it must be 75"),
        ("dtype", r"config\.json: torch_dtype is 'float32', it must be 'bfloat16'"),
        ("tokenizer", r"tokenizer\.json: it is not the adapter's"),
        ("index", r"index\.json: it does not name the files"),
    ],
)
def test_files_beside_the_weights_that_say_something_else_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, match: str, mode: str
) -> None:
    """The weights are right, and the model that is loaded with these files is another one."""
    base, change, options = described(kind, tmp_path)
    merge(str(base), [str(change)], str(tmp_path / "right"), verify=mode, **options)
    real = run.write_others

    def wrong(plan: MergePlan, inputs: Inputs, output: LocalStore) -> Any:
        runs = real(plan, inputs, output)
        for name in ("config.json", "tokenizer.json"):
            other_files.put(output, name, (base / name).read_bytes())
        if kind == "index":
            index = output.read(str(plan.index)).replace(b"00001", b"00003").replace(b"00002", b"00001")
            other_files.put(output, str(plan.index), index)
        if kind != "tokenizer" and "tokenizer.json" in inputs.adapters[0].tokenizer:
            other_files.put(output, "tokenizer.json", inputs.adapters[0].tokenizer["tokenizer.json"].read())
        if kind in ("index", "tokenizer"):
            other_files.put(output, "config.json", (tmp_path / "right" / "config.json").read_bytes())
        return runs

    monkeypatch.setattr(run, "write_others", wrong)
    refused(str(base), str(change), tmp_path / "out", match, verify=mode, **options)


@MODES
@pytest.mark.parametrize("options", [{"max_shard_nbytes": 20_000}, {"container": "torch"}], ids=["divided", "torch"])
def test_a_tensor_that_is_copied_from_the_wrong_place_is_found(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, options: dict[str, Any]
) -> None:
    merge(inputs[0], [inputs[1]], str(tmp_path / "right"), verify=mode, **options)
    blocks, write = tasks.copy_blocks, tasks.Target.write

    def from_before(writer: Any, store: Any, file: str, place: int, *more: Any) -> None:
        blocks(writer, store, file, place - 2, *more)

    def one_late(target: Any, tensor: str, data: Any, start: int, cols: int) -> Any:
        moved = data if tensor in (Q, UP) else memoryview(bytes(data[2:]) + bytes(data[:2]))
        return write(target, tensor, moved, start, cols)

    monkeypatch.setattr(tasks, "copy_blocks", from_before)
    monkeypatch.setattr(tasks.Target, "write", one_late)
    refused(*inputs, tmp_path / "out", "the copy differs from the base", verify=mode, **options)


@pytest.fixture(params=["nearest", "stochastic"])
def checked(inputs: tuple[str, str], tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[], None]:
    """A right output, and how to check all of its values without the digests of what was written."""
    base, change = inputs
    merge(base, [change], str(tmp_path / "out"), rounding=request.param)
    opened, adapters = open_checkpoint(base), [open_adapter(change).adapter]
    plan = plan_merge(opened, adapters, [AdapterSource(change, "peft")], arithmetic=Arithmetic(rounding=request.param))

    def check() -> None:
        check_output(plan, Inputs(base=opened, adapters=adapters), LocalStore(str(tmp_path / "out")), full=True)

    check()
    return check


def changed(out: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change the values of a tensor of an output."""
    (path,) = [path for path in out.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("ulps", [-2, 2])
def test_a_value_two_units_away_is_found_by_its_value_alone(
    checked: Callable[[], None], tmp_path: Path, ulps: int
) -> None:
    def move(tensor: torch.Tensor) -> None:
        tensor.view(torch.int16)[101, 7] += ulps

    changed(tmp_path / "out", UP, move)
    with pytest.raises(MergeError, match=rf"{UP}: row 101, column 7 is .* the independent computation"):
        checked()


def test_a_copy_that_changed_is_found_by_its_bytes_alone(checked: Callable[[], None], tmp_path: Path) -> None:
    def move(tensor: torch.Tensor) -> None:
        tensor.view(torch.int16)[3] ^= 1

    changed(tmp_path / "out", "model.layers.1.norm.weight", move)
    with pytest.raises(MergeError, match=r"layers\.1\.norm\.weight: the copy differs from the base"):
        checked()


def test_what_rounds_to_the_nearest_must_be_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit in the last place away is too far for it, and near enough for what is rounded at random."""
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config())
    product = Hadamard(*(factor for _ in range(2) for factor in (low_rank(24, 24).up, low_rank(24, 24).down)), 0.5)
    change = adapter({Q: product})
    merge_and_tell(base, tmp_path / "right", change)
    real = computer.finish

    def upward(raw: Any, dtype: Any, result: Any, update: Any, written: Any, out: Any) -> Any:
        tallies = real(raw, dtype, result, update, written, out)
        bits = np.frombuffer(written, np.uint16).reshape(result.shape)
        values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).double().numpy()
        bits += np.where(values < result, np.where(values > 0, 1, -1), 0).astype(np.uint16)
        return tallies

    monkeypatch.setattr(computer, "finish", upward)
    with pytest.raises(MergeError, match=r"q_proj\.weight: row"):
        merge_and_tell(base, tmp_path / "out", change)


def counts(base: Path, *changes: Adapter) -> reference.Reference:
    opened = open_checkpoint(str(base))
    plan = plan_merge(opened, changes, [AdapterSource("memory", "none") for _ in changes])
    return reference.reference_of(plan, Inputs(base=opened, adapters=changes))


def test_names_that_two_prefixes_explain_are_counted_as_not_followed(tmp_path: Path) -> None:
    tensors = {"a.q_proj.weight": torch.zeros(4, 4), "b.q_proj.weight": torch.zeros(4, 4)}
    base = save_base(tmp_path / "base", tensors, {})
    opened = open_checkpoint(str(base))
    right = adapter({"a.q_proj.weight": low_rank(4, 4)})
    plan = plan_merge(opened, [right], [AdapterSource("memory", "none")])
    unclear = adapter({"q_proj.weight": low_rank(4, 4)})
    found = reference.reference_of(plan, Inputs(base=opened, adapters=[unclear]))
    assert found.unfollowed == {0: "2 prefixes lead from q_proj.weight to the base's names"}


def test_updates_without_a_formula_are_counted(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    norm = Replace(LazyTensor.of(torch.ones(24)))
    found = counts(base, adapter({Q: low_rank(24, 24), "model.layers.0.norm.weight": norm}))
    assert found.unscaled == 1


# What of the merger the reference may know: types of data.
_DATA = {"AdapterSource", "Arithmetic", "Edit", "Inputs", "MergePlan", "Term"}


def test_the_reference_shares_nothing_with_what_plans_and_computes_but_types() -> None:
    folder = Path(reference.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("loraformat") for name in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loraformat."):
                package, _, rest = str(node.module).removeprefix("loraformat.").partition(".")
                assert package in ("budget", "containers", "errors", "merger", "model", "naming", "strict_json"), path
                if package == "merger" and not rest.startswith("verify.reference"):
                    assert {name.name for name in node.names} <= _DATA, path
