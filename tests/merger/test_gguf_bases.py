"""Merges into GGUF files: against PEFT's own merge and the gguf package, in every type, with every option."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_models import FAMILIES, Family, adapter_of, as_gguf, model_of, saved, values_of, write_base
from torch import Tensor

import loraformat
from loraformat.containers import open_checkpoint
from loraformat.errors import ConfigError, FormatError, MergeError, UnsupportedUpdate, UsageError
from loraformat.io import hints_of, open_adapter
from loraformat.merger.inputs import open_inputs
from loraformat.merger.plan.data import MergePlan
from loraformat.merger.verify.reference.translation import check_translation
from loraformat.merger.write.file_tasks import FileTask, execute, tasks_of
from loraformat.model.assumptions import Assumptions
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

TOUCHED = ("attn_q", "attn_v")
# Half a unit in the last place of a float16, of a value.
HALF_UNIT = 2.0**-11


@dataclass(frozen=True)
class Made:
    """A model of transformers with an adapter, and what PEFT's merge of the two gives under llama.cpp's names."""

    family: Family
    folder: Path
    tensors: Mapping[str, Tensor]
    merged: Mapping[str, Tensor]
    config: Any

    def base(self, kind: Any, name: str) -> Path:
        return write_base(self.folder / f"{name}.gguf", self.family, self.tensors, kind, config=self.config)


def made(name: str, folder: Path, **fields: Any) -> Made:
    family = FAMILIES[name]
    model = model_of(family)
    tensors = saved(model, folder / "base")
    wrapped = adapter_of(model, family, folder / "adapter", **fields)
    merged = saved(wrapped.merge_and_unload(), folder / "merged")
    return Made(family, folder, tensors, dict(as_gguf(family, merged)), model.config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made("llama", tmp_path_factory.mktemp("llama"), target_modules=["q_proj", "v_proj"])


def types_of(path: Path) -> dict[str, str]:
    return {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}


def bytes_of(path: Path) -> dict[str, bytes]:
    return {one.name: one.data.tobytes() for one in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merge_is_peft_s_own_under_llama_cpp_s_names(name: str, tmp_path: Path) -> None:
    one = made(name, tmp_path)
    base = one.base("F32", "model")
    report = loraformat.merge(str(base), [str(tmp_path / "adapter")], str(tmp_path / "out"), verify="full")
    found = values_of(tmp_path / "out" / "model.gguf")
    assert found.keys() == one.merged.keys()
    for weight, wanted in one.merged.items():
        np.testing.assert_allclose(found[weight], wanted.numpy(), rtol=1e-6, atol=1e-6, err_msg=weight)
    assert report.data.checked.followed == report.data.tensors_touched


STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_experts_that_peft_trains_as_one_parameter_are_parted(name: str, tmp_path: Path) -> None:
    one = made(name, tmp_path, target_modules=["q_proj"], target_parameters=STACKED)
    base = one.base("F32", "model")
    loraformat.merge(str(base), [str(tmp_path / "adapter")], str(tmp_path / "out"), verify="full")
    found = values_of(tmp_path / "out" / "model.gguf")
    for weight, wanted in one.merged.items():
        np.testing.assert_allclose(found[weight], wanted.numpy(), rtol=1e-6, atol=1e-6, err_msg=weight)
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "gguf"), to="gguf", base=str(tmp_path / "base"))
    loraformat.merge(str(base), [str(tmp_path / "gguf")], str(tmp_path / "again"), verify="full")
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (tmp_path / "out" / "model.gguf").read_bytes()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_an_adapter_in_gguf_gives_the_bytes_of_the_one_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    one = made(name, tmp_path)
    base = one.base("F16", "model")
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "gguf"), to="gguf", base=str(tmp_path / "base"))
    loraformat.convert(str(tmp_path / "adapter"), str(tmp_path / "by-base"), to="gguf", base=str(base))
    for number, adapter in enumerate(("adapter", "gguf", "by-base")):
        loraformat.merge(str(base), [str(tmp_path / adapter)], str(tmp_path / f"out{number}"), verify="full")
    results = {(tmp_path / f"out{number}" / "model.gguf").read_bytes() for number in range(3)}
    assert len(results) == 1


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_the_header_and_all_untouched_bytes_of_a_dense_base_stay(kind: str, llama: Made, tmp_path: Path) -> None:
    base = llama.base(kind, f"dense-{kind}")
    loraformat.merge(str(base), [str(llama.folder / "adapter")], str(tmp_path / "out"), verify="full")
    out = tmp_path / "out" / base.name
    start = min(int(one.data_offset) for one in gguf.GGUFReader(base).tensors)
    before, after = base.read_bytes(), out.read_bytes()
    assert (len(before), before[:start]) == (len(after), after[:start])
    old, new, values = bytes_of(base), bytes_of(out), values_of(base)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {f"blk.{layer}.{leaf}.weight" for layer in range(2) for leaf in TOUCHED}
    delta = {
        name: llama.merged[name].numpy() - dict(as_gguf(llama.family, llama.tensors))[name].numpy() for name in changed
    }
    unit = HALF_UNIT if kind == "F16" else 2.0**-8
    for name in changed:
        wanted = values[name].astype(np.float64) + delta[name]
        assert np.all(np.abs(values_of(out)[name] - wanted) <= unit * np.abs(wanted) + 1e-6), name


KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_stay_where_nothing_changes_and_all_else_is_what_they_mean(
    kind: str, llama: Made, tmp_path: Path
) -> None:
    base, adapter = llama.base(kind, kind), str(llama.folder / "adapter")
    with pytest.raises(UnsupportedUpdate, match="the base is quantized \\(GGUF\\)"):
        loraformat.merge(str(base), [adapter], str(tmp_path / "plain"))
    loraformat.merge(str(base), [adapter], str(tmp_path / "mixed"), keep_quantized=True, verify="full")
    loraformat.merge(str(base), [adapter], str(tmp_path / "dense"), dequantize=True, dtype="float32", verify="full")
    loraformat.dequantize(str(base), str(tmp_path / "alone"), dtype="float32", verify="full")
    values, mixed = values_of(base), tmp_path / "mixed" / base.name
    touched = {f"blk.{layer}.{leaf}.weight" for layer in range(2) for leaf in TOUCHED}
    old, new = types_of(base), types_of(mixed)
    assert new == {name: "F16" if name in touched else old[name] for name in old}
    assert list(new) == list(old)
    assert {name: data for name, data in bytes_of(mixed).items() if name not in touched} == {
        name: data for name, data in bytes_of(base).items() if name not in touched
    }
    alone, dense = values_of(tmp_path / "alone" / base.name), values_of(tmp_path / "dense" / base.name)
    assert all(np.array_equal(alone[name], values[name]) for name in values)
    assert all(np.array_equal(dense[name], values[name]) for name in values if name not in touched)
    rounded = {name: dense[name].astype(np.float16) for name in touched}
    assert all(np.allclose(values_of(mixed)[name], rounded[name], rtol=2 * HALF_UNIT, atol=1e-7) for name in touched)
    assert set(types_of(tmp_path / "dense" / base.name).values()) == {"F32"}


def test_settings_of_the_base_stay_and_the_file_type_follows(llama: Made, tmp_path: Path) -> None:
    base = llama.base("Q8_0", "settings")
    for dtype, wanted in (("bfloat16", 32), ("float16", 1), ("float32", 0)):
        out = tmp_path / dtype
        loraformat.dequantize(str(base), str(out), dtype=dtype)
        before, after = gguf.GGUFReader(base), gguf.GGUFReader(out / base.name)
        skipped = ("general.file_type", "GGUF.version")
        found = {key: one.contents() for key, one in after.fields.items() if key not in skipped}
        assert found == {key: one.contents() for key, one in before.fields.items() if key not in skipped}
        assert after.fields["general.file_type"].contents() == wanted
        vectors = {one.tensor_type.name for one in after.tensors if len(one.shape) == 1}
        assert vectors == {"F32"}


def test_a_weight_in_a_type_that_is_not_read_is_copied_or_refused(llama: Made, tmp_path: Path) -> None:
    adapter = str(llama.folder / "adapter")
    base = llama.base(lambda name: "IQ1_S" if "ffn" in name else "F16", "untouched")
    loraformat.merge(str(base), [adapter], str(tmp_path / "out"), keep_quantized=True, verify="full")
    assert types_of(tmp_path / "out" / base.name) == types_of(base)
    base = llama.base(lambda name: "IQ1_S" if "attn_q" in name else "F16", "touched")
    for options in ({"keep_quantized": True}, {"dequantize": True}):
        with pytest.raises(UnsupportedUpdate, match="IQ1_S, which is not supported"):
            loraformat.merge(str(base), [adapter], str(tmp_path / "not"), **options)
        assert not (tmp_path / "not").exists()


def test_a_plan_runs_from_itself_with_the_same_bytes_for_any_threads(llama: Made, tmp_path: Path) -> None:
    base, adapter = llama.base("Q8_0", "planned"), str(llama.folder / "adapter")
    report = loraformat.merge(str(base), [adapter], str(tmp_path / "plan"), keep_quantized=True, dry_run=True)
    plan = MergePlan.from_json(report.data.plan)
    (task,) = tasks_of(plan, str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    execute(FileTask.from_json(task.to_json()))
    for jobs, memory in ((1, 1 << 16), (3, 1 << 26)):
        out = tmp_path / f"out{jobs}"
        loraformat.merge(str(base), [adapter], str(out), keep_quantized=True, jobs=jobs, memory_nbytes=memory)
        assert (out / base.name).read_bytes() == (tmp_path / "out" / base.name).read_bytes()
    assert loraformat.verify(str(out), base=str(base)).findings == ()
    assert open_inputs(plan).base.uri == str(base)


def test_a_file_that_is_done_is_taken_over(llama: Made, tmp_path: Path) -> None:
    base, adapter = llama.base("F16", "resumed"), str(llama.folder / "adapter")
    loraformat.merge(str(base), [adapter], str(tmp_path / "out"))
    wanted = (tmp_path / "out" / base.name).read_bytes()

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loraformat.merge(str(base), [adapter], str(tmp_path / "again"), resume=True, progress=stop)
    loraformat.merge(str(base), [adapter], str(tmp_path / "again"), resume=True)
    assert (tmp_path / "again" / base.name).read_bytes() == wanted


def test_what_does_not_lead_into_gguf_or_out_of_it_is_refused(llama: Made, tmp_path: Path) -> None:
    base, adapter = llama.base("F16", "refused"), str(llama.folder / "adapter")
    with pytest.raises(UsageError, match="cannot be written as safetensors"):
        loraformat.merge(str(base), [adapter], str(tmp_path / "out"), container="safetensors")
    with pytest.raises(UsageError, match="cannot be written as gguf"):
        loraformat.merge(str(llama.folder / "base"), [adapter], str(tmp_path / "out"), container="gguf")
    with pytest.raises(UsageError, match="cannot be split"):
        loraformat.merge(str(base), [adapter], str(tmp_path / "out"), max_shard_nbytes=1 << 20)
    loraformat.convert(adapter, str(tmp_path / "gguf"), to="gguf", base=str(base))
    with pytest.raises(FormatError, match="an adapter, not a base"):
        loraformat.merge(str(tmp_path / "gguf" / "adapter.gguf"), [adapter], str(tmp_path / "out"))
    data = base.read_bytes()
    key, value = b"\x0c\0\0\0\0\0\0\0split.countx", b"\x04\0\0\0\x03\0\0\0"
    split = data[:16] + (int.from_bytes(data[16:24], "little") + 1).to_bytes(8, "little")
    split += (11).to_bytes(8, "little") + b"split.count" + value + data[24:]
    assert key
    (tmp_path / "part.gguf").write_bytes(split)
    with pytest.raises((FormatError, loraformat.ContainerError)):
        open_checkpoint(str(tmp_path / "part.gguf"))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_one_gguf_file_is_that_base(llama: Made, tmp_path: Path) -> None:
    base = llama.base("F16", "alone")
    (tmp_path / "folder").mkdir()
    shutil.copy(base, tmp_path / "folder" / "model.gguf")
    (tmp_path / "folder" / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true}'
    )
    loraformat.merge(str(tmp_path / "folder"), [str(llama.folder / "adapter")], str(tmp_path / "out"), verify="full")
    assert (tmp_path / "out" / "config.json").exists()
    assert types_of(tmp_path / "out" / "model.gguf") == types_of(base)


def test_an_embedding_that_is_the_head_too_is_not_changed(tmp_path: Path) -> None:
    one = made("gemma3", tmp_path, target_modules=["v_proj", "embed_tokens"])
    base = one.base("F16", "tied")
    assert "output.weight" not in types_of(base)
    with pytest.raises(MergeError, match="also uses the table as output head"):
        loraformat.merge(str(base), [str(tmp_path / "adapter")], str(tmp_path / "out"))


def test_an_adapter_for_another_model_names_what_it_does_not_find(llama: Made, tmp_path: Path) -> None:
    family = FAMILIES["phi3"]
    adapter_of(model_of(family), family, tmp_path / "adapter", target_modules=["qkv_proj"])
    with pytest.raises(loraformat.LoraFormatError, match="qkv_proj"):
        loraformat.merge(str(llama.base("F16", "other")), [str(tmp_path / "adapter")], str(tmp_path / "out"))


@pytest.mark.parametrize("fault", ["rows once more", "rows not at all", "another scale", "another down"])
def test_the_reference_sees_rows_in_a_wrong_order(fault: str, llama: Made) -> None:
    base = open_checkpoint(str(llama.base("F16", "checked")))
    adapter = open_adapter(str(llama.folder / "adapter"), hints=hints_of(Assumptions(), base)).adapter
    check_translation(adapter, base.settings)
    name = "blk.1.attn_q.weight"
    (update,) = adapter.updates[name]
    assert isinstance(update, LowRank)
    assert adapter.origin is not None
    (before,) = adapter.origin.updates["model.layers.1.self_attn.q_proj.weight"]
    assert isinstance(before, LowRank)
    assert update.scale is not None
    up = update.up.load()
    turned = up.reshape(8, 2, -1, up.shape[1]).swapaxes(1, 2).reshape(up.shape)
    wrong = {
        "rows once more": replace(update, up=LazyTensor.of(turned)),
        "rows not at all": replace(update, up=before.up),
        "another scale": replace(update, scale=update.scale * 1.5),
        "another down": replace(update, down=LazyTensor.of(update.down.load()[::-1].copy())),
    }[fault]
    with pytest.raises(MergeError, match="q_proj"):
        check_translation(replace(adapter, updates={**adapter.updates, name: (wrong,)}), base.settings)


def test_names_of_llama_cpp_never_get_into_another_format(llama: Made, tmp_path: Path) -> None:
    base, adapter = llama.base("F16", "names"), str(llama.folder / "adapter")
    loraformat.convert(adapter, str(tmp_path / "native"), to="native", base=str(base), check_roundtrip=True)
    wanted = loraformat.load_adapter(adapter)
    assert loraformat.load_adapter(str(tmp_path / "native")).updates.keys() == wanted.updates.keys()
    loraformat.convert(adapter, str(tmp_path / "gguf"), to="gguf", base=str(base), check_roundtrip=True)
    for fields, message in (({"base": str(base)}, "the base is a GGUF file"), ({}, "no base is given")):
        with pytest.raises(ConfigError, match=message):
            loraformat.convert(str(tmp_path / "gguf"), str(tmp_path / "out"), to="peft", **fields)
    folder = str(llama.folder / "base")
    loraformat.convert(str(tmp_path / "gguf"), str(tmp_path / "peft"), to="peft", base=folder, check_roundtrip=True)
    found = loraformat.load_adapter(str(tmp_path / "peft"))
    assert all(np.array_equal(found.delta(name), wanted.delta(name)) for name in wanted.updates)


def test_an_adapter_alone_is_shown_and_judged_under_its_own_names(llama: Made, tmp_path: Path) -> None:
    adapter = str(llama.folder / "adapter")
    loraformat.convert(adapter, str(tmp_path / "gguf"), to="gguf", base=str(llama.folder / "base"))
    report = loraformat.validate(str(tmp_path / "gguf"), deep=True)
    assert not [one for one in report.findings if one.severity.name == "ERROR"]
    assert not [one for one in report.findings if one.code == "LF031"]
    shown = loraformat.inspect(str(tmp_path / "gguf" / "adapter.gguf"))
    assert {weight.weight for weight in shown.data.weights} >= {"blk.0.attn_q.weight", "blk.1.attn_v.weight"}


def test_every_verb_reads_a_gguf_base(llama: Made, tmp_path: Path) -> None:
    base, adapter = llama.base("Q8_0", "verbs"), str(llama.folder / "adapter")
    report = loraformat.validate(adapter, base=str(base), deep=True)
    assert not [one for one in report.findings if one.severity.name == "ERROR"]
    assert any(one.code == "LF311" and "GGUF" in one.message for one in report.findings)
    shown = loraformat.inspect(adapter, base=str(base))
    assert {weight.weight for weight in shown.data.weights} == {
        f"blk.{layer}.{leaf}.weight" for layer in range(2) for leaf in TOUCHED
    }
    loraformat.merge(str(base), [adapter], str(tmp_path / "out"), keep_quantized=True)
    report = loraformat.diff(str(base), str(tmp_path / "out" / base.name))
    assert report.job == "diff"
