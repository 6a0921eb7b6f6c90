"""An adapter is bound to its base, and another base is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraformat
from loraformat.cli import main
from loraformat.errors import AdapterRefused, StorageError, UnsupportedUpdate, UsageError

ROOT = Path(__file__).parents[2]
PEFT = ROOT / "fixtures" / "good" / "peft" / "tiny-llama"
KEY = "loraformat.base_fingerprint"


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = {"model.embed_tokens.weight": (20, 8), "lm_head.weight": (20, 8), "model.norm.weight": (8,)}
    for layer in range(40):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.q_proj.weight": (8, 8), f"{path}.self_attn.v_proj.weight": (4, 8)}
        shapes |= {f"{path}.mlp.up_proj.weight": (12, 8), f"{path}.mlp.down_proj.weight": (8, 12)}
    return {name: torch.randn(*shape, generator=g).bfloat16().to(dtype) for name, shape in shapes.items()}


def base(folder: Path, tensors: dict[str, Tensor], **config: object) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False, **config}))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def stamped(tmp_path: Path) -> str:
    loraformat.stamp(PEFT, base(tmp_path / "base", weights()), tmp_path / "adapter", base_model="a/b@main")
    return str(tmp_path / "adapter")


def codes(adapter: str, model: str) -> dict[str, str]:
    found = loraformat.validate(adapter, base=model).findings
    return {each.code: each.message for each in found if each.code in ("LF320", "LF321")}


def test_only_the_metadata_of_the_copy_changes(stamped: str) -> None:
    copy = Path(stamped)
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in PEFT.iterdir())
    for path in copy.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (PEFT / path.name).read_bytes()
    with safe_open(copy / "adapter_model.safetensors", "pt") as file:
        found = file.metadata()
        assert found["loraformat.base_model"] == "a/b"
        assert found["loraformat.base_revision"] == "main"
        assert found[KEY].startswith("lf1:dense:")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (PEFT, copy))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = loraformat.load_adapter(stamped).config
    assert (config.base_revision, config.base_fingerprint) == ("main", found[KEY])


def test_the_same_base_stored_otherwise_is_the_same(tmp_path: Path, stamped: str) -> None:
    tensors = weights()
    assert codes(stamped, str(tmp_path / "base")) == {}
    assert codes(stamped, base(tmp_path / "wide", weights(torch.float32))) == {}
    shards = tmp_path / "shards"
    shards.mkdir()
    names = sorted(tensors, reverse=True)
    parts = {f"model-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    for name, own in parts.items():
        save_file({each: tensors[each] for each in own}, shards / name)
    index = {"metadata": {}, "weight_map": {each: name for name, own in parts.items() for each in own}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert codes(stamped, str(shards)) == {}
    torch.save(dict(reversed(tensors.items())), tmp_path / "model.pt")
    assert codes(stamped, str(tmp_path / "model.pt")) == {}


def test_a_fine_tune_of_one_layer_is_another_base(tmp_path: Path, stamped: str) -> None:
    tensors = weights()
    tensors["model.layers.17.mlp.up_proj.weight"] = tensors["model.layers.17.mlp.up_proj.weight"] * 1.01
    model = base(tmp_path / "tuned", tensors)
    (message,) = codes(stamped, model).values()
    assert message.startswith("the adapter was trained on another base: 1 of 64 groups of weights differ, first ")
    assert "model.layers.17." in message
    with pytest.raises(AdapterRefused, match="another base"):
        loraformat.merge(model, [stamped], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loraformat.merge(model, [stamped], tmp_path / "out", force=True)


def test_few_weights_are_compared_one_by_one(tmp_path: Path) -> None:
    few = {
        name: value
        for name, value in weights().items()
        if name.startswith(("model.layers.0.", "model.layers.1.", "model.embed"))
    }
    loraformat.stamp(PEFT, base(tmp_path / "base", few), tmp_path / "adapter", force=True)
    few["model.layers.1.self_attn.q_proj.weight"] = few["model.layers.1.self_attn.q_proj.weight"] + 1
    (message,) = codes(str(tmp_path / "adapter"), base(tmp_path / "tuned", few)).values()
    assert message.endswith("1 of 9 weights differ, first model.layers.1.self_attn.q_proj.weight")


def test_other_names_and_other_forms_are_told_apart_from_another_base(tmp_path: Path, stamped: str) -> None:
    renamed = {f"language_model.{name}": value for name, value in weights().items()}
    (message,) = codes(stamped, base(tmp_path / "renamed", renamed)).values()
    assert message.endswith("with other tensor names")
    half = {name: value.half().float() for name, value in weights(torch.float32).items()}
    exact = loraformat.stamp(
        PEFT,
        base(tmp_path / "full", {n: v * 1.001 for n, v in weights(torch.float32).items()}),
        tmp_path / "full-adapter",
    )
    assert exact.ok
    for dtype in (torch.bfloat16, torch.float16):
        rounded = {name: (value * 1.001).to(dtype) for name, value in weights(torch.float32).items()}
        found = codes(str(tmp_path / "full-adapter"), base(tmp_path / f"rounded-{dtype}", rounded))
        assert list(found) == ["LF321"]
        assert "rounded to another dtype" in found["LF321"]
        tuned = {**rounded, "model.norm.weight": rounded["model.norm.weight"] * 1.01}
        assert list(codes(str(tmp_path / "full-adapter"), base(tmp_path / f"tuned-{dtype}", tuned))) == ["LF320"]
    assert list(codes(stamped, base(tmp_path / "smaller", {**half, "model.norm.weight": torch.ones(9)}))) == ["LF320"]


def test_a_quantized_form_is_named(tmp_path: Path, stamped: str) -> None:
    tensors = weights()
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[f"{name}_scale_inv"] = torch.tensor(0.01)
        tensors[name] = (tensors[name].float() / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
    settings = {"quant_method": "fp8", "weight_block_size": None}
    found = codes(stamped, base(tmp_path / "fp8", tensors, quantization_config=settings))
    assert list(found) == ["LF321"]
    assert "with dense weights; here it has weights quantized by" in found["LF321"]


def test_a_tied_head_counts_once_whether_it_is_stored_or_not(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["lm_head.weight"]
    tied = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    loraformat.stamp(PEFT, base(tmp_path / "base", tensors, **tied), tmp_path / "adapter", force=True)
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert codes(str(tmp_path / "adapter"), base(tmp_path / "both", both, **tied)) == {}


def test_in_place_replaces_the_weight_file_and_nothing_else(tmp_path: Path) -> None:
    import shutil

    adapter, model = tmp_path / "adapter", base(tmp_path / "base", weights())
    shutil.copytree(PEFT, adapter)
    (adapter / "notes").mkdir()
    before = {path.name: path.stat().st_mtime_ns for path in adapter.iterdir()}
    report = loraformat.stamp(adapter, model, in_place=True)
    assert report.written == (str(adapter / "adapter_model.safetensors"),)
    changed = {path.name for path in adapter.iterdir() if before.get(path.name) != path.stat().st_mtime_ns}
    assert changed == {"adapter_model.safetensors"}
    assert codes(str(adapter), model) == {}
    again = (adapter / "adapter_model.safetensors").read_bytes()
    loraformat.stamp(adapter, model, in_place=True)
    assert (adapter / "adapter_model.safetensors").read_bytes() == again


def test_the_native_layout_has_it_in_its_config(tmp_path: Path) -> None:
    model = base(tmp_path / "base", weights())
    loraformat.stamp(
        ROOT / "fixtures" / "good" / "native" / "tiny-llama", model, tmp_path / "adapter", base_model="a/b"
    )
    config = json.loads((tmp_path / "adapter" / "lora_config.json").read_text())
    assert config["base_model"]["name"] == "a/b"
    assert config["base_model"]["fingerprint"].startswith("lf1:")
    assert codes(str(tmp_path / "adapter"), model) == {}


@pytest.mark.parametrize("to", ["native", "peft", "mlx"])
def test_a_conversion_keeps_the_binding(tmp_path: Path, stamped: str, to: str) -> None:
    source = stamped
    if to == "mlx":  # it has no place for the table
        loraformat.stamp(ROOT / "fixtures/good/mlx/tiny-llama", tmp_path / "base", tmp_path / "mlx-source")
        source = str(tmp_path / "mlx-source")
    report = loraformat.convert(source, tmp_path / "out", to=to)
    assert not [each for each in report.findings if "fingerprint" in each.message]
    wanted, found = (loraformat.load_adapter(path).config for path in (source, tmp_path / "out"))
    assert found.base_fingerprint == wanted.base_fingerprint
    assert found.base_fingerprint


def test_a_gguf_adapter_has_it_in_its_header(tmp_path: Path) -> None:
    source = ROOT / "fixtures" / "good" / "gguf" / "tiny-qwen3" / "adapter.gguf"
    model = base(tmp_path / "base", weights(), architectures=["Qwen3ForCausalLM"], num_hidden_layers=40)
    loraformat.stamp(source, model, tmp_path / "adapter", force=True)
    (written,) = (tmp_path / "adapter").iterdir()
    assert codes(str(written), model) == {}
    before, after = (loraformat.load_adapter(path, base=model) for path in (source, written))
    assert after.config.base_fingerprint is not None
    for name, (update,) in before.updates.items():
        assert (update.up.load() == after.updates[name][0].up.load()).all()


def test_a_format_without_a_place_says_so(tmp_path: Path) -> None:
    model = base(tmp_path / "base", weights())
    with pytest.raises(UnsupportedUpdate, match="cannot record its base"):
        loraformat.stamp(ROOT / "fixtures" / "good" / "peft" / "bin", model, tmp_path / "adapter")
    with pytest.raises(UnsupportedUpdate, match="version 0"):
        loraformat.stamp(ROOT / "fixtures/good/native/version-0", model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_where_to_write_is_asked_for(tmp_path: Path, stamped: str) -> None:
    with pytest.raises(UsageError, match="-o OUT or --in-place"):
        loraformat.stamp(stamped, tmp_path / "base")
    with pytest.raises(UsageError, match="-o OUT or --in-place"):
        loraformat.stamp(stamped, tmp_path / "base", tmp_path / "x", in_place=True)
    with pytest.raises(StorageError):
        loraformat.stamp(PEFT, tmp_path / "base", stamped)


def test_two_adapters_of_other_bases_differ_in_that(tmp_path: Path, stamped: str) -> None:
    tensors = {name: value + 1 for name, value in weights().items()}
    loraformat.stamp(PEFT, base(tmp_path / "other", tensors), tmp_path / "second")
    fields = [each.field for each in loraformat.diff(stamped, tmp_path / "second").data.fields]
    assert "base_fingerprint" in fields


def test_in_place_keeps_the_mode_of_the_file(tmp_path: Path) -> None:
    import shutil

    adapter, model = tmp_path / "adapter", base(tmp_path / "base", weights())
    shutil.copytree(PEFT, adapter)
    (adapter / "adapter_model.safetensors").chmod(0o600)
    loraformat.stamp(adapter, model, in_place=True)
    assert (adapter / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o600


def test_in_place_does_not_write_through_a_link(tmp_path: Path) -> None:
    import shutil

    adapter, model = tmp_path / "adapter", base(tmp_path / "base", weights())
    shutil.copytree(PEFT, adapter)
    (adapter / "adapter_model.safetensors").rename(tmp_path / "blob.safetensors")
    (adapter / "adapter_model.safetensors").symlink_to(tmp_path / "blob.safetensors")
    before = (tmp_path / "blob.safetensors").read_bytes()
    with pytest.raises(StorageError) as caught:
        loraformat.stamp(adapter, model, in_place=True)
    assert "-o OUT" in caught.value.hint
    assert (tmp_path / "blob.safetensors").read_bytes() == before


def test_a_stamp_of_another_base_is_replaced_with_a_warning(tmp_path: Path, stamped: str) -> None:
    other = base(tmp_path / "other", {name: value + 1 for name, value in weights().items()})
    report = loraformat.stamp(stamped, other, tmp_path / "again", base_model="c/d")
    assert [(each.code, each.severity.name) for each in report.findings if each.code == "LF320"] == [
        ("LF320", "WARNING")
    ]
    assert codes(str(tmp_path / "again"), other) == {}
    config = loraformat.load_adapter(tmp_path / "again").config
    assert (config.base_model, config.base_revision) == ("c/d", None)


def test_inspect_shows_what_the_stamp_says(tmp_path: Path) -> None:
    folder = str(tmp_path / "adapter")
    loraformat.stamp(PEFT, base(tmp_path / "base", weights()), folder, base_model="meta-llama/Llama-3.1-8B@abc123")
    result = CliRunner().invoke(main, ["inspect", folder])
    assert "base       meta-llama/Llama-3.1-8B, revision abc123" in result.output
    assert "stamp      lf1:dense:" in result.output
    summary = json.loads(CliRunner().invoke(main, ["inspect", folder, "--format", "json"]).output)["summary"]
    assert summary["base_revision"] == "abc123"
    assert summary["base_fingerprint"].startswith("lf1:dense:")
