"""How many axes each tensor of each tuner has: one more or one less is an error that names the tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bundles import bundle

from loraformat.errors import FormatError, LoraFormatError
from loraformat.formats import peft
from loraformat.formats.kit.base import Hints
from loraformat.formats.peft.tuners import TUNERS

# As PEFT 0.21.2 saves them: `update_layer` of tuners/*/layer.py, whose shapes these are.
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "ADALORA": {"lora_A": (2,), "lora_B": (2,), "lora_E": (2,)},
    "BEFT": {"beft_bias": (1, 2)},
    "BOFT": {"boft_R": (4,), "boft_s": (2,)},
    "BONE": {"bone_block": (2, 3), "miss_block": (2, 3)},
    "C3A": {"c3a_kernel": (3,)},
    "DEFT": {"deft_P": (2,), "deft_R": (2,)},
    "DELORA": {"delora_A": (2,), "delora_B": (2,), "delora_lambda": (1,), "delora_w_norm": (1,)},
    "FOURIERFT": {"fourierft_spectrum": (1,)},
    "FROD": {"frod_lambda_l": (1,), "frod_lambda_s_values": (1,)},
    "GLORA": {
        **{f"glora_{path}.{factor}": (2,) for path in "ABC" for factor in ("Xd", "Xu")},
        **{f"glora_{path}.X": (1, 2) for path in "ABCDE"},
    },
    "GRALORA": {
        "gralora_A": (3,),
        "gralora_B": (3,),
        "gralora_A_general.weight": (2,),
        "gralora_B_general.weight": (2,),
    },
    "HIRA": {
        **{f"hira_{side}": (2, 3, 4, 5) for side in "AB"},
        **{f"hira_embedding_{side}": (2,) for side in "AB"},
    },
    "HRA": {"hra_u": (2,)},
    "IA3": {"ia3_l": (2, 4, 5)},
    "LN_TUNING": {},
    "MISS": {"bone_block": (2, 3), "miss_block": (2, 3)},
    "OFT": {"oft_R.weight": (2,), "oft_embedding_R.weight": (2,)},
    "OSF": {"osf_svd_params.U_low": (2,), "osf_svd_params.S_low": (1,), "osf_svd_params.V_low": (2,)},
    "PEANUT": {
        "peanut_A.weight": (2,),
        "peanut_B.weight": (2,),
        "peanut_encoders.0.weight": (2,),
        "peanut_decoders.0.weight": (2,),
        "peanut_encoders.63.weight": (2,),
        "peanut_decoders.63.weight": (2,),
    },
    "PVERA": {"pvera_lambda_b": (1,), "pvera_lambda_d": (1,)},
    "RANDLORA": {"randlora_lambda": (2,), "randlora_gamma": (2,), "randlora_A": (3,), "randlora_B": (3,)},
    "ROAD": {"road_theta": (1,), "road_alpha": (1,)},
    "SHIRA": {"shira_weight": (1,), "shira_indices": (2,)},
    "SUPERTUNING": {
        "supertuning_values": (1,),
        "supertuning_indices": (1,),
        "supertuning_lora_A.weight": (2,),
        "supertuning_lora_B.weight": (2,),
    },
    "TINYLORA": {"tinylora_A": (2,), "tinylora_B": (2,), "tinylora_P": (3,)},
    "TRAINABLE_TOKENS": {},
    "UNILORA": {f"unilora_{kind}_{side}": (2,) for kind in ("indices", "scales") for side in "AB"},
    "VBLORA": {f"vblora_logits_{side}{end}": (3,) for side in "AB" for end in ("", "_topk_indices", "_topk_weights")},
    "VERA": {"vera_lambda_b": (1,), "vera_lambda_d": (1,)},
    "WAVEFT": {"waveft_spectrum": (1,)},
}
SHARED = {
    "FROD": {"frod_V.q": (2,), "frod_s_indices.q": (2,), "frod_s_size.q": (1,)},
    "PVERA": {"pvera_A": (2,), "pvera_B": (2,)},
    "RANDLORA": {"randlora_A": (3,), "randlora_B": (3,)},
    "TINYLORA": {"tinylora_v.0": (1,)},
    "UNILORA": {"unilora_theta_d": (1,)},
    "VBLORA": {"vblora_vector_bank": (2,)},
    "VERA": {"vera_A": (2,), "vera_B": (2,)},
}
# Of any shape: layer norms as the model has them, and the zeros that GLoRA keeps for what is nothing.
OF_ANY_SHAPE = {"LN_TUNING": 2, "GLORA": 5, "PEANUT": 2 * 62}
FIELDS: dict[str, dict[str, Any]] = {
    "OFT": {"oft_block_size": 2},
    "UNILORA": {"save_indices": True},
    "TINYLORA": {"weight_tying": 1.0},
}
CASES = [
    *(
        (peft_type, f"base_model.model.m.q.{name}", axes)
        for peft_type, named in AXES.items()
        for name, axes in named.items()
    ),
    *((peft_type, f"base_model.{name}", axes) for peft_type, named in SHARED.items() for name, axes in named.items()),
]


def read(peft_type: str, name: str, axes: int) -> None:
    config = {"peft_type": peft_type, "target_modules": ["q"], **FIELDS.get(peft_type, {})}
    tensors = {name: torch.ones((2,) * axes)}
    folder = bundle({"adapter_config.json": config, "adapter_model.safetensors": tensors})
    peft.read(folder, hints=Hints(weights={"m.q.weight": (6, 4)}))


def test_no_tensor_of_a_tuner_is_left_out_here() -> None:
    assert AXES.keys() == TUNERS.keys()
    for peft_type, tuner in TUNERS.items():
        assert len(tuner.parts) == len(AXES[peft_type]) + OF_ANY_SHAPE.get(peft_type, 0), peft_type
        assert len(tuner.shared) == len(SHARED.get(peft_type, {})), peft_type


@pytest.mark.parametrize(("peft_type", "name", "axes"), CASES, ids=str)
def test_another_number_of_axes_is_an_error_that_names_the_tensor(
    peft_type: str, name: str, axes: tuple[int, ...]
) -> None:
    wanted = " or ".join(str(count) for count in axes)
    own = name.removeprefix("base_model.").removeprefix("model.m.q.")
    for count in range(7):
        told = None
        try:
            read(peft_type, name, count)
        except FormatError as error:
            told = error
        except LoraFormatError:
            pass  # the others of the module are missing, or it does not fit
        is_refused = told is not None and f"{own}: expected {wanted} axes" in str(told)
        assert is_refused is (count not in axes), count
