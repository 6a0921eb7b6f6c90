"""A base in 16 bits as bitsandbytes makes it on loading: against the library, in windows, and what cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantization.models import once, same, save_adapter
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.containers import open_checkpoint
from loraformat.containers.quantized import reference_rows
from loraformat.containers.quantized.as_trained import Quantizer, as_trained
from loraformat.errors import LoraFormatError, NonFiniteValue, UnsupportedUpdate, UsageError
from loraformat.merger.inputs import open_inputs
from loraformat.merger.plan.data import MergePlan

LAYER = "model.layers.0"
# Blocks span rows, and the last one of the second and third is cut short.
SHAPES = {"self_attn.q_proj": (80, 80), "self_attn.v_proj": (33, 80), "mlp.up_proj": (97, 72)}
TOUCHED = ("self_attn.q_proj", "self_attn.v_proj")
SPECS = ["nf4", "fp4", "nf4,double", "nf4,block=128", "fp4,double,block=32", "int8"]


def base(folder: Path, dtype: torch.dtype = torch.bfloat16, more: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir()
    chance = torch.Generator().manual_seed(1)
    tensors = {f"{LAYER}.{name}.weight": torch.randn(*shape, generator=chance) for name, shape in SHAPES.items()}
    tensors[f"{LAYER}.mlp.up_proj.weight"][5] = 0  # whole blocks, and a row, of zeros
    tensors |= {name: torch.randn(24, 80, generator=chance) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors |= {"model.norm.weight": torch.ones(80), f"{LAYER}.mlp.gate.weight": torch.ones(4, 80), **(more or {})}
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    described = {"model_type": "llama", "tie_word_embeddings": False, **config}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def change(folder: Path, rank: int = 3) -> tuple[Path, dict[str, Any]]:
    """An adapter with a scale of 2, and what it adds: small multiples of 1/32, which float64 adds exactly."""
    folder.mkdir()
    chance, tensors, deltas = torch.Generator().manual_seed(2), {}, {}
    for name in TOUCHED:
        out, inputs = SHAPES[name]
        down = torch.randint(-9, 10, (rank, inputs), generator=chance) / 32
        up = torch.randint(-9, 10, (out, rank), generator=chance) / 32
        prefix = f"base_model.model.{LAYER}.{name}"
        tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
        deltas[f"{LAYER}.{name}.weight"] = 2.0 * up.double().numpy() @ down.double().numpy()
    save_adapter(folder, tensors, TOUCHED)
    return folder, deltas


def decoded(folder: Path, spec: str) -> dict[str, Any]:
    """The quantized weights, whole."""
    found = as_trained(open_checkpoint(str(folder)), Quantizer.parse(spec))
    assert found.quantized is not None
    return {
        name: np.asarray(found.weights[name].read(0, one.shape[0])) for name, one in found.quantized.weights.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", SPECS)
def test_updates_are_added_to_what_was_decoded(tmp_path: Path, spec: str, dtype: torch.dtype) -> None:
    folder, (adapter, deltas) = base(tmp_path / "b", dtype), change(tmp_path / "a")
    report = loraformat.merge(str(folder), [str(adapter)], str(tmp_path / "o"), as_trained=spec, verify="full")
    before, after, weights = load_file(folder / "model.safetensors"), load_file(tmp_path / "o" / "model.safetensors"), 0
    for name, values in decoded(folder, spec).items():
        wanted = values.astype(np.float64) + deltas.get(name, 0.0)
        assert same(after[name], once(wanted, str(dtype).removeprefix("torch."))), name
        assert not torch.equal(after[name], before[name])
        weights += 1
    assert weights == len(SHAPES)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", f"{LAYER}.mlp.gate.weight"):
        assert torch.equal(after[name], before[name])
    assert (report.data.as_trained, report.data.checked.compared) == (spec, 3)
    assert "quantization_config" not in json.loads((tmp_path / "o" / "config.json").read_text())
    manifest = json.loads((tmp_path / "o" / "loraformat.manifest.json").read_text())
    assert manifest["base"]["quantized"]["on_loading"] == spec


@pytest.mark.parametrize("spec", ["nf4,double", "int8"])
def test_the_report_says_how_much_larger_the_error_is_than_the_update(tmp_path: Path, spec: str) -> None:
    folder, (adapter, deltas) = base(tmp_path / "b"), change(tmp_path / "a")
    data = loraformat.merge(str(folder), [str(adapter)], str(tmp_path / "o"), as_trained=spec).data
    before, after = load_file(folder / "model.safetensors"), decoded(folder, spec)
    errors = {name: np.linalg.norm(before[name].double().numpy() - after[name]) for name in deltas}
    for one in data.retention:
        assert one.base_change == pytest.approx(errors[one.weight] / np.linalg.norm(deltas[one.weight]), rel=1e-5)
    both = np.hypot(*errors.values()) / np.hypot(*(np.linalg.norm(delta) for delta in deltas.values()))
    assert data.base_change == pytest.approx(both, rel=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_windows_do_not_show(tmp_path: Path, spec: str) -> None:
    found = as_trained(open_checkpoint(str(base(tmp_path / "b"))), Quantizer.parse(spec))
    assert found.quantized is not None
    for name, one in found.quantized.weights.items():
        whole = np.asarray(found.weights[name].read(0, one.shape[0]))
        for start, stop in ((0, 1), (3, 4), (7, 33), (32, 33), (31, len(whole)), (5, 5)):
            assert np.array_equal(found.weights[name].read(start, stop), whole[start:stop])
            if stop > start:
                assert np.array_equal(
                    reference_rows(found.quantized, found.tensors[name], start, stop), whole[start:stop]
                )


def test_threads_and_memory_do_not_show(tmp_path: Path) -> None:
    folder, (adapter, _) = base(tmp_path / "b"), change(tmp_path / "a")
    written = []
    for number, (jobs, memory) in enumerate(((1, 1 << 10), (3, 64 << 20))):
        out = tmp_path / f"o{number}"
        loraformat.merge(
            str(folder), [str(adapter)], str(out), as_trained="nf4,double", jobs=jobs, memory_nbytes=memory
        )
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_plan_says_how_the_base_is_read(tmp_path: Path) -> None:
    folder, (adapter, _) = base(tmp_path / "b"), change(tmp_path / "a")
    report = loraformat.merge(
        str(folder), [str(adapter)], str(tmp_path / "o"), as_trained="fp4,block=128", dry_run=True
    )
    assert report.data.plan is not None
    plan = MergePlan.from_json(json.loads(json.dumps(report.data.plan)))
    inputs = open_inputs(plan)
    for name, values in decoded(folder, "fp4,block=128").items():
        assert np.array_equal(inputs.base.weights[name].read(0, len(values)), values)


def test_a_run_that_stopped_goes_on(tmp_path: Path) -> None:
    folder, (adapter, _) = base(tmp_path / "b"), change(tmp_path / "a")
    loraformat.merge(str(folder), [str(adapter)], str(tmp_path / "o"), as_trained="nf4", resume=True, verify="full")
    loraformat.merge(str(folder), [str(adapter)], str(tmp_path / "p"), as_trained="nf4")
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == (tmp_path / "p" / "model.safetensors").read_bytes()


def layers_of(folder: Path, spec: str) -> set[str]:
    found = as_trained(open_checkpoint(str(folder)), Quantizer.parse(spec))
    assert found.quantized is not None
    return set(found.quantized.weights)


def test_an_explicit_list_of_skipped_modules_replaces_the_default(tmp_path: Path) -> None:
    folder = base(tmp_path / "b")
    every = {f"{LAYER}.{name}.weight" for name in SHAPES}
    assert layers_of(folder, "nf4") == every
    assert layers_of(folder, "nf4,skip=v_proj") == every - {f"{LAYER}.self_attn.v_proj.weight"} | {"lm_head.weight"}
    assert layers_of(folder, f"nf4,skip={LAYER}.self_attn,skip=lm_head") == {f"{LAYER}.mlp.up_proj.weight"}


def test_experts_are_quantized_by_one_version_of_transformers(tmp_path: Path) -> None:
    expert = f"{LAYER}.mlp.experts.0.w1.weight"
    folder = base(tmp_path / "b", more={expert: torch.randn(8, 64)})
    with pytest.raises(UnsupportedUpdate, match="experts"):
        layers_of(folder, "nf4")
    assert expert in layers_of(folder, "nf4,experts")
    assert expert not in layers_of(folder, "nf4,skip=experts,skip=lm_head")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("nf5", "nf4, fp4, int8"),
        ("", "nf4, fp4, int8"),
        ("nf4,triple", "triple"),
        ("nf4,block=65", "block=65"),
        ("nf4,block=٦٤", "block="),
        ("nf4,double,double", "double"),
        ("int8,block=64", "double and block do not apply"),
        ("nf4,skip=", "skip="),
    ],
)
def test_settings_that_are_none(tmp_path: Path, spec: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        loraformat.merge(str(tmp_path), [str(tmp_path)], str(tmp_path / "o"), as_trained=spec)
    assert not (tmp_path / "o").exists()


def test_settings_as_text() -> None:
    for spec in (*SPECS, "nf4,double,experts,block=256,skip=lm_head,skip=a.b"):
        assert str(Quantizer.parse(spec)) == spec


@pytest.mark.parametrize("spec", ["nf4", "nf4,double", "int8"])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, spec: str) -> None:
    folder, (adapter, _) = base(tmp_path / "b"), change(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.mlp.up_proj.weight"][3, 3] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NonFiniteValue, match="up_proj"):
        loraformat.merge(str(folder), [str(adapter)], str(tmp_path / "o"), as_trained=spec)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("option", "config", "error"),
    [
        ({"dequantize": True}, {}, UsageError),
        ({"keep_quantized": True}, {}, UsageError),
        ({}, {"model_type": "gpt2"}, UnsupportedUpdate),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, option: Any, config: Any, error: type[LoraFormatError]) -> None:
    folder, (adapter, _) = base(tmp_path / "b", **config), change(tmp_path / "a")
    with pytest.raises(error):
        loraformat.merge(str(folder), [str(adapter)], str(tmp_path / "o"), as_trained="nf4", **option)


def test_a_base_in_codes_is_dequantized_instead(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dequantize"):
        layers_of(Path("fixtures/quantized/nf4"), "nf4")


# --- the library ------------------------------------------------------------------------------------------------------


def of_library(weight: torch.Tensor, spec: str) -> torch.Tensor:
    """What bitsandbytes reads back in float32 of what it wrote."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    kind, block = spec[:3], next((int(word[6:]) for word in spec.split(",") if word.startswith("block=")), 64)
    if spec == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return codes.float() * scales[:, None] * 7.874015718698502e-3
    codes, state = functional.quantize_4bit(
        weight, blocksize=block, compress_statistics="double" in spec, quant_type=kind
    )
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # Not the function for the CPU, which does not read back blocks that span rows (see test_libraries.py).
    compute = getattr(_dequantize_4bit_compute, "_torchdynamo_orig_callable", _dequantize_4bit_compute)
    return compute(codes.reshape(-1), scales.float(), state.code, block, weight.shape, torch.float32)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "double" not in spec])
