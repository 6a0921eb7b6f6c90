"""GGUF adapters: names, order of rows, scales and settings; tests/llamacpp asks the engine itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import bundle, loaded, tensors
from oracle import dense
from strategies import lazy, values
from torch import Tensor

from loraformat import formats
from loraformat.containers import open_bundle
from loraformat.diagnostics import Severity
from loraformat.errors import ConfigError, FormatError, UnsupportedUpdate, UsageError
from loraformat.formats import gguf
from loraformat.formats.kit.base import Hints, WriteOptions
from loraformat.jobs.convert import convert
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.updates import LowRank, Magnitude, Replace
from loraformat.naming import known_classes, model_of_config, model_of_settings, source_row

Q = "model.layers.0.self_attn.q_proj.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 4}
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 3}
SETTINGS = {"general.architecture": "qwen3", "general.type": "adapter", "adapter.type": "lora"}


def file(entries: dict[str, Tensor], **settings: Any) -> Any:
    said = {key.replace("__", "."): value for key, value in settings.items()}
    return bundle({"adapter.gguf": tensors(entries, "gguf", **{**SETTINGS, **said})})


def written(adapter: Adapter, config: dict[str, Any], **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of what is written; nothing may be refused."""
    wanted = WriteOptions(base=Hints(config=config), **options)
    assert not [loss for loss in gguf.losses(adapter, wanted) if loss.severity is Severity.ERROR]
    opened = gguf.write(adapter, wanted).files["adapter.gguf"].open()  # type: ignore[union-attr]
    return {name: entry.torch() for name, entry in opened.entries.items()}, dict(opened.extras)


def adapter(updates: dict[str, LowRank], **raw: Any) -> Adapter:
    config = AdapterConfig(raw=raw, base_model="owner/base")
    return Adapter(config=config, updates={name: (update,) for name, update in sorted(updates.items())})


def in_halves(matrix: Tensor, heads: int) -> Tensor:
    rows = matrix.shape[0]
    return matrix.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(matrix.shape)


def test_rows_of_q_and_k_are_put_in_order_and_come_back() -> None:
    q, k = (LowRank(lazy(16, 2, seed=1), lazy(2, 8), 1.5), LowRank(lazy(8, 2, seed=2), lazy(2, 8), 1.5))
    names = {Q: q, Q.replace("q_proj", "k_proj"): k, Q.replace("q_proj", "v_proj"): k}
    found, _ = written(adapter(names), LLAMA)
    assert torch.equal(found["blk.0.attn_q.weight.lora_b"], in_halves(q.up.torch(), 4))
    assert torch.equal(found["blk.0.attn_k.weight.lora_b"], in_halves(k.up.torch(), 2))
    assert torch.equal(found["blk.0.attn_v.weight.lora_b"], k.up.torch())
    assert torch.equal(found["blk.0.attn_q.weight.lora_a"], q.down.torch())
    again = gguf.read(file(found, general__architecture="llama", adapter__lora__alpha=3.0), hints=Hints(config=LLAMA))
    assert again.updates.keys() == names.keys()
    for name, update in names.items():
        assert torch.equal(dense(again.updates[name][0]), dense(update))


def test_without_the_base_rows_that_stand_in_another_order_are_not_guessed() -> None:
    pair = {"blk.0.attn_q.weight.lora_a": values(2, 8), "blk.0.attn_q.weight.lora_b": values(16, 2)}
    kept = gguf.read(file(pair, general__architecture="llama"))
    assert set(kept.updates) == {"blk.0.attn_q.weight"}
    assert torch.equal(kept.updates["blk.0.attn_q.weight"][0].up.torch(), pair["blk.0.attn_q.weight.lora_b"])  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="reorders the rows") as caught:
        gguf.read(file(pair, general__architecture="llama"), hints=Hints(weights={Q: (16, 8)}))
    assert "--base" in caught.value.hint
    with pytest.raises(ConfigError, match="not those of 4 heads"):
        gguf.read(
            file({**pair, "blk.0.attn_q.weight.lora_b": values(12, 2)}, general__architecture="llama"),
            hints=Hints(config=LLAMA),
        )
    assert set(gguf.read(file(pair)).updates) == {Q}
    with pytest.raises(FormatError, match='for the architecture "qwen3", the base is "llama"'):
        gguf.read(file(pair), hints=Hints(config=LLAMA))


