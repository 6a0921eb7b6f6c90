"""MLX-LM itself: it computes the same with what we write, and its files are read to the updates that it fuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import dense
from safetensors.torch import save_file

from loraformat.io import load_adapter
from loraformat.jobs.convert import convert
from loraformat.model.updates import LowRank

# Without its part for the CPU, mlx is there and cannot be imported.
mx = pytest.importorskip("mlx.core", reason="mlx is not installed", exc_type=ImportError)
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SIZES = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
MODULES = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 20)}


def model() -> Any:
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    built = Model(
        ModelArgs(model_type="llama", num_hidden_layers=2, rms_norm_eps=1e-5, vocab_size=32, head_dim=4, **SIZES)
    )
    mx.eval(built.parameters())
    return built


def numpy(value: Any) -> np.ndarray:
    return np.array(value.astype(mx.float32))


def weights(built: Any) -> dict[str, np.ndarray]:
    from mlx.utils import tree_flatten

    return {name: numpy(value) for name, value in tree_flatten(built.parameters())}


def output(built: Any) -> np.ndarray:
    return numpy(built(mx.array([[1, 5, 9, 30]])))


def peft_folder(folder: Path, **config: Any) -> Path:
    """An adapter of two layers with an embedding, in PEFT's layout."""
    torch.manual_seed(1)
    ranks = {"self_attn.q_proj": 3, "self_attn.v_proj": 2, "mlp.down_proj": 2}
    tensors, prefix = {}, "base_model.model.model"
    for layer in range(2):
        for module, (rows, cols) in MODULES.items():
            path = f"{prefix}.layers.{layer}.{module}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(ranks[module], cols) / 4
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, ranks[module]) / 4
            if config.get("use_dora"):
                tensors[f"{path}.lora_magnitude_vector"] = torch.rand(rows) + 0.5
    if not config.get("use_dora"):
        tensors[f"{prefix}.embed_tokens.lora_embedding_A"] = torch.randn(2, 32) / 4
        tensors[f"{prefix}.embed_tokens.lora_embedding_B"] = torch.randn(16, 2) / 4
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    names = [name.rpartition(".")[2] for name in MODULES] + ["embed_tokens"]
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {"q_proj": 3}, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps({**stated, **config}))
    return folder


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 7}}, {"use_dora": True}])
def test_it_computes_the_same_with_what_we_write(config: dict[str, Any], tmp_path: Path) -> None:
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.utils import load_adapters

    source = peft_folder(tmp_path / "peft", **config)
    convert(str(source), str(tmp_path / "mlx"), to="mlx", check_roundtrip=True)
    wanted, before = model(), weights(model())
    changed = []
    for name, (update,) in load_adapter(str(source)).updates.items():
        assert isinstance(update, LowRank)
        value = torch.from_numpy(before[name]).double() + dense(update)
        if update.magnitude is not None:
            value *= (update.magnitude.vector.torch().double() / value.norm(dim=1))[:, None]
        changed.append((name, mx.array(value.float().numpy())))
    wanted.update(tree_unflatten(changed))
    found = load_adapters(model(), str(tmp_path / "mlx"))
    np.testing.assert_allclose(output(found), output(wanted), rtol=1e-4, atol=1e-5)
    assert np.abs(output(found) - output(model())).max() > 1e-2


@pytest.mark.parametrize("dora", [False, True])
def test_its_files_become_the_updates_that_it_fuses(tmp_path: Path, *, dora: bool) -> None:
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    built = model()
    built.freeze()
    linear_to_lora_layers(built, 1, parameters, use_dora=dora)
    mx.random.seed(3)
    trained = [
        (name, mx.random.normal(value.shape) / 8 + (1 if name.endswith(".m") else 0))
        for name, value in tree_flatten(built.trainable_parameters())
    ]
    built.update(tree_unflatten(trained))
    folder = tmp_path / "adapters"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(trained))
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "lora_parameters": parameters, "num_layers": 1, "model": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter = load_adapter(str(folder))
    before = weights(model())
    fused = {name: layer.fuse() for name, layer in built.named_modules() if hasattr(layer, "fuse")}
    assert sorted(adapter.updates) == sorted(f"{name}.weight" for name in fused)
    for name, layer in fused.items():
        (update,) = adapter.updates[f"{name}.weight"]
        value = torch.from_numpy(before[f"{name}.weight"]).double() + dense(update)
        if dora:
            value *= (update.magnitude.vector.torch().double() / value.norm(dim=1))[:, None]
        np.testing.assert_allclose(value.numpy(), numpy(layer.weight), rtol=1e-4, atol=1e-5)


def test_arrays_of_mlx_examples(tmp_path: Path) -> None:
    values = {"model.layers.1.self_attn.q_proj.lora_a": mx.ones((16, 3)) / 7}
    values["model.layers.1.self_attn.q_proj.lora_b"] = mx.random.normal((3, 16)).astype(mx.bfloat16)
    mx.savez(str(tmp_path / "adapters.npz"), **values)
    adapter = load_adapter(str(tmp_path / "adapters.npz"))
    (update,) = adapter.updates["model.layers.1.self_attn.q_proj.weight"]
    found = dense(update).T.numpy()
    a, b = (numpy(value).astype(np.float64) for value in values.values())
    np.testing.assert_allclose(found, 20 * a @ b, rtol=1e-6)
