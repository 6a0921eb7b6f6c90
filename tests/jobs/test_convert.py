"""convert on files: damaged PEFT folders become clean ones, options do what they say, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import dense
from safetensors.torch import load_file, save_file
from strategies import values
from torch import Tensor

from loraformat.errors import AdapterRefused, NonFiniteValue, RoundTripFailed, StorageError, UsageError
from loraformat.formats import peft
from loraformat.io import load_adapter
from loraformat.jobs.convert import convert
from loraformat.model.bundle import Bundle
from loraformat.model.updates import LowRank, Replace

PREFIX = "base_model.model."
SHAPES = {"self_attn.q_proj": (12, 8), "self_attn.k_proj": (6, 8), "mlp.up_proj": (20, 8), "mlp.down_proj": (8, 20)}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 16,
    "target_modules": [name.split(".")[1] for name in SHAPES],
    "base_model_name_or_path": "example/tiny",
    "task_type": "CAUSAL_LM",
}


def factors() -> dict[str, Tensor]:
    found = {}
    for module, (rows, cols) in SHAPES.items():
        found[f"{PREFIX}model.layers.0.{module}.lora_A.weight"] = values(2, cols, seed=rows)
        found[f"{PREFIX}model.layers.0.{module}.lora_B.weight"] = values(rows, 2, seed=cols)
    return found


def saved(folder: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors saves private files, from which private ones are made, with a finding
    return str(folder)


def base(folder: Path, prefix: str = "model.", **more: Tensor) -> str:
    folder.mkdir()
    tensors = {f"{prefix}layers.0.{module}.weight": values(*shape, seed=7) for module, shape in SHAPES.items()}
    tensors[f"{prefix}embed_tokens.weight"] = values(9, 8, seed=8).to(torch.bfloat16)
    save_file({**tensors, **more}, folder / "model.safetensors")
    return str(folder)


def codes(report: Any) -> list[str]:
    return [found.code for found in report.findings]


Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def renaming(change: Callable[[str], str]) -> Damage:
    return lambda tensors: {change(name): value for name, value in tensors.items()}


DAMAGES: dict[str, tuple[Damage, str]] = {
    "adapter-name": (renaming(lambda name: name.replace(".weight", ".default.weight")), "LF901"),
    "compiled": (renaming(lambda name: f"_orig_mod.{name}"), "LF901"),
    "compiled-inside": (renaming(lambda name: name.replace("layers.0.", "layers.0._orig_mod.")), "LF901"),
    "data-parallel": (renaming(lambda name: f"module.{name}"), "LF901"),
    "fsdp": (renaming(lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")), "LF901"),
    "checkpointed": (renaming(lambda name: name.replace("mlp.", "mlp._checkpoint_wrapped_module.")), "LF901"),
    "doubled": (renaming(lambda name: PREFIX + name), "LF901"),
    "bare": (renaming(lambda name: name.removeprefix(PREFIX)), "LF901"),
    "transposed": (lambda tensors: {name: value.T for name, value in tensors.items()}, "LF902"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_becomes_a_clean_one(damage: str, tmp_path: Path) -> None:
    change, code = DAMAGES[damage]
    report = convert(saved(tmp_path / "in", change(factors())), str(tmp_path / "out"), to="peft", check_roundtrip=True)
    assert codes(report) == [code]
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == factors().keys()
    assert all(torch.equal(written[name], value) for name, value in factors().items())
    again = convert(str(tmp_path / "out"), str(tmp_path / "again"), to="peft")
    assert codes(again) == []
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if name not in key}


REFUSALS: dict[str, tuple[Damage, dict[str, Any], str]] = {
    "half": (lambda t: without(t, "q_proj.lora_B"), {}, "LF201"),
    "empty": (lambda t: {n: v[:0] if "q_proj" in n else v for n, v in t.items()}, {}, "LF205"),
    "rank": (lambda t: t, {"r": 4}, "LF204"),
    "no-alpha": (lambda t: t, {"lora_alpha": None}, "LF206"),
    "exchanged": (
        lambda t: {
            name: t[name.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x", "lora_B")] for name in t
        },
        {},
        "LF2",
    ),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_what_cannot_be_mended_is_refused_with_the_reason(fault: str, tmp_path: Path) -> None:
    change, config, code = REFUSALS[fault]
    with pytest.raises(AdapterRefused) as refused:
        convert(saved(tmp_path / "in", change(factors()), **config), str(tmp_path / "out"), to="peft")
    assert any(found.code.startswith(code) for found in refused.value.findings)
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_while_it_streams(tmp_path: Path) -> None:
    tensors = factors()
    next(iter(tensors.values()))[0, 0] = float("nan")
    with pytest.raises(NonFiniteValue):
        convert(saved(tmp_path / "in", tensors), str(tmp_path / "out"), to="peft")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_exchanged_factors_are_not_taken_for_transposed_ones(tmp_path: Path) -> None:
    """A (out, rank), B (rank, in): the base's shapes, or layers with one input, tell the two apart."""
    exchanged = REFUSALS["exchanged"][0](factors())
    source = saved(tmp_path / "in", exchanged)
    for given in (None, base(tmp_path / "base")):
        with pytest.raises(AdapterRefused):
            convert(source, str(tmp_path / "out"), to="peft", base=given)


