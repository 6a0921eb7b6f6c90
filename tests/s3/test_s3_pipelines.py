"""A pipeline of diffusers in a bucket: components in subfolders, all of it copied in the store but what changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from s3_models import save
from s3_server import S3Server

import loraformat
from loraformat.errors import StorageError
from loraformat.jobs.verify import verify


@pytest.fixture
def pipeline(tmp_path: Path, empty: S3Server) -> Path:
    """Stable Diffusion as far as one layer of its U-Net and one of its text encoder."""
    import numpy as np

    rng = np.random.default_rng(0)
    names = {
        "unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
    }
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", **{name: ["diffusers", "Model"] for name in names}}
    (base / "model_index.json").write_text(json.dumps(index))
    for component, weight in names.items():
        (base / component).mkdir()
        (base / component / "config.json").write_text("{}")
        values = ("F32", rng.standard_normal((320, 320)).astype(np.float32))
        save(base / component / "diffusion_pytorch_model.safetensors", {weight: values})
    key = f"unet.{names['unet'].removesuffix('.weight')}"
    factors = {f"{key}.lora_A.weight": (4, 320), f"{key}.lora_B.weight": (320, 4)}
    values = {name: ("F32", rng.standard_normal(shape).astype(np.float32)) for name, shape in factors.items()}
    save(adapter / "pytorch_lora_weights.safetensors", values)
    for path in [path for path in tmp_path.rglob("*") if path.is_file() and "server" not in path.parts]:
        empty.put("models", path.relative_to(tmp_path).as_posix(), path.read_bytes())
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith("loraformat.digests.json")}


def test_a_pipeline_is_merged_in_a_bucket(pipeline: Path, empty: S3Server) -> None:
    loraformat.merge(pipeline / "base", [pipeline / "adapter"], pipeline / "out", alpha=4.0)
    loraformat.merge("s3://models/base", ["s3://models/adapter"], "s3://models/out", alpha=4.0)
    found = {key.removeprefix("out/"): empty.get("models", key) for key in empty.objects("models", "out/")}
    assert found == files(pipeline / "out")
    assert not empty.uploads("models")
    assert verify("s3://models/out", base="s3://models/base").ok


def test_it_is_replaced_whole_or_not_at_all(pipeline: Path, empty: S3Server) -> None:
    base, out = "s3://models/base", "s3://models/out"
    loraformat.merge(base, ["s3://models/adapter"], out, alpha=4.0)
    for dry_run in (True, False):
        with pytest.raises(StorageError, match="exists already"):
            loraformat.merge(base, ["s3://models/adapter=0.5"], out, alpha=4.0, dry_run=dry_run)
    loraformat.merge(pipeline / "base", [f"{pipeline}/adapter=0.5"], pipeline / "out", alpha=4.0)
    loraformat.merge(base, ["s3://models/adapter=0.5"], out, alpha=4.0, overwrite=True)
    found = {key.removeprefix("out/"): empty.get("models", key) for key in empty.objects("models", "out/")}
    assert found == files(pipeline / "out")
