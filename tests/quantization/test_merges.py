"""Merges into every scheme, end to end, against float64."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merger.checkpoints import contents, load
from quantization.encoders import ENCODERS, Encoded
from quantization.models import (
    FILES,
    GATE,
    LINEAR,
    MODULES,
    RANK,
    UP,
    K,
    O,
    Q,
    V,
    adapter,
    dense,
    encoded,
    factors,
    magnitude,
    once,
    same,
    save,
    save_adapter,
    update,
)

import loraformat
from loraformat.containers import open_checkpoint

FEW = ["bitsandbytes NF4, double", "FP8, blocks of 8 x 16", "GPTQ, asymmetric, act-order", "ModelOpt NVFP4"]


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("name", LINEAR)
def test_all_dense(tmp_path: Path, name: str, dtype: str | None) -> None:
    weights, out = encoded(name), tmp_path / "o"
    nested = name.startswith("bitsandbytes")
    base = save(tmp_path / "b", weights, shards=3 if dtype else 1, nested=nested)
    change = adapter(tmp_path / "a", weights, (Q, UP))
    loraformat.merge(str(base), [str(change)], str(out), dequantize=True, dtype=dtype, verify="full")
    found, kind = load(out), dtype or weights[Q].dtype
    assert found.keys() == {f"{module}.weight" for module in MODULES} | dense("float32").keys()
    for module, one in weights.items():
        wanted, value = one.values.astype(np.float64), found[f"{module}.weight"]
        if module in (Q, UP):
            wanted = wanted + update(one.values.shape, (Q, UP).index(module))
            value = value + 0  # a sum that is nothing may have either sign
        assert same(value, once(wanted, kind)), module
    for other, value in dense(weights[Q].dtype).items():
        assert same(found[other], value.to(getattr(torch, kind)))
    nothing_says_quantized(out)
    assert said(out)["kept"] == {"a": [1]}
    assert said(out).get("text_config") == ({"b": 2} if nested else None)
    if dtype:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    assert loraformat.verify(str(out), base=str(base)).ok


def nothing_says_quantized(folder: Path) -> None:
    assert "quantization" not in (folder / "config.json").read_text()
    assert not [name for name in FILES if (folder / name).exists()]
    assert open_checkpoint(str(folder)).quantized is None


def is_ignored(settings: dict[str, Any], module: str) -> bool:
    """Whether settings call a module dense, read as the scheme's own loaders do."""
    method = settings.get("quant_method")
    if method == "gptq":
        return any(key.startswith("-:") and re.match(key[2:], module) for key in settings.get("dynamic") or {})
    if method in ("modelopt", None):
        return any(fnmatch.fnmatchcase(module, one) for one in settings.get("ignore") or settings["exclude_modules"])
    key = {"bitsandbytes": "llm_int8_skip_modules", "compressed-tensors": "ignore"}.get(
        method, "modules_to_not_convert"
    )
    listed = settings.get(key) or []
    if method == "compressed-tensors":
        return module in listed
    # transformers compares the start and the end of a path, vLLM a component of it.
    return any(module.startswith(one) or module.endswith(one) or one in module.split(".") for one in listed)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", LINEAR)
def test_what_does_not_change_stays_in_codes(tmp_path: Path, name: str, shards: int) -> None:
    weights, out = encoded(name), tmp_path / "o"
    base = save(tmp_path / "b", weights, shards=shards, nested=shards == 3)
    change = adapter(tmp_path / "a", weights, (Q,))
    loraformat.merge(str(base), [str(change)], str(out), keep_quantized=True, verify="full")
    found, before = load(out), load(base)
    alone = (Q, K, V)
    gone = {key for module in alone for key in weights[module].tensors}
    assert found.keys() == (before.keys() - gone) | {f"{module}.weight" for module in alone}
    assert all(same(found[key], before[key]) for key in before.keys() - gone)
    for module in alone:
        wanted = weights[module].values.astype(np.float64)
        wanted = wanted + update(wanted.shape, 0) if module == Q else wanted
        assert same(found[f"{module}.weight"], once(wanted, weights[module].dtype)), module
    places = [said(out).get("text_config", said(out)).get("quantization_config")]
    beside = [json.loads((out / file).read_text()) for file in FILES if (out / file).exists()]
    assert len(beside) == len([file for file in FILES if (base / file).exists()])
    for settings in (*(one for one in places if one), *(one.get("quantization", one) for one in beside)):
        assert {module for module in MODULES if is_ignored(settings, module)} == set(alone)
        if "lm_head" in json.dumps(weights[Q].settings) or settings.get("quant_method") == "bitsandbytes":
            assert is_ignored(settings, "lm_head")
    again = open_checkpoint(str(out))
    assert again.quantized is not None
    assert again.quantized.weights.keys() == {f"{module}.weight" for module in (O, UP, GATE)}
    assert loraformat.verify(str(out), base=str(base)).ok


