"""Checkpoints of NeMo 2 and Megatron Bridge as they lie on disk, written by torch.distributed.checkpoint itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed_files import Sharded, save
from oracle import dense
from strategies import values
from torch import Tensor

from loraformat.errors import UnsupportedUpdate
from loraformat.io import load_adapter
from loraformat.jobs.convert import convert
from loraformat.jobs.validate import validate
from loraformat.model.adapter import Adapter

HEADS = {"num_attention_heads": 4, "num_query_groups": 2, "hidden_size": 16, "kv_channels": 6}
RUN: dict[str, Any] = {
    "peft": {"_target_": "megatron.bridge.peft.lora.LoRA", "dim": 2, "alpha": 8, "target_modules": ["linear_qkv"]},
    "model": {**HEADS, "gated_linear_unit": True, "hf_model_id": "meta-llama/Llama-3.2-1B"},
}
# (module, rows, columns) of a layer.
MODULES = (
    ("self_attention.linear_qkv.adapter", 48, 16),
    ("self_attention.linear_proj.adapter", 16, 24),
    ("mlp.linear_fc1.adapter", 40, 16),
    ("mlp.linear_fc2.adapter", 16, 20),
)
LAYERS = 3


def factors() -> dict[str, Tensor]:
    """By layer, as models of several kinds of layers are saved."""
    found = {}
    for layer in range(LAYERS):
        for number, (module, rows, cols) in enumerate(MODULES):
            path = f"decoder.layers.{layer}.{module}"
            found[f"{path}.linear_in.weight"] = values(2, cols, seed=10 * layer + number)
            found[f"{path}.linear_out.weight"] = values(rows, 2, seed=100 + 10 * layer + number)
    return found


def stacked(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """All layers in one tensor, as Megatron-Core saves layers of one kind."""
    return {
        f"decoder.layers.{module}.linear_{side}.weight": torch.stack(
            [entries[f"decoder.layers.{layer}.{module}.linear_{side}.weight"] for layer in range(LAYERS)]
        )
        for module, _, _ in MODULES
        for side in ("in", "out")
    }


def in_shards(entries: dict[str, Tensor]) -> dict[str, Any]:
    """As two pipeline stages, or two tensor-parallel ranks, leave them."""
    return {
        name: Sharded(value, ((1,), (), ()) if value.dim() == 3 else ((value.shape[0] // 2,), ()))
        for name, value in entries.items()
    }


def folder(path: Path, entries: dict[str, Any], run: Any = RUN) -> Path:
    save(path, {**entries, "optimizer.state.exp_avg." + next(iter(entries)): torch.zeros(3), "iteration": 10}, files=2)
    torch.save({"step": torch.tensor(10, dtype=torch.int32)}, path / "train_state.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    if run is not None:
        (path / "run_config.yaml").write_text(yaml.safe_dump(run))
    return path


def plain() -> Adapter:
    """The same adapter out of one file of tensors, which the tests of NeMo's names judge."""
    from bundles import bundle, tensors

    from loraformat.formats import nemo
    from loraformat.formats.kit.base import Hints
    from loraformat.model.bundle import Bundle, TensorFile

    weights = tensors(factors(), "torch")
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "head_dim": 6}
    files = {**bundle({}).files, "adapter.pt": TensorFile("adapter.pt", 0, lambda: weights)}
    return nemo.read(Bundle("memory", files), hints=Hints(alpha=8, rank=2, config=config))


def assert_equal(found: Adapter, wanted: Adapter) -> None:
    assert list(found.updates) == list(wanted.updates)
    assert len(wanted.updates) == 7 * LAYERS
    for weight, chain in wanted.updates.items():
        torch.testing.assert_close(dense(found.updates[weight][0]), dense(chain[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["by layer", "stacked", "by layer in shards", "stacked in shards"])
def test_a_checkpoint_of_megatron_bridge_is_read(form: str, tmp_path: Path) -> None:
    entries: dict[str, Any] = stacked(factors()) if "stacked" in form else factors()
    adapter = load_adapter(str(folder(tmp_path, in_shards(entries) if "shards" in form else entries)))
    assert_equal(adapter, plain())
    assert adapter.config.base_model == "meta-llama/Llama-3.2-1B"
    assert not adapter.unclaimed
    assert [note.code for note in adapter.notes] == ["LF222", "LF222"]
    said = " ".join(note.message for note in adapter.notes)
    assert "iteration" in said
    assert "optimizer.state" in said
    assert "train_state.pt" in said


def test_the_folder_above_leads_to_its_only_iteration(tmp_path: Path) -> None:
    folder(tmp_path / "iter_0000010", stacked(factors()))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert len(load_adapter(str(tmp_path)).updates) == 7 * LAYERS
    found = validate(str(tmp_path))
    assert not [each for each in found.findings if each.code in ("LF010", "LF011")]


def test_it_converts_and_comes_back(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", in_shards(stacked(factors())))
    convert(str(source), str(tmp_path / "out"), to="peft", check_roundtrip=True)
    assert_equal(load_adapter(str(tmp_path / "out")), plain())


def test_a_checkpoint_of_nemo_2_takes_alpha_and_heads_from_the_caller(tmp_path: Path) -> None:
    """Its weights folder has no settings; those are in `context`, as objects that only NeMo can load."""
    from loraformat.containers import open_bundle
    from loraformat.formats.kit.base import Hints
    from loraformat.formats.nemo import read

    entries = {f"module.{name}": value for name, value in stacked(factors()).items()}
    path = folder(tmp_path, entries, run=None)
    (path / "adapter_metadata.json").write_text('{"model_ckpt_path": "/models/llama"}')
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "head_dim": 6}
    adapter = read(open_bundle(str(path)), hints=Hints(alpha=8, config=config))
    assert_equal(adapter, plain())
    assert adapter.config.base_model == "/models/llama"
    with pytest.raises(UnsupportedUpdate, match="base's config"):
        load_adapter(str(path))


def test_what_its_names_do_not_say_is_refused(tmp_path: Path) -> None:
    ungated = {**RUN, "model": {**RUN["model"], "gated_linear_unit": False}}
    with pytest.raises(UnsupportedUpdate, match="without a gate"):
        load_adapter(str(folder(tmp_path / "a", factors(), ungated)))
    magnitude = {"decoder.layers.self_attention.linear_proj.adapter.weight_magnitude": values(LAYERS, 16)}
    with pytest.raises(UnsupportedUpdate, match="DoRA of Megatron Bridge"):
        load_adapter(str(folder(tmp_path / "b", {**stacked(factors()), **magnitude})))
    experts = {
        f"decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_{side}.weight": values(4, 2, 2)
        for side in ("in", "out")
    }
    with pytest.raises(UnsupportedUpdate, match="is unknown"):
        load_adapter(str(folder(tmp_path / "c", {**factors(), **experts})))
