"""A quantization scheme is one module and one line: a toy, registered here alone, is read and written by every verb."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from merger.checkpoints import adapter as in_memory
from merger.checkpoints import contents, load, merge_and_tell
from numpy.typing import NDArray
from quantized_bases import (
    HIDDEN,
    QUANTIZED,
    TOUCHED,
    UP,
    Q,
    adapter,
    coded_tensors,
    dense_tensors,
    exact,
    factors,
    merged,
    quantized_base,
    rounded,
    written_config,
)
from safetensors.torch import load_file, save_file
from toy_scheme import Toy, Transposed

import loraformat
from loraformat.cli import main
from loraformat.containers import open_checkpoint
from loraformat.containers.quantized import SCHEMES, reference_rows
from loraformat.errors import FormatError, MergeError, UnsupportedUpdate, UsageError
from loraformat.jobs.diff import diff
from loraformat.jobs.estimate import estimate
from loraformat.jobs.verify import verify
from loraformat.merger import FileTask, MergePlan, execute, tasks_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.low_rank import LowRank, Magnitude


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "toy", Toy())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("group", [5, HIDDEN])
def test_merged_dense(tmp_path: Path, shards: int, group: int) -> None:
    base, change, out = quantized_base(tmp_path / "b", group, shards=shards), adapter(tmp_path / "a"), tmp_path / "o"
    loraformat.merge(str(base), [str(change)], str(out), dequantize=True, verify="full")
    found = load(out)
    assert found.keys() == {f"{module}.weight" for module in QUANTIZED} | dense_tensors().keys()
    for module in QUANTIZED:
        assert torch.equal(found[f"{module}.weight"], rounded(merged(module, group), torch.bfloat16))
    for name, value in dense_tensors().items():
        assert torch.equal(found[name], value)
    said = written_config(out)
    assert "quantization_config" not in said
    assert (said["torch_dtype"], said["kept"]) == ("bfloat16", {"a": [1]})
    assert not (out / "quant_config.json").exists()
    if shards == 2:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == dict.fromkeys(found, "model-00001-of-00002.safetensors")
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
        assert not (out / "model-00002-of-00002.safetensors").exists()
    assert open_checkpoint(str(out)).quantized is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merged_dense_in_another_dtype(tmp_path: Path, dtype: str) -> None:
    base, change, out = quantized_base(tmp_path / "b"), adapter(tmp_path / "a"), tmp_path / "o"
    loraformat.merge(str(base), [str(change)], str(out), dequantize=True, dtype=dtype, verify="full")
    found, wanted = load(out), getattr(torch, dtype)
    for module in QUANTIZED:
        assert torch.equal(found[f"{module}.weight"], rounded(merged(module), wanted))
    assert {value.dtype for value in found.values()} == {wanted}
    assert written_config(out)["torch_dtype"] == dtype


def test_a_dense_output_states_the_dtype_that_the_base_did_not(tmp_path: Path) -> None:
    base, change = quantized_base(tmp_path / "b", torch_dtype=None), adapter(tmp_path / "a")
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), dequantize=True)
    assert written_config(tmp_path / "o")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("shards", [1, 2])
def test_merged_with_the_codes_of_untouched_weights(tmp_path: Path, shards: int) -> None:
    base, change, out = quantized_base(tmp_path / "b", shards=shards), adapter(tmp_path / "a"), tmp_path / "o"
    loraformat.merge(str(base), [str(change)], str(out), keep_quantized=True, verify="full")
    found, before = load(out), load(base)
    kept = {name: value for name, value in before.items() if not name.startswith(TOUCHED)}
    assert found.keys() == kept.keys() | {f"{module}.weight" for module in TOUCHED}
    assert all(torch.equal(found[name], value) for name, value in kept.items())
    for module in TOUCHED:
        assert torch.equal(found[f"{module}.weight"], rounded(merged(module), torch.bfloat16))
    listed = ["lm_head", *TOUCHED]
    assert sorted(written_config(out)["quantization_config"]["modules_to_not_convert"]) == sorted(listed)
    assert written_config(out)["kept"] == {"a": [1]}
    beside = json.loads((out / "quant_config.json").read_text())
    assert sorted(beside["modules_to_not_convert"]) == sorted(listed)
    again = open_checkpoint(str(out))
    assert again.quantized is not None
    assert again.quantized.weights.keys() == {f"{module}.weight" for module in QUANTIZED if module not in TOUCHED}
    if shards == 2:
        weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert weight_map == {name: path.name for path in out.glob("*.safetensors") for name in load_file(path)}


def test_what_the_scheme_loads_as_one_becomes_dense_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused(Toy):
        def together(self, touched: Any, weights: Any) -> Any:
            layers = {name.split(".")[2] for name in touched}
            return {name for name in weights if name.split(".")[2] in layers}

    monkeypatch.setitem(SCHEMES, "toy", Fused())
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a", TOUCHED[:1])
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), keep_quantized=True, verify="full")
    found = load(tmp_path / "o")
    assert torch.equal(found[f"{UP.format(0)}.weight"], rounded(exact(UP.format(0)), torch.bfloat16))
    assert f"{UP.format(1)}.qweight" in found


def test_all_weights_touched_leave_nothing_quantized(tmp_path: Path) -> None:
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a", tuple(QUANTIZED))
    for name, options in {"kept": {"keep_quantized": True}, "dense": {"dequantize": True}}.items():
        loraformat.merge(str(base), [str(change)], str(tmp_path / name), verify="full", **options)  # type: ignore[arg-type]
    one, other = contents(tmp_path / "kept"), contents(tmp_path / "dense")
    differ = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert differ == {"loraformat.manifest.json"}


def test_neither_option_is_refused_with_both_named(tmp_path: Path) -> None:
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a")
    with pytest.raises(UnsupportedUpdate, match=r"toy.*2 weights are.*q_proj\.weight") as error:
        loraformat.merge(str(base), [str(change)], str(tmp_path / "o"))
    assert {"--dequantize", "--keep-quantized"} <= set(str(error.value.hint).replace(",", "").split())
    assert not (tmp_path / "o").exists()


def test_dense_weights_need_no_option_and_the_rest_is_copied(tmp_path: Path) -> None:
    base, change, out = quantized_base(tmp_path / "b"), adapter(tmp_path / "a", ("lm_head",)), tmp_path / "o"
    loraformat.merge(str(base), [str(change)], str(out), verify="full")
    found, before = load(out), load(base)
    assert [name for name in before if not torch.equal(found[name], before[name])] == ["lm_head.weight"]
    for name in ("config.json", "quant_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_the_options_need_a_base_that_is_quantized_by_a_scheme_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a", ("lm_head",))
    loraformat.merge(str(base), [str(change)], str(tmp_path / "dense"), dequantize=True)
    for options in ({"dequantize": True}, {"keep_quantized": True}):
        with pytest.raises(UsageError, match="not quantized"):
            loraformat.merge(str(tmp_path / "dense"), [str(change)], str(tmp_path / "o"), **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot be combined"):
        loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), dequantize=True, keep_quantized=True)
    monkeypatch.delitem(SCHEMES, "toy")
    with pytest.raises(UnsupportedUpdate, match="toy"):
        loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), dequantize=True)
    assert not (tmp_path / "o").exists()


def test_validate_compares_the_weights_that_the_codes_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a")
    report = loraformat.validate(str(change), base=str(base))
    assert not {"LF301", "LF302", "LF309"} & {finding.code for finding in report.findings}
    tensors = load_file(change / "adapter_model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((change / "adapter_config.json").read_bytes())
    short = {name: value[:, :8].clone() if "lora_A" in name else value for name, value in tensors.items()}
    save_file(short, broken / "adapter_model.safetensors")
    assert "LF302" in {finding.code for finding in loraformat.validate(str(broken), base=str(base)).findings}
    monkeypatch.delitem(SCHEMES, "toy")
    assert "LF309" in {finding.code for finding in loraformat.validate(str(change), base=str(base)).findings}


def test_inspect_measures_against_the_weights_that_the_codes_mean(tmp_path: Path) -> None:
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a")
    report = loraformat.inspect(str(change), base=str(base), norms=True)
    found = {record.weight: record.relative_norm for record in report.data.weights}
    for module in TOUCHED:
        down, up = (factor.double().numpy() for factor in factors()[module])
        wanted = np.linalg.norm(2.0 * up @ down) / np.linalg.norm(exact(module))
        assert found[f"{module}.weight"] == pytest.approx(wanted, rel=1e-5)


def test_diff_compares_with_a_dense_model_and_with_itself(tmp_path: Path) -> None:
    base, change, out = quantized_base(tmp_path / "b"), adapter(tmp_path / "a"), tmp_path / "o"
    loraformat.merge(str(base), [str(change)], str(out), dequantize=True, dtype="float32")
    same = diff(str(base), str(base)).data
    assert {one.status for one in same.weights} == {"equal"}
    assert {f"{module}.weight" for module in QUANTIZED} <= {one.weight for one in same.weights}
    found = {one.weight: one for one in diff(str(base), str(out)).data.weights}
    for module in QUANTIZED:
        one = found[f"{module}.weight"]
        assert one.status == ("changed" if module in TOUCHED else "equal")
        if module in TOUCHED:
            down, up = (factor.double().numpy() for factor in factors()[module])
            assert one.distance == pytest.approx(np.linalg.norm(2.0 * up @ down), rel=1e-4)


def test_estimate_counts_the_parameters_that_the_codes_mean(tmp_path: Path) -> None:
    found = estimate(str(quantized_base(tmp_path / "b")), rank=4, targets=["q_proj", "up_proj"]).data
    assert found.base_parameters == sum(rows * cols for rows, cols in QUANTIZED.values()) + sum(
        value.numel() for value in dense_tensors().values()
    )
    assert sum(one.parameters for one in found.modules) == sum(4 * (rows + cols) for rows, cols in QUANTIZED.values())


@pytest.mark.parametrize(
    "options", [{"dequantize": True}, {"keep_quantized": True}, {"keep_quantized": True, "dtype": "float32"}]
)
@pytest.mark.parametrize("form", ["json", "pickle"])
def test_the_plan_runs_from_itself(tmp_path: Path, options: dict[str, Any], form: str) -> None:
    base, change, out = quantized_base(tmp_path / "b", shards=2), adapter(tmp_path / "a"), tmp_path / "o"
    loraformat.merge(str(base), [str(change)], str(out), verify="full", **options)
    data = loraformat.merge(str(base), [str(change)], "nowhere", dry_run=True, **options).data.plan
    plan = MergePlan.from_json(json.loads(json.dumps(data)))
    (tmp_path / "elsewhere").mkdir()
    for task in tasks_of(plan, str(tmp_path / "elsewhere")):
        sent = (
            FileTask.from_json(json.loads(json.dumps(task.to_json())))
            if form == "json"
            else pickle.loads(pickle.dumps(task))
        )
        execute(sent)
    written = contents(tmp_path / "elsewhere")
    assert written
    assert written == {name: data for name, data in contents(out).items() if name.endswith(".safetensors")}


def test_a_plan_is_refused_where_its_scheme_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a")
    data = loraformat.merge(str(base), [str(change)], "nowhere", dry_run=True, dequantize=True).data.plan
    (tmp_path / "o").mkdir()
    (task,) = tasks_of(MergePlan.from_json(json.loads(json.dumps(data))), str(tmp_path / "o"))
    monkeypatch.delitem(SCHEMES, "toy")
    with pytest.raises(UnsupportedUpdate, match='"toy", found "dense"'):
        execute(task)
    assert not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize("options", [{"dequantize": True}, {"keep_quantized": True}])
def test_verification_does_not_believe_what_the_merge_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    class Wrong(Toy):
        def rows(self, *arguments: Any) -> Any:
            found = super().rows(*arguments)
            found[-1, -1] += np.float32(0.25)
            return found

    monkeypatch.setitem(SCHEMES, "toy", Wrong())
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a")
    with pytest.raises(MergeError, match="the independent computation"):
        loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), verify="full", **options)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("options", [{"dequantize": True}, {"keep_quantized": True}])
def test_verification_reads_the_config_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    class Forgetful(Toy):
        def described(self, files: Any, dense: Any, kept: Any) -> Any:
            config = files["config.json"]
            return {"config.json": {key: config[key] for key in config if not kept or key != "quantization_config"}}

    monkeypatch.setitem(SCHEMES, "toy", Forgetful())
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a")
    with pytest.raises(MergeError, match="are quantized"):
        loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), **options)
    assert not (tmp_path / "o").exists()


def test_codes_under_the_name_of_the_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes and FP8 have it: the dense weight takes the place of its codes."""
    monkeypatch.setitem(SCHEMES, "toy", Toy("weight"))
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a")
    tensors = load_file(base / "model.safetensors")
    tensors = {name.replace(".qweight", ".weight"): value for name, value in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for option in ("dequantize", "keep_quantized"):
        loraformat.merge(str(base), [str(change)], str(tmp_path / option), verify="full", **{option: True})  # type: ignore[arg-type]
        found = load(tmp_path / option)
        for module in TOUCHED:
            assert torch.equal(found[f"{module}.weight"], rounded(merged(module), torch.bfloat16))
    other = Q.format(1)
    assert torch.equal(load(tmp_path / "keep_quantized")[f"{other}.weight"], coded_tensors(5)[f"{other}.qweight"])
    assert torch.equal(load(tmp_path / "dequantize")[f"{other}.weight"], rounded(exact(other), torch.bfloat16))


@pytest.mark.parametrize("option", ["dequantize", "keep_quantized"])
@pytest.mark.parametrize("more", [{"container": "torch"}, {"max_shard_nbytes": 8000}])
def test_in_other_files(tmp_path: Path, option: str, more: dict[str, Any]) -> None:
    base, change = quantized_base(tmp_path / "b", shards=2), adapter(tmp_path / "a")
    loraformat.merge(str(base), [str(change)], str(tmp_path / "usual"), **{option: True})  # type: ignore[arg-type]
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), verify="full", **{option: True}, **more)
    usual, found = load(tmp_path / "usual"), load(tmp_path / "o")
    assert found.keys() == usual.keys()
    assert all(torch.equal(found[name], value) for name, value in usual.items())


