"""llama.cpp itself against the un-merged PEFT model: adapters and merged files of ours, in log-probabilities.

`make test-llamacpp` installs the engine and prints the figures; bases are written by the gguf package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import FAMILIES, LAYERS, Family, adapter_of, model_of, saved, write_base
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from engine import Refused, logprobs

import loraformat

pytestmark = pytest.mark.llamacpp
pytest.importorskip("xllamacpp")

PROMPTS = [[int(token) for token in np.random.default_rng(seed).integers(3, 320, 12)] for seed in range(4)]
MOST = 5e-3


@dataclass(frozen=True)
class Case:
    """A model, its base in F32, and how far the engine is from PyTorch on that base."""

    family: Family
    model: Any
    folder: Path
    base: Path
    own: float

    def bound(self) -> float:
        """How far the engine may be with an adapter."""
        return max(2 * self.own, MOST)


def of_torch(model: Any) -> list[np.ndarray[Any, Any]]:
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return [torch.log_softmax(one.double(), -1).numpy() for one in logits]


def distance(found: Sequence[dict[int, float]], wanted: Sequence[np.ndarray[Any, Any]]) -> float:
    assert all(len(one) == 320 for one in found)
    return max(
        abs(value - other[token]) for one, other in zip(found, wanted, strict=True) for token, value in one.items()
    )


def said(text: str) -> None:
    print(f"llama.cpp: {text}", file=sys.__stdout__, flush=True)


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    model = model_of(family)
    tensors = saved(model, folder / "base")
    base = write_base(folder / "base.gguf", family, tensors, config=model.config)
    own = distance(logprobs(base, PROMPTS), of_torch(model))
    assert own < MOST
    return Case(family, model, folder, base, own)


def test_adapter_and_merged_file_are_the_unmerged_model(case: Case, tmp_path: Path) -> None:
    before = of_torch(case.model)
    wrapped = adapter_of(case.model, case.family, tmp_path / "adapter")
    wanted = of_torch(wrapped)
    wrapped.unload()
    moved = max(float(np.abs(one - other).max()) for one, other in zip(before, wanted, strict=True))
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "gguf"), to="gguf", base=str(case.folder / "base"))
    loraformat.merge(str(case.base), [str(tmp_path / "adapter")], str(tmp_path / "merged"), verify="full")
    loraformat.merge(str(case.base), [str(tmp_path / "gguf")], str(tmp_path / "again"), verify="full")
    apart = distance(logprobs(case.base, PROMPTS, tmp_path / "gguf" / "adapter.gguf"), wanted)
    merged = distance(logprobs(tmp_path / "merged" / "base.gguf", PROMPTS), wanted)
    again = distance(logprobs(tmp_path / "again" / "base.gguf", PROMPTS), wanted)
    said(
        f"{case.family.name}: base {case.own:.1e}, adapter {apart:.1e}, merged {merged:.1e}, from GGUF {again:.1e}"
        f" (the adapter moves them by {moved:.1f})"
    )
    assert moved > 100 * case.bound()
    assert max(apart, merged, again) <= case.bound()


def test_a_wrong_order_of_rows_is_far_away(case: Case, tmp_path: Path) -> None:
    """Once too often, and not at all: a hundred times the bound."""
    wrapped = adapter_of(case.model, case.family, tmp_path / "adapter")
    wanted = of_torch(wrapped)
    wrapped.unload()
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "gguf"), to="gguf", base=str(case.folder / "base"))
    right = distance(logprobs(case.base, PROMPTS, tmp_path / "gguf" / "adapter.gguf"), wanted)
    path = tmp_path / "gguf" / "adapter.gguf"
    data = bytearray(path.read_bytes())
    turned = (("attn_qkv", 16),) if case.family.architecture == "phi3" else (("attn_q", 8), ("attn_k", 4))
    for name, heads in turned:
        for layer in range(LAYERS):
            _turn(data, path, f"blk.{layer}.{name}.weight.lora_b", heads)
    path.write_bytes(data)
    wrong = distance(logprobs(case.base, PROMPTS, path), wanted)
    said(f"{case.family.name}: adapter {right:.1e}, in a wrong order of rows {wrong:.1e}")
    assert wrong > 100 * max(right, case.bound() / 100)
    assert wrong > 100 * right


def _turn(data: bytearray, path: Path, name: str, heads: int) -> None:
    """Put rows of a factor in llama.cpp's order once more."""
    import gguf

    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == name)
    values = np.array(tensor.data)
    rows = values.shape[0]
    turned = values.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
    start = int(tensor.data_offset)
    data[start : start + turned.nbytes] = np.ascontiguousarray(turned).tobytes()


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_experts_of_an_adapter_are_stacked_as_the_engine_wants_them(name: str, tmp_path: Path) -> None:
    """Factors for every expert, and a model whose experts have their products added."""
    family = FAMILIES[name]
    model = model_of(family)
    tensors = saved(model, tmp_path / "base")
    base = write_base(tmp_path / "base.gguf", family, tensors, config=model.config)
    own = distance(logprobs(base, PROMPTS), of_torch(model))
    chance = torch.Generator().manual_seed(3)
    factors, changed = {}, dict(tensors)
    for weight, value in tensors.items():
        if ".experts." in weight:
            a, b = (torch.randn(size, generator=chance) * 0.15 for size in ((4, value.shape[1]), (value.shape[0], 4)))
            stem = f"base_model.model.{weight.removesuffix('.weight')}"
            factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            changed[weight] = value + 3 * (b @ a)
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    leaves = ["w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"]
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": leaves}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    changed_folder = tmp_path / "changed"
    saved(model, changed_folder)
    save_file(changed, changed_folder / "model.safetensors", metadata={"format": "pt"})
    wanted = of_torch(type(model).from_pretrained(changed_folder, dtype=torch.float32).eval())
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "gguf"), to="gguf", base=str(tmp_path / "base"))
    loraformat.merge(str(base), [str(tmp_path / "adapter")], str(tmp_path / "merged"), verify="full")
    apart = distance(logprobs(base, PROMPTS, tmp_path / "gguf" / "adapter.gguf"), wanted)
    merged = distance(logprobs(tmp_path / "merged" / "base.gguf", PROMPTS), wanted)
    said(f"{family.name}, experts: base {own:.1e}, adapter {apart:.1e}, merged {merged:.1e}")
    assert max(apart, merged) <= max(2 * own, MOST)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_experts_of_an_unmerged_peft_model(name: str, tmp_path: Path) -> None:
    """All experts of a layer as two parameters, as transformers has them and PEFT trains them."""
    family = FAMILIES[name]
    model = model_of(family)
    tensors = saved(model, tmp_path / "base")
    base = write_base(tmp_path / "base.gguf", family, tensors, config=model.config)
    own = distance(logprobs(base, PROMPTS), of_torch(model))
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = adapter_of(model, family, tmp_path / "adapter", target_parameters=stacked)
    wanted = of_torch(wrapped)
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "gguf"), to="gguf", base=str(tmp_path / "base"))
    loraformat.merge(str(base), [str(tmp_path / "adapter")], str(tmp_path / "merged"), verify="full")
    apart = distance(logprobs(base, PROMPTS, tmp_path / "gguf" / "adapter.gguf"), wanted)
    merged = distance(logprobs(tmp_path / "merged" / "base.gguf", PROMPTS), wanted)
    said(f"{family.name}, experts of PEFT: base {own:.1e}, adapter {apart:.1e}, merged {merged:.1e}")
    assert max(apart, merged) <= max(2 * own, MOST)