@pytest.mark.parametrize("name", LINEAR)
def test_nothing_is_left_in_codes(tmp_path: Path, name: str) -> None:
    weights = encoded(name, (Q, K))
    base = save(tmp_path / "b", weights, nested=True)
    change = adapter(tmp_path / "a", weights, (K,))
    loraformat.merge(str(base), [str(change)], str(tmp_path / "kept"), keep_quantized=True)
    loraformat.merge(str(base), [str(change)], str(tmp_path / "dense"), dequantize=True)
    nothing_says_quantized(tmp_path / "kept")
    one, other = contents(tmp_path / "kept"), contents(tmp_path / "dense")
    assert {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} == {"loraformat.manifest.json"}


@pytest.mark.parametrize("option", ["dequantize", "keep_quantized"])
@pytest.mark.parametrize("name", FEW)
def test_several_adapters(tmp_path: Path, name: str, option: str) -> None:
    weights = encoded(name)
    base = save(tmp_path / "b", weights)
    changes = [adapter(tmp_path / "a1", weights, (Q, O)), adapter(tmp_path / "a2", weights, (O,), seed=40)]
    paths = [str(changes[0]), f"{changes[1]}=0.5"]
    loraformat.merge(str(base), paths, str(tmp_path / "o"), verify="full", **{option: True})  # type: ignore[arg-type]
    shape = weights[O].values.shape
    wanted = weights[O].values.astype(np.float64) + update(shape, 1) + 0.5 * update(shape, 40)
    assert same(load(tmp_path / "o")[f"{O}.weight"], once(wanted, weights[O].dtype))


@pytest.mark.parametrize("name", FEW)
def test_dora(tmp_path: Path, name: str) -> None:
    """The norm of a row is that of the decoded weight with the update."""
    weights = encoded(name)
    base = save(tmp_path / "b", weights)
    change = adapter(tmp_path / "a", weights, (O,), use_dora=True)
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), dequantize=True, dtype="float32", verify="full")
    shape = weights[O].values.shape
    whole = weights[O].values.astype(np.float64) + update(shape, 0)
    lengths = np.sqrt((whole * whole).sum(axis=1))
    wanted = whole * (magnitude(shape[0]).double().numpy() / lengths)[:, None]
    assert np.allclose(load(tmp_path / "o")[f"{O}.weight"].numpy(), wanted, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", FEW)
def test_loha(tmp_path: Path, name: str) -> None:
    weights = encoded(name)
    base, shape = save(tmp_path / "b", weights), weights[O].values.shape
    tensors, product = {}, np.full(shape, 2.0)
    for number in (1, 2):
        down, up = factors(shape, number)
        tensors[f"base_model.model.{O}.hada_w{number}_a"], tensors[f"base_model.model.{O}.hada_w{number}_b"] = up, down
        product = product * (up.double() @ down.double()).numpy()
    config = {"peft_type": "LOHA", "r": RANK, "alpha": 2 * RANK}
    change = save_adapter(tmp_path / "a", tensors, (O,), **config)
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), keep_quantized=True, verify="full")
    wanted = once(weights[O].values.astype(np.float64) + product, weights[O].dtype)
    assert same(load(tmp_path / "o")[f"{O}.weight"], wanted)


EXPERTS = "model.layers.0.mlp.experts"


def gpt_oss(folder: Path) -> tuple[Path, dict[str, Encoded]]:
    weights = {}
    for number, part in enumerate(("gate_up_proj", "down_proj")):
        one = ENCODERS["MXFP4 of gpt-oss"](np.random.default_rng(number), 32 * (1 + number), 64)
        tensors = {key.replace("down_proj", part): value for key, value in one.tensors.items()}
        weights[f"{EXPERTS}.{part}"] = Encoded(tensors, one.settings, one.values, f"{EXPERTS}.{part}")
    return save(folder, weights, model_type="gpt_oss"), weights