def test_neither_windows_nor_threads_show_in_the_bytes(tmp_path: Path) -> None:
    base, change = quantized_base(tmp_path / "b", shards=2), adapter(tmp_path / "a")
    for name, jobs, memory in (("one", 1, 64 << 20), ("other", 4, 1)):
        loraformat.merge(
            str(base), [str(change)], str(tmp_path / name), dequantize=True, jobs=jobs, memory_nbytes=memory
        )
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize("option", ["dequantize", "keep_quantized"])
def test_verify_finds_copies_of_codes_and_of_dense_weights_in_the_base(tmp_path: Path, option: str) -> None:
    base, change, out = quantized_base(tmp_path / "b"), adapter(tmp_path / "a"), tmp_path / "o"
    loraformat.merge(str(base), [str(change)], str(out), **{option: True})  # type: ignore[arg-type]
    assert not [finding for finding in verify(str(out), base=str(base)).findings if finding.code == "LF804"]
    tensors = load_file(base / "model.safetensors")
    tensors[f"{UP.format(0)}.qweight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    found = [
        finding for finding in verify(str(out), base=str(base)).findings if "differ from the base" in finding.message
    ]
    assert bool(found) is (option == "keep_quantized")


def test_updates_that_are_no_sum(tmp_path: Path) -> None:
    """DoRA, whose norms are those of the decoded weight; compared with the float64 reference, and by hand."""
    base = quantized_base(tmp_path / "b")
    down, up = factors()[TOUCHED[0]]
    magnitude = torch.arange(1, HIDDEN + 1).float()
    dora = LowRank(LazyTensor.of(up), LazyTensor.of(down), 2.0, magnitude=Magnitude(LazyTensor.of(magnitude), axis=1))
    merge_and_tell(base, tmp_path / "o", in_memory({f"{TOUCHED[0]}.weight": dora}), quantized="mixed")
    wanted = merged(TOUCHED[0])
    wanted *= magnitude.double().numpy()[:, None] / np.linalg.norm(wanted, axis=1)[:, None]
    found = load(tmp_path / "o")[f"{TOUCHED[0]}.weight"]
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=2**-8, atol=0)


