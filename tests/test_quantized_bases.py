"""A quantization scheme is one module and one line: a toy, registered here alone, is read and written by every verb."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merger.checkpoints import config, contents, load
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_scheme import Toy

import loraformat
from loraformat.containers import open_checkpoint
from loraformat.containers.quantized import SCHEMES
from loraformat.errors import MergeError, UnsupportedUpdate, UsageError
from loraformat.jobs.diff import diff
from loraformat.jobs.estimate import estimate
from loraformat.merger import FileTask, MergePlan, execute, tasks_of

HIDDEN, ROWS = 24, 130
Q = "model.layers.{}.self_attn.q_proj"
UP = "model.layers.{}.mlp.up_proj"
QUANTIZED = {form.format(n): (HIDDEN if form == Q else ROWS, HIDDEN) for form in (Q, UP) for n in range(2)}
TOUCHED = (Q.format(0), UP.format(1))


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "toy", Toy())


def dense_tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(70, HIDDEN, generator=g) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors |= {f"model.layers.{n}.input_layernorm.weight": torch.randn(HIDDEN, generator=g) for n in range(2)}
    return {name: value.bfloat16() for name, value in tensors.items()}


def coded_tensors(group: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for module, (rows, cols) in QUANTIZED.items():
        tensors[f"{module}.qweight"] = torch.randint(-128, 128, (rows, cols), generator=g, dtype=torch.int8)
        tensors[f"{module}.scales"] = torch.rand(rows, -(-cols // group), generator=g) / 64
    tensors[f"{TOUCHED[0]}.input_scale"] = torch.rand(1, generator=g)
    return tensors


def quantized_base(folder: Path, group: int = 5, *, shards: int = 1, **settings: object) -> Path:
    """One file, or codes in the first of two and scales in the second."""
    folder.mkdir()
    quantization = {"quant_method": "toy", "group_size": group, "modules_to_not_convert": ["lm_head"]}
    described = config(torch_dtype="bfloat16", quantization_config=quantization, kept={"a": [1]})
    (folder / "config.json").write_text(json.dumps({**described, **settings}))
    (folder / "quant_config.json").write_text(json.dumps({"modules_to_not_convert": ["lm_head"]}))
    tensors = {**dense_tensors(), **coded_tensors(group)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number, is_scale in enumerate((False, True), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        part = {name: value for name, value in tensors.items() if name.endswith(("scale", "scales"))}
        part = part if is_scale else {name: value for name, value in tensors.items() if name not in part}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def factors(modules: tuple[str, ...] = TOUCHED) -> dict[str, tuple[Tensor, Tensor]]:
    """Small multiples of 1/32, so that float64 has every sum exactly, in whatever order it is made."""
    g = torch.Generator().manual_seed(3)
    shapes = QUANTIZED | {"lm_head": (70, HIDDEN)}
    return {
        module: (
            torch.randint(-9, 10, (3, HIDDEN), generator=g) / 32,
            torch.randint(-9, 10, (shapes[module][0], 3), generator=g) / 32,
        )
        for module in modules
    }


def adapter(folder: Path, modules: tuple[str, ...] = TOUCHED) -> Path:
    folder.mkdir()
    tensors = {}
    for module, (down, up) in factors(modules).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.split(".")[-1] for module in modules})
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets, "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def exact(module: str, group: int = 5) -> NDArray[np.float64]:
    """The weight by the definition of the scheme: the product in float64, rounded to float32."""
    tensors = coded_tensors(group)
    codes, scales = (tensors[f"{module}.{part}"].double().numpy() for part in ("qweight", "scales"))
    columns = np.arange(codes.shape[1]) // group
    return (codes * scales[:, columns]).astype(np.float32).astype(np.float64)


def merged(module: str, group: int = 5) -> NDArray[np.float64]:
    value = exact(module, group)
    if module in TOUCHED:
        down, up = (factor.double().numpy() for factor in factors()[module])
        value = value + 2.0 * (up @ down)
    return value


def rounded(values: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)


def written_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


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
    with pytest.raises(UsageError, match="exclude each other"):
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
    with pytest.raises(UnsupportedUpdate, match='"toy", here it is read as "dense"'):
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
    with pytest.raises(MergeError, match="by the reference"):
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
    with pytest.raises(MergeError, match="in codes"):
        loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), **options)
    assert not (tmp_path / "o").exists()
