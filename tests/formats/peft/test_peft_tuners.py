"""The table of PEFT's tuners: what is refused, what is noticed, what a base adds, what writers say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from bundles import bundle
from strategies import values

from loraformat.errors import ConfigError, FormatError, UnsupportedUpdate
from loraformat.formats import native, peft
from loraformat.formats.kit.base import Hints
from loraformat.formats.peft.tuners import REFUSED, TUNERS
from loraformat.formats.peft.tuners.multiplicative.rotations import _butterfly_order
from loraformat.model.adapter import Adapter
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import BlockAffine, LowRank, Multiplied, Replace, Rotated, Rows, Scaled

P = "base_model.model."
BASE = {"m.q.weight": (6, 4), "m.q.bias": (6,)}


def read(peft_type: str, entries: dict[str, Any], weights: Any = BASE, **fields: Any) -> Adapter:
    config = {"peft_type": peft_type, "target_modules": ["q"], **fields}
    tensors = {f"{P}{name}" if name.startswith("m.") else f"base_model.{name}": each for name, each in entries.items()}
    folder = bundle({"adapter_config.json": config, "adapter_model.safetensors": tensors})
    return peft.read(folder, hints=Hints(weights=weights))


VERA = {"m.q.vera_lambda_b": values(6), "m.q.vera_lambda_d": values(2)}
OFT = {"m.q.oft_R.weight": values(2, 1)}
OSF = {"U": (6, 3), "S": (3,), "V": (3, 4)}
OSF_SHORT = {"m.q.osf_svd_params.S_low": values(2)}
NO_C = {"m.q.glora_C.zeros": values(4, 1)}
PEANUT = {"m.q.peanut_A.weight": values(2, 6), "m.q.peanut_B.weight": values(6, 2)}
ROAD = {"m.q.road_theta": values(6), "m.q.road_alpha": values(6)}


@pytest.mark.parametrize(
    ("peft_type", "entries", "fields", "message"),
    [
        ("OFT", OFT, {}, "before 0.14"),
        ("WAVEFT", {"m.q.waveft_spectrum": values(3)}, {"wavelet_family": "sym2"}, "sym2"),
        ("SUPERTUNING", {"m.q.supertuning_values": values(3)}, {}, "indices"),
        ("ROAD", ROAD, {"variant": "road_3"}, "road_3"),
        ("PEANUT", PEANUT, {"act_fn": "prelu"}, "prelu"),
        ("DEFT", {"m.q.deft_P": values(6, 2), "m.q.deft_R": values(2, 4)}, {"decomposition_method": "svd"}, "svd"),
        ("FROD", {"m.q.frod_lambda_l": values(4), "m.q.frod_lambda_s_values": values(3)}, {}, "save_projection"),
        ("PSOFT", {"m.q.psoft_R.weight": values(1)}, {}, "signs"),
        ("ADAMSS", {"m.q.adamss_A.0": values(2, 4)}, {"num_subspaces": 5}, "rows"),
        ("RANDLORA", {"m.q.randlora_lambda": values(2, 2), "m.q.randlora_gamma": values(2, 4)}, {}, "bases"),
        ("PVERA", {"m.q.pvera_lambda_b": values(6), "m.q.pvera_lambda_d": values(4)}, {}, "projections"),
        ("FOURIERFT", {"m.other.fourierft_spectrum": values(3)}, {}, "no matrix m.other.weight"),
        ("VERA", {**VERA, "m.q.vera_lambda_b": values(5)}, {}, "5 x any.*6 x 4"),
        ("ADALORA", {}, {"alora_invocation_tokens": [1]}, "aLoRA"),
        ("UNILORA", {"unilora_theta_d": values(5)}, {}, "save_indices"),
        ("TINYLORA", {"tinylora_v.0": values(2), "tinylora_v.1": values(2)}, {}, "weight_tying"),
        ("TINYLORA", {"tinylora_v.0": values(2)}, {"weight_tying": 1.0, "save_projection": False}, "save_projection"),
    ],
)
def test_a_variant_that_is_not_read_is_refused_by_name(
    peft_type: str, entries: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedUpdate, match=message):
        read(peft_type, entries, **fields)


def test_no_type_is_both_read_and_refused() -> None:
    assert not set(TUNERS) & set(REFUSED)


@pytest.mark.parametrize("entries", [VERA, {"m.q.fourierft_spectrum": values(3)}, {"m.q.miss_block": values(2, 6)}])
def test_a_shape_that_only_the_base_tells_is_asked_for(entries: dict[str, Any]) -> None:
    peft_type = {"vera": "VERA", "four": "FOURIERFT", "miss": "MISS"}[next(iter(entries))[4:8]]
    with pytest.raises(UnsupportedUpdate, match="--base"):
        read(peft_type, entries, weights=None)
    (update,) = read(peft_type, entries).updates["m.q.weight"]
    assert isinstance(update, LowRank)
    assert update.shape == (6, 4)


def test_the_base_may_have_one_prefix_more() -> None:
    adapter = read("VERA", VERA, weights={"model.m.q.weight": (6, 4), "model.m.k.weight": (9, 9)})
    assert adapter.updates["m.q.weight"][0].shape == (6, 4)


@pytest.mark.parametrize(
    ("peft_type", "entries", "fields"),
    [
        ("ADALORA", {"m.q.lora_A": values(2, 4), "m.q.lora_B": values(6, 2), "m.q.lora_E": values(3, 1)}, {}),
        ("ADALORA", {"m.q.lora_A": values(2), "m.q.lora_B": values(6, 2), "m.q.lora_E": values(2, 1)}, {}),
        ("ADALORA", {"m.q.lora_A": values(2, 4), "m.q.lora_B": values(6, 0), "m.q.lora_E": values(2, 1)}, {}),
        ("OFT", {"m.q.oft_R.weight": values(2, 2)}, {"oft_block_size": 2}),
        ("BOFT", {"m.q.boft_R": values(1, 2, 2, 3), "m.q.boft_s": values(6, 1)}, {}),
        ("ROAD", ROAD, {"group_size": 5}),
        ("ROAD", {**ROAD, "m.q.road_theta": values(4)}, {"group_size": 2}),
        ("VERA", {**VERA, "vera_A": values(2, 3), "vera_B": values(6, 2)}, {}),
        ("VERA", {**VERA, "vera_A": values(2), "vera_B": values(6, 2)}, {}),
        ("GRALORA", {"m.q.gralora_A": values(2, 2, 3), "m.q.gralora_B": values(2, 3, 3)}, {}),
        ("SHIRA", {"m.q.shira_weight": values(3), "m.q.shira_indices": torch.zeros(2, 4, dtype=torch.int32)}, {}),
        ("FOURIERFT", {"m.q.fourierft_spectrum": values(25)}, {}),
        (
            "DELORA",
            {
                "m.q.delora_A": values(2, 4),
                "m.q.delora_B": values(6, 3),
                "m.q.delora_lambda": values(1),
                "m.q.delora_w_norm": values(4),
            },
            {},
        ),
        ("MISS", {"m.q.miss_block": values(2, 6)}, {"init_weights": "bat"}),
        ("BONE", {"m.q.bone_block": values(3, 2, 3)}, {"init_weights": "bat"}),
        ("DEFT", {"m.q.deft_P": values(6, 2), "m.q.deft_R": values(3, 4)}, {}),
        ("DEFT", {"m.q.deft_P": values(6, 7)}, {"para": True, "decomposition_method": "qr"}),
        ("PEANUT", {**PEANUT, "m.q.peanut_B.weight": values(6, 3)}, {}),
        ("OSF", {f"m.q.osf_svd_params.{n}_low": values(*s) for n, s in OSF.items()} | OSF_SHORT, {}),
        (
            "FROD",
            {"m.q.frod_lambda_l": values(4), "m.q.frod_lambda_s_values": values(3)}
            | {"frod_V.m_q": values(4, 5), "frod_s_indices.m_q": values(2, 3)},
            {},
        ),
        ("GLORA", {f"m.q.glora_{n}.X": values(s) for n, s in zip("ABDE", (1, 1, 6, 5), strict=True)} | NO_C, {}),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_an_error(
    peft_type: str, entries: dict[str, Any], fields: dict[str, Any]
) -> None:
    with pytest.raises(FormatError, match=r"fit|axes|empty|not hold|not form|not square|more columns"):
        read(peft_type, entries, **fields)


def test_places_outside_the_weight_are_an_error_when_they_are_read() -> None:
    indices = torch.tensor([[0, 6], [0, 0]], dtype=torch.int32)
    adapter = read("SHIRA", {"m.q.shira_weight": values(2), "m.q.shira_indices": indices})
    with pytest.raises(FormatError, match="outside"):
        adapter.updates["m.q.weight"][0].delta.torch()


def test_values_of_one_place_are_added_before_they_are_rounded() -> None:
    indices = torch.tensor([[2, 0, 2, 5, 2], [1, 0, 1, 3, 1]], dtype=torch.int32)
    entries = {"m.q.shira_weight": torch.tensor([1.0, 7.0, 2.0**-24, -3.0, 2.0**-24]), "m.q.shira_indices": indices}
    delta = read("SHIRA", entries).updates["m.q.weight"][0].delta
    wanted = np.zeros((6, 4))
    wanted[2, 1], wanted[0, 0], wanted[5, 3] = 1 + 2.0**-23, 7, -3
    assert np.array_equal(delta.load(), wanted)
    assert all(np.array_equal(delta.read(n, m), wanted[n:m]) for n in range(7) for m in range(n, 7))


def vblora(logits: torch.Tensor, **fields: Any) -> np.ndarray:
    bank = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    entries = {"m.q.vblora_logits_A": logits, "m.q.vblora_logits_B": torch.zeros(3, 1, 3), "vblora_vector_bank": bank}
    return read("VBLORA", entries, topk=2, **fields).updates["m.q.weight"][0].down.load()


def test_the_vectors_of_the_largest_logits_are_mixed_by_their_softmax() -> None:
    down = vblora(torch.tensor([[[0.0, math.log(3), -9.0], [50.0, 0.0, 50.0]]]))
    np.testing.assert_allclose(down, [[1.75, 17.5, 2.5, 25]], rtol=1e-6)  # log 3 of float32
    assert np.isinf(vblora(torch.tensor([[[0.0, -math.inf, -math.inf], [0, 0, 0]]]))).sum() == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_logit_that_is_not_a_number_is_not_passed_over(place: int) -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]])
    logits[0, 1, place] = math.nan
    assert np.isnan(vblora(logits)[0]).tolist() == [False, False, True, True]


def test_a_part_without_its_others_stays_unclaimed() -> None:
    halves = {
        "VERA": {"m.q.vera_lambda_b": values(6)},
        "DEFT": {"m.q.deft_P": values(6, 2)},
        "OSF": {"m.q.osf_svd_params.U_low": values(6, 2)},
        "PEANUT": {"m.q.peanut_A.weight": values(2, 6)},
        "FROD": {"m.q.frod_lambda_l": values(4)},
        "GLORA": {f"m.q.glora_{name}.zeros": values(6, 4) for name in "ABC"},
    }
    for peft_type, entries in halves.items():
        adapter = read(peft_type, entries)
        assert (list(adapter.updates), list(adapter.unclaimed)) == ([], [f"{P}{name}" for name in sorted(entries)])


def test_bone_in_the_variant_bat_is_miss_in_it() -> None:
    blocks = values(3, 2, 2)
    for peft_type, name in (("BONE", "bone"), ("MISS", "miss")):
        (update,) = read(peft_type, {f"m.q.{name}_block": blocks}, init_weights="bat").updates["m.q.weight"]
        assert isinstance(update, BlockAffine)
        assert torch.equal(update.blocks.torch(), blocks)


@pytest.mark.parametrize("is_para", [True, False])
def test_columns_whose_orthonormal_basis_rounding_decides_are_refused(is_para: bool) -> None:
    columns = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    columns[:, 1] = 2 * columns[:, 0]
    entries = {"m.q.deft_P": columns, "m.q.deft_R": values(2, 4)}
    chain = read("DEFT", entries, decomposition_method="qr", para=is_para).updates["m.q.weight"]
    with pytest.raises(UnsupportedUpdate, match="ambiguous"):
        chain[0].up.torch()


def test_kinds_of_updates() -> None:
    ia3 = read("IA3", {"m.q.ia3_l": values(6, 1), "m.d.ia3_l": values(1, 5)}).updates
    assert ia3.keys() == {"m.q.weight", "m.q.bias", "m.d.weight"}
    assert isinstance(ia3["m.d.weight"][0], Scaled)
    assert ia3["m.d.weight"][0].shape == (0, 5)
    assert ia3["m.q.bias"][0].is_bias
    boft = read("BOFT", {"m.q.boft_R": values(2, 2, 2, 2), "m.q.boft_s": values(6, 1)}).updates["m.q.weight"]
    assert [type(each) for each in boft] == [Rotated, Rotated, Scaled]
    (hra,) = read("HRA", {"m.q.hra_u": values(4, 2)}).updates["m.q.weight"]
    assert isinstance(hra, Multiplied)
    norms = {"m.n.ln_tuning_layers.weight": values(4), "m.n.ln_tuning_layers.bias": values(4)}
    assert all(isinstance(chain[0], Replace) for chain in read("LN_TUNING", norms).updates.values())


def test_trained_tokens_and_their_numbers() -> None:
    rows = {"m.embed.trainable_tokens_delta": values(2, 4)}
    (update,) = read("TRAINABLE_TOKENS", rows, token_indices=[7, 3]).updates["m.embed.weight"]
    assert isinstance(update, Rows)
    assert (update.indices, update.shape) == ((7, 3), (8, 4))
    with pytest.raises(ConfigError, match="2 trained rows"):
        read("TRAINABLE_TOKENS", rows, token_indices=[7])


def test_writers_refuse_what_multiplies() -> None:
    adapter = read("IA3", {"m.q.ia3_l": values(6, 1)})
    for writer in (peft, native):
        faults = [loss.message for loss in writer.losses(adapter) if loss.code == "LF702" and loss.where]
        assert len(faults) == 1
        assert "an update of the kind scaled" in faults[0]
        assert "the same holds for 1 more weight" in faults[0]


def test_a_low_rank_tuner_is_written_as_lora() -> None:
    """VeRA and its kin are products of two factors; what PEFT loads afterwards is plain LoRA."""
    adapter = read("VERA", {**VERA, "vera_A": values(2, 5), "vera_B": values(8, 2)}, r=2, projection_prng_key=3)
    assert "LF703" in {loss.code for loss in peft.losses(adapter)}
    assert not [loss for loss in peft.losses(adapter) if loss.code == "LF702"]
    again = peft.read(peft.write(adapter))
    assert again.config.raw["peft_type"] == "LORA"
    assert "projection_prng_key" not in again.config.raw
    assert again.notes == ()
    (before,), (after,) = adapter.updates["m.q.weight"], again.updates["m.q.weight"]
    assert isinstance(before, LowRank)
    assert isinstance(after, LowRank)
    assert torch.equal(after.scale * after.up.torch() @ after.down.torch(), before.up.torch() @ before.down.torch())


@pytest.mark.parametrize(("count", "size", "levels"), [(4, 4, 2), (8, 2, 3), (4, 6, 3), (12, 4, 2)])
def test_butterflies_agree_with_peft(count: int, size: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT needs a GPU for more than one butterfly; its permutations and products run here on dense matrices."""
    from peft import BOFTConfig
    from peft.tuners.boft import layer

    def dense(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*level) for level in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer.FastBlockDiag, "apply", dense)
    length = count * size
    config = BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=levels)
    linear = layer.Linear(torch.nn.Linear(length, 6), "default", config=config)
    weight = linear.base_layer.weight.detach().double().clone()
    linear.boft_R["default"].data = values(levels, count, size, size)
    linear.boft_s["default"].data = values(6, 1, seed=1)
    linear.merge()
    entries = {"m.q.boft_R": linear.boft_R["default"].data, "m.q.boft_s": linear.boft_s["default"].data}
    from oracle import merged

    chain = list(read("BOFT", entries).updates["m.q.weight"])
    # float32 in PEFT
    assert torch.allclose(merged(weight, chain), linear.base_layer.weight.detach().double(), rtol=1e-4, atol=1e-5)
    assert sorted(_butterfly_order(count, size, levels - 1)) == list(range(length))