def test_layers_that_are_replicated_are_written_dense_alone(tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "b", num_hidden_layers=2)
    down, up = factors()[Q.format(0)]
    change = in_memory(
        {f"{Q.format(2)}.weight": LowRank(LazyTensor.of(up), LazyTensor.of(down), 2.0)}, layers=(0, 1, 0)
    )
    merge_and_tell(base, tmp_path / "o", change, quantized="dense")
    found = load(tmp_path / "o")
    assert torch.equal(found[f"{Q.format(2)}.weight"], rounded(merged(Q.format(0)), torch.bfloat16))
    assert torch.equal(found[f"{UP.format(2)}.weight"], rounded(exact(UP.format(0)), torch.bfloat16))
    assert torch.equal(
        found["model.layers.2.input_layernorm.weight"], dense_tensors()["model.layers.0.input_layernorm.weight"]
    )
    with pytest.raises(MergeError, match="cannot stay quantized"):
        merge_and_tell(base, tmp_path / "p", change, quantized="mixed")


def test_the_head_of_a_task_is_written_beside_dense_weights_alone(tmp_path: Path) -> None:
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a")
    tensors = load_file(change / "adapter_model.safetensors")
    score = torch.ones(3, HIDDEN)
    save_file({**tensors, "base_model.model.score.weight": score}, change / "adapter_model.safetensors")
    settings = json.loads((change / "adapter_config.json").read_text())
    settings |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    (change / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(MergeError, match="cannot stay quantized"):
        loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), keep_quantized=True)
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), dequantize=True, verify="full")
    found = load(tmp_path / "o")
    assert torch.equal(found["score.weight"], score.bfloat16())
    assert "lm_head.weight" not in found
    for module in QUANTIZED:
        assert torch.equal(found[f"{module}.weight"], rounded(merged(module), torch.bfloat16))
    assert "quantization_config" not in written_config(tmp_path / "o")


