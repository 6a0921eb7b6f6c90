"""Every tuner of PEFT that is read: merged from disk, against PEFT's own `merge_and_unload`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import Case, Gpt, make, saved
from safetensors.torch import load_file, save_file

from loraformat.jobs.merge import merge
from loraformat.model.updates import ACTIVATIONS

LINEAR = ["wide", "tall", "square"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


def on(config: str, targets: Any = LINEAR, **fields: Any) -> Case:
    return Case(config, {"target_modules": targets, **fields}, Gpt if targets == CONV1D else Case.model)


def conv1d(config: str, **fields: Any) -> Case:
    return on(config, CONV1D, fan_in_fan_out=True, **fields)


CASES = {
    "adalora": on("AdaLoraConfig", init_r=4, target_r=2, total_step=10, lora_alpha=3),
    "adalora-alpha-0": on("AdaLoraConfig", init_r=4, target_r=2, total_step=10, lora_alpha=0),
    "adalora-conv1d": conv1d("AdaLoraConfig", init_r=4, target_r=2, total_step=10),
    "ia3": on("IA3Config", [*LINEAR, "conv"], feedforward_modules=["tall"]),
    "ia3-feedforward": on("IA3Config", [*LINEAR, "conv", "point"], feedforward_modules=["square", "conv", "point"]),
    "ia3-pattern": on("IA3Config", "wide|square", feedforward_modules="s.*"),
    "ia3-conv1d": conv1d("IA3Config", feedforward_modules=["c_fc"]),
    "ia3-conv1d-square": conv1d("IA3Config", feedforward_modules=["c_proj"]),
    "loha": on("LoHaConfig", [*LINEAR, "conv", "point", "line"], r=3, alpha=5, init_weights=False),
    "loha-effective": on(
        "LoHaConfig", [*LINEAR, "conv", "point", "line"], r=3, alpha=5, use_effective_conv2d=True, init_weights=False
    ),
    "lokr": on("LoKrConfig", [*LINEAR, "conv", "point", "line"], r=2, alpha=5, init_weights=False),
    "lokr-small": on("LoKrConfig", [*LINEAR, "conv", "point", "line"], r=1, alpha=5, init_weights=False),
    "lokr-both": on("LoKrConfig", [*LINEAR, "conv"], r=1, alpha=5, decompose_both=True, init_weights=False),
    # Not "line": PEFT cannot merge it there (torch.kron of a view).
    "lokr-effective": on(
        "LoKrConfig", [*LINEAR, "conv", "point"], r=1, alpha=5, use_effective_conv2d=True, init_weights=False
    ),
    "ln-tuning": on("LNTuningConfig", ["norm"]),
    "trainable-tokens": on("TrainableTokensConfig", ["embed_tokens"], token_indices=[3, 1, 17]),
    "vera": on("VeraConfig", r=4),
    "vera-seed": on("VeraConfig", r=4, save_projection=False, projection_prng_key=11),
    "vera-conv1d": conv1d("VeraConfig", r=4),
    "vera-conv1d-seed": conv1d("VeraConfig", r=4, save_projection=False),
    "pvera": on("PveraConfig", r=4),
    "oft": on("OFTConfig", [*LINEAR, "conv", "point", "embed"], oft_block_size=4),
    "oft-blocks": on("OFTConfig", [*LINEAR, "conv", "point", "embed"], r=2, oft_block_size=0),
    "oft-cayley": on("OFTConfig", [*LINEAR, "conv", "point", "embed"], oft_block_size=4, use_cayley_neumann=False),
    "oft-2-terms": on("OFTConfig", oft_block_size=4, num_cayley_neumann_terms=2),
    "oft-3-terms": on("OFTConfig", oft_block_size=4, num_cayley_neumann_terms=3),
    "oft-4-terms": on("OFTConfig", oft_block_size=4, num_cayley_neumann_terms=4),
    "oft-7-terms": on("OFTConfig", oft_block_size=4, num_cayley_neumann_terms=7),
    "oft-coft": on("OFTConfig", [*LINEAR, "conv", "embed"], oft_block_size=4, coft=True, eps=0.5),
    "oft-shared": on("OFTConfig", [*LINEAR, "conv", "embed"], oft_block_size=4, block_share=True),
    "oft-shared-coft": on("OFTConfig", oft_block_size=4, block_share=True, coft=True, eps=0.3),
    "boft": on("BOFTConfig", boft_block_size=4),
    "boft-blocks": on("BOFTConfig", [*LINEAR, "conv", "point"], boft_block_size=0, boft_block_num=2),
    "hira": on("HiraConfig", [*LINEAR, "conv", "point", "embed"], r=4),
    "hira-conv1d": conv1d("HiraConfig", r=4),
    "unilora": on("UniLoraConfig", r=4, theta_d_length=50, save_indices=True),
    "unilora-conv1d": conv1d("UniLoraConfig", r=4, theta_d_length=50, save_indices=True),
    "tinylora": on("TinyLoraConfig", r=3, u=5, weight_tying=1.0),
    "tinylora-conv1d": conv1d("TinyLoraConfig", r=3, u=5, weight_tying=1.0),
    "hra": on("HRAConfig", [*LINEAR, "conv", "point"], r=4),
    "hra-odd": on("HRAConfig", [*LINEAR, "conv", "point"], r=3),
    "hra-orthogonal": on("HRAConfig", [*LINEAR, "conv", "point"], r=4, apply_GS=True),
    **{f"road-{n}": on("RoadConfig", group_size=4, variant=f"road_{n}") for n in (1, 2, 4)},
    "road-groups": on("RoadConfig", group_size=12, variant="road_1"),
    "miss": on("MissConfig", r=4),
    "miss-ragged": on("MissConfig", r=5),
    "miss-mini": on("MissConfig", r=4, mini_r=6, init_weights="mini"),
    "miss-bat": on("MissConfig", r=4, init_weights="bat"),
    "miss-bat-large": on("MissConfig", r=12, init_weights="bat"),
    "deft": on("DeftConfig", r=4),
    "deft-qr": on("DeftConfig", r=4, decomposition_method="qr", alpha=6),
    "deft-random": on("DeftConfig", r=3, init_weights=False, alpha=2),
    "deft-para": on("DeftConfig", r=4, para=True),
    "deft-para-qr": on("DeftConfig", r=4, para=True, decomposition_method="qr"),
    "deft-conv1d": conv1d("DeftConfig", r=4, alpha=3),
    "deft-conv1d-qr": conv1d("DeftConfig", r=4, decomposition_method="qr"),
    "osf": on("OSFConfig", effective_rank=9),
    "osf-half": on("OSFConfig"),
    "osf-pattern": on("OSFConfig", effective_rank=0.25, rank_pattern={"tall": 20}),
    "peanut": on("PeanutConfig", r=4, scaling=0.7),
    **{f"peanut-depth-{depth}": on("PeanutConfig", r=4, depth=depth, act_fn="tanh") for depth in (1, 2, 3)},
    **{f"peanut-{name}": on("PeanutConfig", ["wide"], r=4, depth=1, act_fn=name) for name in ACTIVATIONS},
    "frod": on("FrodConfig", progressbar=False),
    "frod-dense": on("FrodConfig", sparse_rate=0.4, progressbar=False, regularization_alpha=0.1),
    "frod-diagonal": on("FrodConfig", sparse_rate=0.0, progressbar=False),
    "frod-conv1d": conv1d("FrodConfig", sparse_rate=0.2, progressbar=False),
    **{
        f"glora-{ab}-{c}-{de}": on("GloraConfig", r=3, config_A_B=ab, config_C=c, config_D_E=de)
        for ab, c, de in (
            *(("lora", "lora", "constant"), ("vector", "lora", "vector"), ("constant", "vector", "vector")),
            *(("none", "vector", "none"), ("none", "none", "constant"), ("lora", "none", "none")),
            *(("vector", "none", "constant"), ("none", "lora", "none"), ("constant", "none", "none")),
        )
    },
    "c3a": on("C3AConfig", block_size=4),
    "c3a-large": on("C3AConfig", block_size=12),
    "fourierft": on("FourierFTConfig", n_frequency=50, scaling=300.0),
    "fourierft-seed": on("FourierFTConfig", [*LINEAR, "odd"], n_frequency=70, scaling=100.0, random_loc_seed=5),
    "shira": on("ShiraConfig", r=2),
    "supertuning": on("SupertuningConfig", sparsity=0.9),
    "supertuning-lora": on("SupertuningConfig", sparsity=0.95, r=4, lora_alpha=6),
    "waveft": on("WaveFTConfig", [*LINEAR, "odd"], n_frequency=90, scaling=5.0),
    "waveft-plain": on("WaveFTConfig", [*LINEAR, "odd"], n_frequency=90, use_idwt=False, random_loc_seed=4),
    "waveft-proportional": on("WaveFTConfig", [*LINEAR, "odd"], n_frequency=90, proportional_parameters=True),
    "delora": on("DeloraConfig", r=4),
    "gralora": on("GraloraConfig", r=4, gralora_k=2),
    "gralora-hybrid": on("GraloraConfig", r=8, gralora_k=4, hybrid_r=3, alpha=7),
    "gralora-conv1d": conv1d("GraloraConfig", r=4, gralora_k=2),
    "vblora": on("VBLoRAConfig", r=4, num_vectors=20, vector_length=4, topk=2),
    "vblora-topk": on("VBLoRAConfig", r=4, num_vectors=20, vector_length=4, topk=3, save_only_topk_weights=True),
    "vblora-conv1d": on("VBLoRAConfig", CONV1D, r=4, num_vectors=20, vector_length=2, topk=2),
    "randlora": on("RandLoraConfig", r=5, randlora_alpha=16),
    "randlora-sparse": on("RandLoraConfig", r=4, sparse=True, randlora_alpha=16),
    "randlora-conv1d": conv1d("RandLoraConfig", r=5, randlora_alpha=16),
    "beft": on("BeftConfig", ["wide", "square"]),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_from_disk_as_peft_merges(name: str, tmp_path: Path) -> None:
    expected = make(CASES[name], tmp_path)
    merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "merged"))
    result, base = saved(tmp_path / "merged"), saved(tmp_path / "base")
    assert result.keys() == expected.keys()
    assert any(not torch.allclose(result[weight], base[weight], atol=1e-2) for weight in base)
    for weight, value in expected.items():
        # float32 of values of some units, in another order of sums than PEFT's
        torch.testing.assert_close(
            result[weight], value, rtol=1e-5, atol=1e-5, msg=lambda text, w=weight: f"{w}: {text}"
        )


@pytest.mark.parametrize(
    "name", ["deft-qr", "frod-dense", "glora-lora-lora-constant", "miss-bat", "osf", "peanut-tanh"]
)
def test_two_adapters_of_a_base_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    import peft

    case, (base, one, other) = CASES[name], (tmp_path / part for part in ("base", "adapter", "other"))
    make(case, tmp_path)
    shutil.copytree(one, other)
    tensors = load_file(one / "adapter_model.safetensors")
    trained = [key for key in tensors if not key.startswith("base_model.frod_") and not key.endswith(".zeros")]
    more = {key: tensors[key] + 0.1 * torch.randn(tensors[key].shape) for key in trained}
    save_file({**tensors, **more}, other / "adapter_model.safetensors", metadata={"format": "pt"})
    model = case.model()
    model.load_state_dict(saved(base))
    adapted = peft.PeftModel.from_pretrained(model, one)
    adapted.load_adapter(other, "other")
    adapted.base_model.set_adapter(["default", "other"])
    expected = adapted.merge_and_unload().state_dict()
    merge(str(base), [str(one), str(other)], str(tmp_path / "merged"))
    result = saved(tmp_path / "merged")
    for weight, value in expected.items():
        torch.testing.assert_close(result[weight], value.detach(), rtol=1e-5, atol=1e-4)