def test_scales_and_embeddings_are_what_the_engine_computes(tmp_path: Path) -> None:
    """rsLoRA, ranks and alphas of their own, and an input embedding with a head of its own."""
    family = FAMILIES["llama"]
    model = model_of(family)
    tensors = saved(model, tmp_path / "base")
    base = write_base(tmp_path / "base.gguf", family, tensors, config=model.config)
    own = distance(logprobs(base, PROMPTS), of_torch(model))
    patterns: dict[str, Any] = {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"q_proj": 3, "v_proj": 5.5},
    }
    for number, fields in enumerate((patterns, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]})):
        wrapped = adapter_of(model, family, tmp_path / f"adapter{number}", **fields)
        wanted = of_torch(wrapped)
        wrapped.unload()
        out = tmp_path / f"gguf{number}"
        loraformat.convert(str(tmp_path / f"adapter{number}"), str(out), to="gguf", base=str(tmp_path / "base"))
        found = distance(logprobs(base, PROMPTS, out / "adapter.gguf"), wanted)
        said(f"{family.name}, {'embeddings' if number else 'patterns and rsLoRA'}: base {own:.1e}, adapter {found:.1e}")
        assert found <= max(2 * own, MOST)


def test_merging_into_codes_is_merging_into_what_the_engine_decodes(tmp_path: Path) -> None:
    """A merge that keeps the codes of untouched weights, against adapter and base apart."""
    family = FAMILIES["llama"]
    model = model_of(family)
    tensors = saved(model, tmp_path / "base")
    adapter_of(model, family, tmp_path / "adapter", target_modules=["q_proj", "v_proj"]).unload()
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "gguf"), to="gguf", base=str(tmp_path / "base"))
    for kind in ("Q8_0", "Q4_0", "Q4_K"):
        base = write_base(tmp_path / f"{kind}.gguf", family, tensors, kind, config=model.config)
        out = tmp_path / f"merged-{kind}"
        loraformat.merge(
            str(base), [str(tmp_path / "adapter")], str(out), keep_quantized=True, dtype="float32", verify="full"
        )
        loraformat.dequantize(str(base), str(tmp_path / f"dense-{kind}"), dtype="float32")
        coded, dense = logprobs(base, PROMPTS), logprobs(tmp_path / f"dense-{kind}" / base.name, PROMPTS)
        apart = logprobs(base, PROMPTS, tmp_path / "gguf" / "adapter.gguf")
        merged = logprobs(out / base.name, PROMPTS)
        own, found = between(coded, dense), between(apart, merged)
        said(f"{kind}: codes against the same values dense {own:.1e}, adapter apart against merged {found:.1e}")
        # The engine rounds activations to 8 bits before it multiplies by codes, and not by dense values.
        assert found <= max(2 * own, MOST)