def test_with_a_gguf_base_nothing_is_renamed_or_turned() -> None:
    pair = {"blk.0.attn_q.weight.lora_a": values(2, 8), "blk.0.attn_q.weight.lora_b": values(16, 2, seed=4)}
    hints = Hints(settings={"general.architecture": "llama"}, weights={"blk.0.attn_q.weight": (16, 8)})
    found = gguf.read(file(pair, general__architecture="llama"), hints=hints)
    (update,) = found.updates["blk.0.attn_q.weight"]
    assert isinstance(update, LowRank)
    assert torch.equal(update.up.torch(), pair["blk.0.attn_q.weight.lora_b"])


@pytest.mark.parametrize(
    ("alpha", "scale"), [({}, 1.0), ({"adapter__lora__alpha": 0.0}, 1.0), ({"adapter__lora__alpha": 5.0}, 2.5)]
)
def test_alpha_of_0_or_none_is_a_scale_of_1(alpha: dict[str, float], scale: float) -> None:
    pair = {"blk.0.attn_v.weight.lora_a": values(2, 8), "blk.0.attn_v.weight.lora_b": values(16, 2)}
    (update,) = gguf.read(file(pair, **alpha)).updates["model.layers.0.self_attn.v_proj.weight"]
    assert isinstance(update, LowRank)
    assert update.scale == scale


def test_one_alpha_is_stated_and_other_scales_are_worked_in() -> None:
    names = [Q.replace("q_proj", f"{letter}_proj") for letter in "qkvo"]
    scales, ranks = (1.5, 1.5, 0.25, 0.0), (2, 4, 4, 2)
    updates = {
        name: LowRank(lazy(16, rank, seed=rank), lazy(rank, 16), scale)
        for name, scale, rank in zip(names, scales, ranks, strict=True)
    }
    one = adapter(updates)
    found, settings = written(one, QWEN)
    codes = [loss.code for loss in gguf.losses(one, WriteOptions(base=Hints(config=QWEN)))]
    assert codes.count("LF701") == 1
    again = gguf.read(bundle({"adapter.gguf": tensors(found, "gguf", **settings)}))
    for name, update in updates.items():
        torch.testing.assert_close(dense(again.updates[name][0]), dense(update), rtol=1e-6, atol=1e-6)
    assert settings["adapter.lora.alpha"] != 0


def test_an_alpha_that_float32_does_not_hold_is_said() -> None:
    one = adapter({Q: LowRank(lazy(16, 2), lazy(2, 8), 8 / 2**0.5)})
    assert "LF704" in [loss.code for loss in gguf.losses(one, WriteOptions(base=Hints(config=QWEN)))]
    _, settings = written(one, QWEN)
    assert settings["adapter.lora.alpha"] == np.float32(16 / 2**0.5)


def test_experts_are_stacked_and_come_back_one_by_one() -> None:
    place = "model.layers.1.block_sparse_moe.experts.{}.w{}.weight"
    updates = {
        place.format(0, 1): LowRank(lazy(6, 2, seed=1), lazy(2, 8, seed=2), 1.5),
        place.format(2, 1): LowRank(lazy(6, 1, seed=3), lazy(1, 8, seed=4), 3.0),
        place.format(1, 2): LowRank(lazy(8, 2, seed=5), lazy(2, 6, seed=6), 1.5),
    }
    found, settings = written(adapter(updates), MIXTRAL)
    assert found["blk.1.ffn_gate_exps.weight.lora_b"].shape == (3, 6, 2)
    assert found["blk.1.ffn_down_exps.weight.lora_a"].shape == (3, 2, 6)
    assert not found["blk.1.ffn_gate_exps.weight.lora_b"][1].any()
    codes = {loss.code for loss in gguf.losses(adapter(updates), WriteOptions(base=Hints(config=MIXTRAL)))}
    assert {"LF701", "LF707"} <= codes
    again = gguf.read(bundle({"adapter.gguf": tensors(found, "gguf", **settings)}), hints=Hints(config=MIXTRAL))
    assert len(again.updates) == 6
    for name, update in updates.items():
        torch.testing.assert_close(dense(again.updates[name][0]), dense(update), rtol=1e-6, atol=1e-6)