def stacked_base(folder: Path) -> tuple[Path, NDArray[np.float64]]:
    """Four experts of (9, 7) in codes, and what they mean."""
    base, g = quantized_base(folder), np.random.default_rng(0)
    codes = g.integers(-128, 128, (4, 9, 7), dtype=np.int8)
    scales = g.random((4, 9, 2), dtype=np.float32)
    tensors = load_file(base / "model.safetensors")
    tensors[f"{STACK}.qweight"], tensors[f"{STACK}.scales"] = torch.from_numpy(codes), torch.from_numpy(scales)
    save_file(tensors, base / "model.safetensors")
    product = codes.astype(np.float64) * scales.astype(np.float64)[..., np.arange(7) // 5]
    return base, product.astype(np.float32).astype(np.float64)


STACK = "model.layers.0.mlp.experts.down_proj"


def test_rows_of_a_stack_of_experts(tmp_path: Path) -> None:
    folder, wanted = stacked_base(tmp_path / "b")
    base = open_checkpoint(str(folder))
    weight, flat = base.weights[STACK], wanted.reshape(36, 7)
    assert (weight.shape, base.tensors[STACK].shape) == ((4, 9, 7), (4, 9, 7))
    assert np.array_equal(weight.read(1, 3), wanted[1:3])
    matrix = weight.as_matrix(2)
    assert matrix.shape == (36, 7)
    assert base.quantized is not None
    header = replace(base.tensors[STACK], shape=(36, 7))
    for start, stop in ((0, 36), (0, 1), (8, 10), (5, 30), (9, 18), (35, 36), (4, 4)):
        assert np.array_equal(matrix.read(start, stop), flat[start:stop])
        assert np.frombuffer(matrix.raw(start, stop), "<f4").tolist() == flat[start:stop].ravel().tolist()
        assert np.array_equal(reference_rows(base.quantized, header, start, stop), flat[start:stop])


@pytest.mark.parametrize("quantized", ["dense", "mixed"])
def test_a_stack_of_experts_is_merged(tmp_path: Path, quantized: str) -> None:
    folder, wanted = stacked_base(tmp_path / "b")
    g = torch.Generator().manual_seed(4)
    up = torch.randint(-9, 10, (4, 9, 2), generator=g) / 32
    down = torch.randint(-9, 10, (4, 2, 7), generator=g) / 32
    change = in_memory({STACK: LowRank(LazyTensor.of(up), LazyTensor.of(down), 0.5)})
    merge_and_tell(folder, tmp_path / "o", change, quantized=quantized)
    delta = 0.5 * up.double().numpy() @ down.double().numpy()
    assert torch.equal(load(tmp_path / "o")[STACK], rounded(wanted + delta, torch.bfloat16))


def test_a_part_that_two_weights_share_stays_for_the_one_in_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shared(Toy):
        def weights(self, stored: Any) -> Any:
            found = super().weights(stored)
            return {name: replace(one, parts=(*one.parts[:2], "lookup")) for name, one in found.items()}

    monkeypatch.setitem(SCHEMES, "toy", Shared())
    base, change = quantized_base(tmp_path / "b"), adapter(tmp_path / "a")
    tensors = load_file(base / "model.safetensors")
    del tensors[f"{TOUCHED[0]}.input_scale"]
    save_file({**tensors, "lookup": torch.ones(3)}, base / "model.safetensors")
    for option, stays in (("dequantize", False), ("keep_quantized", True)):
        loraformat.merge(str(base), [str(change)], str(tmp_path / option), verify="full", **{option: True})  # type: ignore[arg-type]
        assert ("lookup" in load(tmp_path / option)) is stays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{TOUCHED[0]}.scales"), "expected a scale for each group"),
        (lambda tensors: tensors.update({f"{TOUCHED[0]}.weight": torch.ones(2)}), "dense and quantized"),
    ],
)
def test_tensors_that_are_not_those_of_the_scheme_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    base = quantized_base(tmp_path / "b")
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(FormatError, match=message):
        open_checkpoint(str(base))