def test_every_lazy_part_loads_what_its_shape_says() -> None:
    found = read("GRALORA", {"m.q.gralora_A": values(2, 2, 4), "m.q.gralora_B": values(2, 4, 3)}).updates
    (update,) = found["m.q.weight"]
    assert isinstance(update, LowRank)
    for factor in (update.up, update.down):
        assert isinstance(factor, LazyTensor)
        assert factor.torch().shape == factor.shape
        assert np.array_equal(factor.read(1, 3), factor.load()[1:3])


@pytest.mark.parametrize(("terms", "powers"), [(1, []), (2, [2]), (3, [2, 2]), (5, [2, 2, 2, 2])])
@pytest.mark.parametrize("version", [{}, {"peft_version": "0.17.1"}, {"peft_version": "main@5d602fd"}])
def test_the_series_of_oft_before_0_18_counts_its_last_power_twice(
    terms: int, powers: list[int], version: dict[str, str]
) -> None:
    config = {"oft_block_size": 2, "use_cayley_neumann": True, "num_cayley_neumann_terms": terms, **version}
    (update,) = read("OFT", {"m.q.oft_R.weight": torch.tensor([[0.3], [0.0]])}, **config).updates["m.q.weight"]
    skew = torch.tensor([[0.0, 0.3], [-0.3, 0.0]])
    expected = torch.eye(2) + sum(
        (factor * skew.matrix_power(n + 1) for n, factor in enumerate(powers)), torch.zeros(2, 2)
    )
    assert torch.allclose(update.blocks.torch()[0], expected.T, atol=1e-6)
    assert torch.equal(update.blocks.torch()[1], torch.eye(2))