def test_a_table_stands_as_the_engine_looks_it_up() -> None:
    table = LowRank(lazy(11, 2, seed=1), lazy(2, 8, seed=2), 1.5, is_embedding=True)
    found, settings = written(adapter({"model.embed_tokens.weight": table}), QWEN)
    assert torch.equal(found["token_embd.weight.lora_a"], table.up.torch())
    assert torch.equal(found["token_embd.weight.lora_b"], table.down.torch().T)
    again = gguf.read(bundle({"adapter.gguf": tensors(found, "gguf", **settings)}))
    assert again.updates["model.embed_tokens.weight"][0].is_embedding  # type: ignore[union-attr]
    assert torch.equal(dense(again.updates["model.embed_tokens.weight"][0]), dense(table))


PLAIN = LowRank(lazy(16, 2), lazy(2, 8), 1.5)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no base": ({Q: PLAIN}, {}, "without its base"),
    "no class": ({Q: PLAIN}, {"model_type": "MiniGPT"}, "whose base states no architecture"),
    "unknown class": ({Q: PLAIN}, {"architectures": ["FooForCausalLM"]}, "are unknown"),
    "no heads": ({Q: PLAIN}, {"architectures": ["LlamaForCausalLM"]}, "a number of heads that the base does not state"),
    "DoRA": ({Q: LowRank(lazy(16, 2), lazy(2, 8), 1.5, Magnitude(lazy(16)))}, QWEN, "a DoRA magnitude"),
    "convolution": ({Q: LowRank(lazy(4, 2), lazy(2, 12), 1.5, kernel=(2, 2))}, QWEN, "a convolution"),
    "whole weight": ({Q: Replace(lazy(16, 8))}, QWEN, "kind"),
    "no such tensor": ({"model.layers.0.self_attn.rotary.weight": PLAIN}, QWEN, "no tensor for"),
    "tied head": ({"lm_head.weight": PLAIN}, {**QWEN, "tie_word_embeddings": True}, "a tied table"),
    "float64": ({Q: LowRank(lazy(16, 2, dtype=torch.float64), lazy(2, 8), 1.5)}, QWEN, "--dtype float32"),
    "other heads": ({Q: LowRank(lazy(18, 2), lazy(2, 8), 1.5)}, LLAMA, "not those of 4 heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_hold_is_refused(name: str) -> None:
    updates, config, message = REFUSED[name]
    found = list(gguf.losses(adapter(updates), WriteOptions(base=Hints(config=config))))
    errors = [loss for loss in found if loss.severity is Severity.ERROR]
    assert [loss.code for loss in errors] == ["LF702"]
    assert message in errors[0].message


def test_half_a_pair_and_what_is_no_factor_are_named() -> None:
    entries = {
        "blk.0.attn_q.weight.lora_a": values(2, 8),
        "blk.0.attn_norm.weight": values(8),
        "blk.0.attn_v.weight.lora_a": values(2, 8),
        "blk.0.attn_v.weight.lora_b": values(8, 2),
    }
    found = gguf.read(file(entries))
    assert set(found.unclaimed) == {"blk.0.attn_q.weight.lora_a", "blk.0.attn_norm.weight"}
    assert [(note.code, note.location.tensor) for note in found.notes] == [("LF201", "blk.0.attn_q.weight")]


@pytest.mark.parametrize(
    ("a", "b"), [((2, 8), (16, 3)), ((8,), (16, 2)), ((3, 2, 8), (2, 16, 2)), ((2, 8), (3, 16, 2)), ((0, 8), (16, 0))]
)
def test_factors_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    pair = {"blk.0.attn_v.weight.lora_a": values(*a), "blk.0.attn_v.weight.lora_b": values(*b)}
    with pytest.raises(ConfigError, match="do not fit"):
        gguf.read(file(pair))


def test_other_kinds_of_adapters_and_unknown_models_are_refused() -> None:
    pair = {"blk.0.attn_v.weight.lora_a": values(2, 8), "blk.0.attn_v.weight.lora_b": values(8, 2)}
    with pytest.raises(UnsupportedUpdate, match="control_vector"):
        gguf.read(file(pair, adapter__type="control_vector"))
    with pytest.raises(FormatError, match='expected "adapter"'):
        gguf.read(file(pair, general__type="model"))
    with pytest.raises(UnsupportedUpdate, match="nobody"):
        gguf.read(file(pair, general__architecture="nobody"))
    with pytest.raises(ConfigError, match="expected a number"):
        gguf.read(file(pair, adapter__lora__alpha="16"))


def test_settings_say_the_base_and_carry_what_a_source_in_gguf_said() -> None:
    one = adapter({Q: PLAIN}, alora_invocation_tokens=[3, 5])
    _, settings = written(one, QWEN)
    assert settings["general.base_model.0.repo_url"] == "https://huggingface.co/owner/base"
    assert settings["adapter.alora.invocation_tokens"] == [3, 5]
    pair = {"blk.0.attn_v.weight.lora_a": values(2, 8), "blk.0.attn_v.weight.lora_b": values(8, 2)}
    said = {"general__name": "Mine", "adapter__lora__task_name": "chat", "general__tags": ["a", "b"]}
    source = gguf.read(file(pair, **said))
    _, settings = written(source, QWEN)
    assert [settings[key.replace("__", ".")] for key in said] == ["Mine", "chat", ["a", "b"]]


def test_a_modelfile_is_written_where_one_is_wanted(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "fixtures" / "good" / "gguf" / "tiny-qwen3"
    (tmp_path / "base").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    files = gguf.write(adapter({Q: PLAIN}), WriteOptions(base=Hints(config=QWEN), modelfile="qwen3")).files
    assert files["Modelfile"].read() == b"FROM qwen3\nADAPTER ./adapter.gguf\n"  # type: ignore[union-attr]
    for fields, message in (
        ({"to": "peft", "modelfile": "x"}, "needs --to gguf"),
        ({"to": "gguf", "modelfile": "x\nRUN"}, "without line breaks"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(str(source), str(tmp_path / "out"), **fields)


def test_a_file_of_the_gguf_package_is_this_format() -> None:
    source = Path(__file__).parents[2] / "fixtures" / "good" / "gguf" / "tiny-qwen3"
    for path in (source, source / "adapter.gguf"):
        found, match = formats.detect(open_bundle(str(path)))
        assert (found.NAME, match.certain) == ("gguf", True)
    assert gguf.read(open_bundle(str(source))).config.base_model == "loraformat/tiny-qwen3"


def test_every_name_of_the_table_leads_back_to_itself() -> None:
    for name in known_classes():
        model = model_of_config({"architectures": [name], "num_attention_heads": 4})
        assert model is not None
        by_settings = model_of_settings({"general.architecture": model.architecture})
        assert by_settings is not None
        assert by_settings.permuted == model.permuted
        for module in model.names:
            weight = f"{module.format(7, 3)}.weight"
            place = model.place(weight)
            assert place is not None
            assert weight in model.weights_of(place.tensor, place.expert)


def test_the_order_of_rows_is_that_of_the_converter() -> None:
    for heads, size in ((1, 2), (3, 8), (8, 64)):
        rows = heads * size
        wanted = np.arange(rows).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)
        assert [source_row(row, heads, rows) for row in range(rows)] == wanted.tolist()


def test_the_writer_needs_nothing_of_values() -> None:
    """What is refused is told by headers alone; what is written is the same each time."""
    one = adapter({Q: PLAIN})
    first, second = (loaded(gguf.write(one, WriteOptions(base=Hints(config=QWEN))))["adapter.gguf"] for _ in range(2))
    assert list(first.entries) == list(second.entries)
    assert first.extras == second.extras