def test_the_command_line(tmp_path: Path) -> None:
    base, change, out = (str(tmp_path / name) for name in "bao")
    quantized_base(Path(base))
    adapter(Path(change))
    refused = CliRunner().invoke(main, ["merge", base, change, "-o", out])
    assert (refused.exit_code, "--keep-quantized" in refused.output) == (1, True)
    assert (
        CliRunner().invoke(main, ["merge", base, change, "-o", out, "--dequantize", "--keep-quantized"]).exit_code == 2
    )
    done = CliRunner().invoke(main, ["merge", base, change, "-o", out, "--keep-quantized", "--verify", "full"])
    assert done.exit_code == 0, done.output
    manifest = json.loads((Path(out) / "loraformat.manifest.json").read_text())
    assert manifest["base"]["quantized"] == {"scheme": "toy", "is_dense": False}


@pytest.mark.parametrize("option", ["dequantize", "keep_quantized"])
def test_packed_codes_across_rows_with_groups_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """What makes GPTQ with act-order and bitsandbytes hard, in one scheme."""
    monkeypatch.setitem(SCHEMES, "toy", Transposed())
    base, change, g = quantized_base(tmp_path / "b"), adapter(tmp_path / "a"), np.random.default_rng(5)
    tensors, wanted = dense_tensors(), {}
    for module, (rows, cols) in QUANTIZED.items():
        codes, groups = g.integers(0, 16, (rows, cols)), g.integers(0, 3, cols)
        scales = (g.random((3, rows)) / 8).astype(np.float16)
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).T.astype(np.uint8)
        state = np.frombuffer(json.dumps({"shape": [rows, cols]}).encode(), np.uint8).copy()
        parts = {"qweight": packed, "scales": scales, "g_idx": groups.astype(np.int32), "quant_state": state}
        tensors |= {f"{module}.{name}": torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
        wanted[module] = (codes - 8) * scales.astype(np.float64)[groups].T
    save_file(tensors, base / "model.safetensors")
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), verify="full", **{option: True})  # type: ignore[arg-type]
    found = load(tmp_path / "o")
    for module, value in wanted.items():
        if module in TOUCHED:
            down, up = (factor.double().numpy() for factor in factors()[module])
            assert torch.equal(found[f"{module}.weight"], rounded(value + 2.0 * (up @ down), torch.float16))
        elif option == "dequantize":
            assert torch.equal(found[f"{module}.weight"], rounded(value, torch.float16))
        else:
            assert f"{module}.weight" not in found
            assert torch.equal(found[f"{module}.qweight"], tensors[f"{module}.qweight"])