def test_a_transposed_file_that_nothing_decides_is_refused(tmp_path: Path) -> None:
    square = {
        name: values(8, 2, seed=3) if "lora_A" in name else values(2, 8) for name in factors() if "q_proj" in name
    }
    with pytest.raises(AdapterRefused):
        convert(saved(tmp_path / "in", square, target_modules=["q_proj"]), str(tmp_path / "out"), to="peft")


def test_a_float_alpha_becomes_an_integer(tmp_path: Path) -> None:
    report = convert(saved(tmp_path / "in", factors(), lora_alpha=16.0, r=2.0), str(tmp_path / "out"), to="peft")
    assert codes(report) == ["LF904", "LF904"]
    text = (tmp_path / "out" / "adapter_config.json").read_text()
    assert '"lora_alpha": 16,' in text
    assert '"r": 2,' in text


def test_copies_of_the_base_are_left_out_and_trained_tables_kept(tmp_path: Path) -> None:
    table = f"{PREFIX}model.embed_tokens.base_layer.weight"
    embedding = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": values(2, 9),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": values(8, 2),
    }
    where = base(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    targets = {"target_modules": [*CONFIG["target_modules"], "embed_tokens"]}
    for name, value, kept in (("same", stored.float(), False), ("other", stored.float() + 1, True)):
        source = saved(tmp_path / name, {**factors(), **embedding, table: value}, **targets)
        report = convert(source, str(tmp_path / f"{name}-out"), to="peft", base=where)
        assert ("LF903" in codes(report)) is not kept
        chain = load_adapter(str(tmp_path / f"{name}-out")).updates["model.embed_tokens.weight"]
        assert [type(update) for update in chain] == ([Replace, LowRank] if kept else [LowRank])


def test_modules_are_called_as_the_base_has_them(tmp_path: Path) -> None:
    where = base(tmp_path / "base", prefix="language_model.model.")
    report = convert(saved(tmp_path / "in", factors()), str(tmp_path / "out"), to="peft", base=where)
    assert "LF905" in codes(report)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = {name.replace("model.layers", "language_model.model.layers") for name in without(factors(), "nothing")}
    assert written.keys() == {name.replace("base_model.model.language", "base_model.model.language") for name in moved}


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = convert(saved(tmp_path / "in", factors()), str(tmp_path / "out"), to="mlx", dry_run=True)
    assert report.data.is_dry_run
    assert report.data.files == ("adapter_config.json", "adapters.safetensors")
    assert (report.written, report.data.bytes_written) == ((), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_strict_refuses_what_a_dry_run_tells(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", factors(), alpha_pattern={"q_proj": 5})
    assert "LF701" in codes(convert(source, str(tmp_path / "out"), to="mlx", dry_run=True))
    with pytest.raises(AdapterRefused):
        convert(source, str(tmp_path / "out"), to="mlx", strict=True)


def test_what_the_base_says_of_its_ties_is_no_loss(tmp_path: Path) -> None:
    """The adapter does not say it, so a format without a place for it loses nothing; the native layout takes it."""
    source = saved(tmp_path / "in", factors())
    (tmp_path / "base").mkdir()
    table = {f"model.layers.0.{module}.weight": values(*shape) for module, shape in SHAPES.items()}
    save_file({**table, "model.embed_tokens.weight": values(30, 8)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    base = str(tmp_path / "base")
    report = convert(source, str(tmp_path / "out"), to="peft", base=base, strict=True)
    assert not [each for each in report.findings if each.code.startswith("LF7")]
    convert(source, str(tmp_path / "native"), to="native", base=base)
    assert "tied" in json.loads((tmp_path / "native" / "lora_config.json").read_text())


@pytest.mark.parametrize("to", ["native", "peft", "mlx", "loralib"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("plain", [False, True])
def test_every_output_reads_back_within_its_bound(to: str, dtype: str | None, *, plain: bool, tmp_path: Path) -> None:
    source = saved(tmp_path / "in", factors(), use_rslora=True, alpha_pattern={"q_proj": 5}, rank_pattern={"k_proj": 2})
    report = convert(source, str(tmp_path / "out"), to=to, dtype=dtype, plain=plain, check_roundtrip=True)
    found = report.data.roundtrip
    assert (found.weights, found.worst <= 1) == (4, True)
    is_rounded = dtype in ("bfloat16", "float16") or plain or to in ("mlx", "loralib")
    assert (found.exact == 4) is not is_rounded
    dtypes = {str(update[0].up.dtype.torch_name) for update in load_adapter(str(tmp_path / "out")).updates.values()}
    assert dtypes == {dtype or "float32"}


def test_plain_leaves_one_rank_and_one_alpha(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", factors(), use_rslora=True, alpha_pattern={"q_proj": 5})
    convert(source, str(tmp_path / "out"), to="peft", plain=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["alpha_pattern"], config["rank_pattern"]) == (False, {}, {})
    wanted = load_adapter(source).updates
    for name, (update,) in load_adapter(str(tmp_path / "out")).updates.items():
        torch.testing.assert_close(dense(update), dense(wanted[name][0]), rtol=1e-6, atol=1e-5)
        assert update.scale == config["lora_alpha"] / config["r"]


def test_an_output_that_does_not_come_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer with a bug: it is found before the output gets its name."""
    honest = peft.write

    def wrong(adapter: Any, options: Any) -> Bundle:
        _, *others = adapter.updates
        return honest(type(adapter)(config=adapter.config, updates={n: adapter.updates[n] for n in others}), options)

    monkeypatch.setattr(peft, "write", wrong)
    with pytest.raises(RoundTripFailed, match="1 weight is changed"):
        convert(saved(tmp_path / "in", factors()), str(tmp_path / "out"), to="peft", check_roundtrip=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "mlx", "container": "torch"}, "only the container safetensors"),
        ({"to": "mlx", "peft_version": "0.10"}, "needs --to peft"),
        ({"to": "peft", "peft_version": "0.4"}, "0.5 or later"),
        ({"to": "peft", "peft_version": "new"}, "such as 0.10"),
        ({"to": "peft", "dtype": "int4"}, "float32, float16, bfloat16"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        convert(saved(tmp_path / "in", factors()), str(tmp_path / "out"), **options)


def test_an_old_peft_gets_only_fields_that_it_knows(tmp_path: Path) -> None:
    newer = {"eva_config": {"rho": 2}, "lora_bias": False, "exclude_modules": None, "megatron_core": "megatron.core"}
    source = saved(tmp_path / "in", factors(), use_rslora=True, **newer)
    report = convert(source, str(tmp_path / "out"), to="peft", peft_version="0.5.0")
    assert [(found.code, "eva_config" in found.message) for found in report.findings] == [("LF708", True)]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not {"use_rslora", "alpha_pattern", "rank_pattern", "megatron_core", *newer} & config.keys()
    assert config["lora_alpha"] / config["r"] == pytest.approx(16 / 2**0.5, rel=1e-15)


@pytest.mark.parametrize("name", ["notes.gguf", "notes.txt", "NOTES.GGUF"])
def test_a_link_that_leaves_the_adapter_is_never_copied(tmp_path: Path, name: str) -> None:
    """Whatever its suffix: its author must not choose which of the reader's files are published."""
    (tmp_path / "secret").write_bytes(b"TOP SECRET")
    source = saved(tmp_path / "in", factors())
    (tmp_path / "in" / name).symlink_to(tmp_path / "secret")
    with contextlib.suppress(StorageError):
        convert(source, str(tmp_path / "out"), to="peft")
    assert all(b"SECRET" not in path.read_bytes() for path in tmp_path.glob("out/*"))


@pytest.mark.parametrize("name", ["loraformat.manifest.json", "loraformat.digests.json"])
def test_what_a_merge_wrote_about_its_output_is_not_carried(tmp_path: Path, name: str) -> None:
    source = saved(tmp_path / "in", factors())
    (tmp_path / "in" / name).write_text("{}")
    convert(source, str(tmp_path / "out"), to="peft")
    assert not (tmp_path / "out" / name).exists()