def between(one: Sequence[dict[int, float]], other: Sequence[dict[int, float]]) -> float:
    return max(abs(a[token] - b[token]) for a, b in zip(one, other, strict=True) for token in a)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tables_of_a_tied_base_are_refused_here(target: str, tmp_path: Path) -> None:
    family = FAMILIES["gemma3"]
    model = model_of(family)
    saved(model, tmp_path / "base")
    adapter_of(model, family, tmp_path / "adapter", target_modules=[target, "v_proj"]).unload()
    with pytest.raises(loraformat.AdapterRefused, match="one table"):
        loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "gguf"), to="gguf", base=str(tmp_path / "base"))


def test_the_engine_refuses_what_this_package_refuses(tmp_path: Path) -> None:
    """A file for another architecture, and half a pair."""
    family = FAMILIES["qwen3"]
    model = model_of(family)
    tensors = saved(model, tmp_path / "base")
    base = write_base(tmp_path / "base.gguf", family, tensors, config=model.config)
    adapter_of(model, family, tmp_path / "adapter").unload()
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "gguf"), to="gguf", base=str(tmp_path / "base"))
    path = tmp_path / "gguf" / "adapter.gguf"
    good = path.read_bytes()
    another = (b"\x05\0\0\0\0\0\0\0qwen3", b"\x05\0\0\0\0\0\0\0qwen2")
    half = (b"0.attn_q.weight.lora_b", b"9.attn_q.weight.lora_b")
    for old, new in (another, half):
        path.write_bytes(good.replace(old, new))
        assert path.read_bytes() != good
        with pytest.raises(loraformat.LoraFormatError):
            loraformat.merge(str(base), [str(path)], str(tmp_path / "out"))
        with pytest.raises(Refused):
            logprobs(base, PROMPTS, path)