@pytest.mark.parametrize("option", ["dequantize", "keep_quantized"])
def test_a_head_leaves_a_table_that_is_in_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    base, change = quantized_base(tmp_path / "b", tie_word_embeddings=True), adapter(tmp_path / "a", ("lm_head",))
    g = torch.Generator().manual_seed(6)
    codes = torch.randint(-128, 128, (70, HIDDEN), generator=g, dtype=torch.int8)
    scales = torch.rand(70, 5, generator=g)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    table = {"model.embed_tokens.qweight": codes, "model.embed_tokens.scales": scales}
    save_file({**tensors, **table}, base / "model.safetensors")
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), verify="full", **{option: True})  # type: ignore[arg-type]
    product = codes.double().numpy() * scales.double().numpy()[:, np.arange(HIDDEN) // 5]
    value = product.astype(np.float32).astype(np.float64)
    down, up = (factor.double().numpy() for factor in factors(("lm_head",))["lm_head"])
    found = load(tmp_path / "o")
    assert torch.equal(found["lm_head.weight"], rounded(value + 2.0 * (up @ down), torch.bfloat16))
    assert torch.equal(found["model.embed_tokens.weight"], rounded(value, torch.bfloat16))
    assert written_config(tmp_path / "o")["tie_word_embeddings"] is False


def test_another_dtype_is_not_that_of_scales_that_stay(tmp_path: Path) -> None:
    base, change, out = quantized_base(tmp_path / "b"), adapter(tmp_path / "a"), tmp_path / "o"
    loraformat.merge(str(base), [str(change)], str(out), keep_quantized=True, dtype="float16", verify="full")
    found, before = load(out), load(base)
    for name, value in found.items():
        if name in before and name not in dense_tensors():
            assert torch.equal(value, before[name])
        else:
            assert value.dtype is torch.float16


def test_a_file_of_scales_alone_is_reported_as_left_out(tmp_path: Path) -> None:
    base, change = quantized_base(tmp_path / "b", shards=2), adapter(tmp_path / "a")
    plan = loraformat.merge(str(base), [str(change)], "nowhere", dry_run=True, dequantize=True).data.plan
    assert list(plan["left_out"]) == ["model-00002-of-00002.safetensors", "quant_config.json"]