def test_values_are_those_of_bitsandbytes_bit_for_bit(tmp_path: Path, spec: str, dtype: torch.dtype) -> None:
    folder = base(tmp_path / "b", dtype)
    tensors = load_file(folder / "model.safetensors")
    for name, values in decoded(folder, spec).items():
        expected = of_library(tensors[name], spec).numpy()
        assert expected.tobytes() == values.tobytes(), name


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "double" in spec])
def test_scales_that_are_quantized_too_differ_where_two_numbers_are_almost_equally_near(
    tmp_path: Path, spec: str
) -> None:
    """On the CPU the library looks scales up in a table of 2^16 steps, and sums their mean in float32."""
    folder = base(tmp_path / "b", more={f"{LAYER}.mlp.down_proj.weight": torch.randn(512, 512)})
    tensors = load_file(folder / "model.safetensors")
    for name, values in decoded(folder, spec).items():
        expected = of_library(tensors[name], spec).numpy()
        difference = np.abs(values - expected)
        assert np.mean(difference > 4e-7 * np.abs(expected).max()) < 0.01, name
        assert difference.max() < 0.02 * np.abs(expected).max()


@pytest.mark.oracle
def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    from loraformat.containers.quantized.as_trained.quantizer import dynamic_map

    assert np.array_equal(functional.create_dynamic_map().numpy(), dynamic_map())


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["llama", "gpt_neox", "opt", "qwen3", "gemma2", "phi", "phi3", "bloom", "stablelm", "starcoder2", "t5"],
)
def test_layers_are_those_that_transformers_replaces(tmp_path: Path, kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    more = {"vocab_size": 96, "tie_word_embeddings": False, "ffn_dim": 128, "word_embed_proj_dim": 64}
    more |= {"pad_token_id": 0, "num_key_value_heads": 4, "head_dim": 16, "d_model": 64, "d_ff": 128, "d_kv": 16}
    config = transformers.AutoConfig.for_model(kind, **sizes, **more)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "b")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = auto.from_pretrained(tmp_path / "b", quantization_config=settings)
    wanted = {name for name, one in model.named_modules() if isinstance(one, bitsandbytes.nn.Linear4bit)}
    assert wanted
    assert {name.removesuffix(".weight") for name in layers_of(tmp_path / "b", "nf4")} == wanted


def test_codes_are_those_of_the_definition() -> None:
    """Exact middles go down; the rest of a weight is divided by its scale, where other blocks take the inverse."""
    from loraformat.containers.quantized.as_trained.quantizer import code_book, four_bits

    book = np.sort(code_book("nf4"))
    middles = ((book[:-1] + book[1:]) / np.float32(2))[None]
    places, _ = four_bits(middles, np.ones(1, np.float32), "nf4", is_cut=False)
    assert places.tolist() == [list(range(15))]
    above = np.nextafter(middles, np.float32(2))
    assert four_bits(above, np.ones(1, np.float32), "nf4", is_cut=True)[0].tolist() == [list(range(1, 16))]