@pytest.mark.parametrize("option", ["dequantize", "keep_quantized"])
def test_experts_of_gpt_oss(tmp_path: Path, option: str) -> None:
    """An adapter on a stack of square matrices; with one stack all become dense, for no loader knows half of them."""
    base, weights = gpt_oss(tmp_path / "b")
    name = f"{EXPERTS}.down_proj"
    experts, inputs, out = weights[name].values.shape
    chance = torch.Generator().manual_seed(2)
    # PEFT's parameter is (experts, in, out): A is (rank · experts, out), B is (in, rank · experts).
    down = torch.randint(-9, 10, (RANK * experts, inputs), generator=chance) / 32
    up = torch.randint(-9, 10, (out, RANK * experts), generator=chance) / 32
    prefix = f"base_model.model.{EXPERTS}"
    tensors = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    change = save_adapter(tmp_path / "a", tensors, (), target_parameters=["mlp.experts.down_proj"], target_modules=[])
    report = loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), verify="full", **{option: True})  # type: ignore[arg-type]
    assert report.data.tensors_touched == 1
    found = load(tmp_path / "o")
    nothing_says_quantized(tmp_path / "o")
    assert same(found[f"{EXPERTS}.gate_up_proj"], once(weights[f"{EXPERTS}.gate_up_proj"].values, "bfloat16"))
    wanted = weights[name].values.astype(np.float64).copy()
    a, b = down.double().numpy().reshape(experts, RANK, inputs), up.double().numpy().reshape(out, RANK, experts)
    for expert in range(experts):
        wanted[expert] += 2.0 * (b[:, :, expert] @ a[expert]).T
    assert same(found[name], once(wanted, "bfloat16"))


def test_attention_of_gpt_oss_needs_no_option(tmp_path: Path) -> None:
    base, _ = gpt_oss(tmp_path / "b")
    tensors = {"base_model.model.lm_head.lora_A.weight": torch.ones(RANK, 24)}
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.ones(10, RANK)
    change = save_adapter(tmp_path / "a", tensors, ("lm_head",))
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), verify="full")
    found, before = load(tmp_path / "o"), load(base)
    assert [key for key in before if not same(found[key], before[key])] == ["lm_head.weight"]
    assert (tmp_path / "o" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("option", ["dequantize", "keep_quantized"])
@pytest.mark.parametrize("name", ENCODERS)
def test_neither_windows_nor_threads_show(tmp_path: Path, name: str, option: str) -> None:
    """Odd rows, blocks cut short, scales beside no codes."""
    if name.startswith("MXFP4 of"):
        base, weights = gpt_oss(tmp_path / "b")
        tensors = {f"base_model.model.{EXPERTS}.lora_A.weight": torch.ones(RANK * 2, 64)}
        tensors[f"base_model.model.{EXPERTS}.lora_B.weight"] = torch.ones(64, RANK * 2)
        where = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}
        change = save_adapter(tmp_path / "a", tensors, (), **where)
    else:
        weights = encoded(name, out=67, inputs=96)
        base, change = save(tmp_path / "b", weights, shards=2), adapter(tmp_path / "a", weights, (Q, UP))
    outputs = []
    for number, (jobs, memory) in enumerate([(1, 64 << 20), (3, 1), (2, 5000)]):
        out = tmp_path / f"o{number}"
        loraformat.merge(str(base), [str(change)], str(out), jobs=jobs, memory_nbytes=memory, **{option: True})  # type: ignore[arg-type]
        outputs.append(contents(out))
    assert outputs[0] == outputs[1] == outputs[2]


class Stopped(Exception):
    """Raised in the middle of a run."""


@pytest.mark.parametrize("option", ["dequantize", "keep_quantized"])
@pytest.mark.parametrize("name", FEW)
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, name: str, option: str) -> None:
    weights = encoded(name)
    base, change = save(tmp_path / "b", weights, shards=3), adapter(tmp_path / "a", weights, (Q, UP))
    arguments: dict[str, Any] = {option: True, "resume": True}
    loraformat.merge(str(base), [str(change)], str(tmp_path / "whole"), **{option: True})  # type: ignore[arg-type]
    for share in (0.3, 0.7):

        def stop(done: int, total: int, share: float = share) -> None:
            if done > share * total:
                raise Stopped

        with pytest.raises(Stopped):
            loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), progress=stop, **arguments)
        assert not (tmp_path / "o").exists()
    loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), **arguments)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_without_an_adapter(tmp_path: Path) -> None:
    for name in FEW:
        weights = encoded(name)
        base, out = save(tmp_path / f"b {name}", weights, shards=2), tmp_path / name
        planned = loraformat.dequantize(str(base), str(out), dry_run=True)
        assert not out.exists()
        report = loraformat.dequantize(str(base), str(out), verify="full")
        assert planned.data.bytes_written == report.data.bytes_written
        assert (report.data.tensors_dequantized, report.data.tensors_copied) == (len(MODULES), 2)
        found = load(out)
        for module, one in weights.items():
            assert same(found[f"{module}.weight"], once(one.values, one.dtype))
        nothing_says_quantized(out)
