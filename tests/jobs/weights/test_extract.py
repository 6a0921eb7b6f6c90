"""extract: PEFT loads it and gives the tuned model's answers; errors are true; nothing else is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from model_pairs import Tensors, llama, logits, low_rank, model_of, read, tuned, write
from safetensors.torch import save_file

import loraformat
from loraformat.cli import main
from loraformat.errors import AdapterRefused, LoraFormatError, MergeError, NonFiniteValue, UsageError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return llama()


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(model_of(base), str(adapter)).eval())


def test_peft_gives_the_answers_of_the_tuned_model(tmp_path: Path, tensors: Tensors) -> None:
    base = write(tmp_path / "base", tensors)
    after = write(tmp_path / "tuned", tuned(tensors, low_rank(3)))
    report = loraformat.extract(base, after, tmp_path / "out", rank=4)
    wanted, before = logits(model_of(after)), logits(model_of(base))
    found = peft_logits(base, tmp_path / "out")
    assert (found - wanted).norm() <= 1e-4 * (before - wanted).norm()
    assert report.data.error < 1e-6
    assert report.data.unchanged == len(tensors) - len(report.data.weights)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
def test_the_reported_errors_are_those_of_the_file(
    tmp_path: Path, tensors: Tensors, dtype: torch.dtype, factors: str
) -> None:
    before, after = tensors, tuned(tensors, low_rank(12))
    base, changed = write(tmp_path / "base", before, dtype), write(tmp_path / "tuned", after, dtype)
    report = loraformat.extract(base, changed, tmp_path / "out", rank=5, dtype=factors)
    adapter = loraformat.load_adapter(tmp_path / "out")
    one, other = read(base), read(changed)
    for record in report.data.weights:
        exact = (other[record.weight].double() - one[record.weight].double()).numpy()
        error = np.linalg.norm(exact - adapter.delta(record.weight, dtype="float64")) / np.linalg.norm(exact)
        values = np.linalg.svd(exact, compute_uv=False)
        assert abs(record.error - error) <= 1e-6
        assert record.optimum == pytest.approx(np.linalg.norm(values[5:]) / np.linalg.norm(values), abs=1e-6)
        assert record.norm == pytest.approx(np.linalg.norm(exact), rel=1e-9)


def wide(tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """A pair whose layers are large enough for the search by blocks of rows."""
    g = torch.Generator().manual_seed(0)
    before = {
        f"layers.{at}.up.weight": (torch.randn(700, 560, generator=g) * 0.02).to(dtype).float() for at in range(3)
    }
    after = {
        name: value + 1e-3 * torch.randn(700, 20, generator=g) @ torch.randn(20, 560, generator=g)
        for name, value in before.items()
    }
    return write(tmp_path / "base", before, dtype), write(tmp_path / "tuned", after, dtype)


def test_bytes_depend_neither_on_threads_nor_on_memory(tmp_path: Path) -> None:
    base, after = wide(tmp_path)
    written = []
    for jobs, memory in ((1, 1 << 30), (3, 1 << 30), (1, 1), (2, 3 << 20)):
        out = tmp_path / f"out-{jobs}-{memory}"
        loraformat.extract(base, after, out, rank=8, jobs=jobs, memory_nbytes=memory)
        written.append((out / WEIGHTS).read_bytes())
    assert len(set(written)) == 1


def test_a_difference_in_16_bits_says_what_of_it_is_rounding(tmp_path: Path) -> None:
    base, after = wide(tmp_path)
    report = loraformat.extract(base, after, tmp_path / "out", energy=0.99999)
    assert all(20 <= each.rank <= 40 for each in report.data.weights), "no rank that stores rounding"
    assert 0 < report.data.error <= report.data.floor * 1.1
    assert "larger rank would only store rounding" in str(report)
    assert 0.9 < report.data.retained < 1.1


def test_a_size_is_kept_and_spent(tmp_path: Path) -> None:
    base, after = wide(tmp_path)
    report = loraformat.extract(base, after, tmp_path / "out", size=300_000)
    nbytes = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert 290_000 < nbytes <= 300_000
    assert all(each.rank for each in report.data.weights)


def test_shards_and_containers_make_no_difference(tmp_path: Path, tensors: Tensors) -> None:
    base, changed = write(tmp_path / "base", tensors), tuned(tensors, low_rank(3))
    after = write(tmp_path / "tuned", changed)
    (tmp_path / "shards").mkdir()
    names = sorted(changed)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: changed[name] for name in part}, tmp_path / "shards" / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for source in (after, tmp_path / "shards"):
        loraformat.extract(base, source, tmp_path / f"from-{source.name}", rank=4)
    assert (tmp_path / "from-tuned" / WEIGHTS).read_bytes() == (tmp_path / "from-shards" / WEIGHTS).read_bytes()


def norms_and_tables(name: str, value: torch.Tensor) -> torch.Tensor | None:
    if name.endswith("norm.weight") or "embed" in name:
        return value + 0.1
    return low_rank(3)(name, value)


def test_the_rest_is_refused_by_name(tmp_path: Path, tensors: Tensors) -> None:
    base = write(tmp_path / "base", tensors)
    after = write(tmp_path / "tuned", tuned(tensors, norms_and_tables))
    with pytest.raises(UsageError, match=r"6 tensors changed .*input_layernorm.weight") as refused:
        loraformat.extract(base, after, tmp_path / "out", rank=4)
    assert "--rest save" in refused.value.hint
    assert not (tmp_path / "out").exists()


def test_the_rest_is_saved_and_peft_loads_it(tmp_path: Path, tensors: Tensors) -> None:
    base = write(tmp_path / "base", tensors)
    after = write(tmp_path / "tuned", tuned(tensors, norms_and_tables))
    report = loraformat.extract(base, after, tmp_path / "out", rank=4, rest="save")
    wanted, before = logits(model_of(after)), logits(model_of(base))
    assert (peft_logits(base, tmp_path / "out") - wanted).norm() <= 1e-4 * (before - wanted).norm()
    assert len(report.data.kept) == 6
    merged = tmp_path / "merged"
    loraformat.merge(base, [tmp_path / "out"], merged)
    for name, value in read(after).items():
        assert torch.allclose(read(merged)[name], value, atol=1e-6), name


def test_the_rest_is_dropped_and_counted(tmp_path: Path, tensors: Tensors) -> None:
    base, changed = write(tmp_path / "base", tensors), tuned(tensors, norms_and_tables)
    after = write(tmp_path / "tuned", changed)
    report = loraformat.extract(base, after, tmp_path / "out", rank=4, rest="drop")
    lost = {name for name in tensors if name.endswith("norm.weight") or "embed" in name}
    assert set(report.data.left_out) == lost
    squares = {name: float((changed[name].double() - tensors[name].double()).square().sum()) for name in tensors}
    assert report.data.dropped == pytest.approx(sum(squares[name] for name in lost) / sum(squares.values()), rel=1e-6)


def test_a_tied_table_is_saved_once_and_both_ends_follow(tmp_path: Path) -> None:
    fields = {"tie_word_embeddings": True}
    tensors = llama(**fields)
    tensors.pop("lm_head.weight")
    base = write(tmp_path / "base", tensors, **fields)
    after = write(tmp_path / "tuned", tuned(tensors, norms_and_tables), **fields)
    loraformat.extract(base, after, tmp_path / "out", rank=4, rest="save")
    names = [name for name in read(tmp_path / "out") if "embed" in name or "lm_head" in name]
    assert names == ["base_model.model.model.embed_tokens.weight"]
    wanted, before = logits(model_of(after)), logits(model_of(base))
    assert (peft_logits(base, tmp_path / "out") - wanted).norm() <= 1e-4 * (before - wanted).norm()


def test_a_head_that_was_untied_is_saved_apart_from_its_table(tmp_path: Path) -> None:
    tensors = llama(tie_word_embeddings=True)
    head = tensors.pop("lm_head.weight")
    base = write(tmp_path / "base", tensors, tie_word_embeddings=True)
    changed = {**tuned(tensors, norms_and_tables), "lm_head.weight": head * 1.5}
    after = write(tmp_path / "tuned", changed, tie_word_embeddings=False)
    loraformat.extract(base, after, tmp_path / "out", rank=4, rest="save")
    wanted, before = logits(model_of(after)), logits(model_of(base))
    assert (peft_logits(base, tmp_path / "out") - wanted).norm() <= 1e-4 * (before - wanted).norm()
    loraformat.merge(base, [tmp_path / "out"], tmp_path / "merged")
    assert torch.allclose(logits(model_of(tmp_path / "merged")), wanted, atol=1e-4)


def test_new_tokens_are_saved(tmp_path: Path, tensors: Tensors) -> None:
    grown = {
        name: torch.cat([value, torch.ones(4, 32)])
        if name in ("model.embed_tokens.weight", "lm_head.weight")
        else value
        for name, value in tuned(tensors, low_rank(3)).items()
    }
    base, after = write(tmp_path / "base", tensors), write(tmp_path / "tuned", grown, vocab_size=100)
    report = loraformat.extract(base, after, tmp_path / "out", rank=4, rest="save")
    assert report.data.vocabulary == 100
    resized = model_of(base)
    resized.resize_token_embeddings(report.data.vocabulary)
    loaded = peft.PeftModel.from_pretrained(resized, str(tmp_path / "out")).eval()
    assert (logits(loaded) - logits(model_of(after))).norm() < 1e-3
    arguments = ["extract", str(base), str(after), "--rank", "4", "--rest", "save", "-o", str(tmp_path / "told")]
    assert "model.resize_token_embeddings(100)" in CliRunner().invoke(main, arguments).stdout
    same = write(tmp_path / "same", tuned(tensors, lambda name, value: value + 0.1))
    assert loraformat.extract(base, same, tmp_path / "no", rank=4, rest="save").data.vocabulary is None
    loraformat.merge(base, [tmp_path / "out"], tmp_path / "merged")
    merged = read(tmp_path / "merged")
    assert torch.equal(merged["model.embed_tokens.weight"], grown["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], grown["lm_head.weight"])


def test_biases_are_trained_biases(tmp_path: Path) -> None:
    fields = {"attention_bias": True}
    tensors = llama(**fields)
    moved = tuned(tensors, lambda name, value: value + 0.3 if name.endswith(".bias") else low_rank(3)(name, value))
    base, after = write(tmp_path / "base", tensors, **fields), write(tmp_path / "tuned", moved, **fields)
    loraformat.extract(base, after, tmp_path / "out", rank=4, rest="save")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["bias"] != "none"
    wanted, before = logits(model_of(after)), logits(model_of(base))
    assert (peft_logits(base, tmp_path / "out") - wanted).norm() <= 1e-4 * (before - wanted).norm()


def test_select_and_drop(tmp_path: Path, tensors: Tensors) -> None:
    base, after = write(tmp_path / "base", tensors), write(tmp_path / "tuned", tuned(tensors, low_rank(3)))
    report = loraformat.extract(base, after, tmp_path / "out", rank=4, select=["q_proj"], rest="drop")
    assert {each.weight.split(".")[-2] for each in report.data.weights} == {"q_proj"}
    report = loraformat.extract(base, after, tmp_path / "others", rank=4, drop=["mlp.*"])
    assert len(report.data.weights) == 8
    assert len(report.data.left_out) == 6


def test_a_selected_table_becomes_lora(tmp_path: Path, tensors: Tensors) -> None:
    change = low_rank(3, ends=("embed_tokens.weight", "q_proj.weight"))
    base, after = write(tmp_path / "base", tensors), write(tmp_path / "tuned", tuned(tensors, change))
    loraformat.extract(base, after, tmp_path / "out", rank=4, select=["embed_tokens", "q_proj"])
    wanted, before = logits(model_of(after)), logits(model_of(base))
    assert (peft_logits(base, tmp_path / "out") - wanted).norm() <= 1e-4 * (before - wanted).norm()


def test_convolutions_and_conv1d(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"h.0.attn.c_attn.weight": (24, 72), "conv.weight": (8, 6, 3, 3), "line.weight": (8, 6, 3)}
    before = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    after = {name: value + 0.1 * torch.randn(value.shape, generator=g) for name, value in before.items()}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    base, changed = write(tmp_path / "base", before, **config), write(tmp_path / "tuned", after, **config)
    loraformat.extract(base, changed, tmp_path / "out", max_rank=72)
    adapter = loraformat.load_adapter(tmp_path / "out", base=base)
    opened = loraformat.open_checkpoint(base)
    for name, value in after.items():
        wanted = value - before[name]
        delta = torch.from_numpy(adapter.delta(name, opened))
        assert torch.allclose(delta, wanted.T if "c_attn" in name else wanted, atol=1e-5), name
    loraformat.merge(base, [tmp_path / "out"], tmp_path / "merged")
    for name, value in read(tmp_path / "merged").items():
        assert torch.allclose(value, after[name], atol=1e-5), name


def test_a_convolution_of_each_channel_for_itself_is_of_the_rest(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    before = {"conv.weight": torch.randn(8, 6, 3, generator=g), "conv1d.weight": torch.randn(16, 1, 4, generator=g)}
    base = write(tmp_path / "base", before)
    after = write(tmp_path / "tuned", {name: value + 1 for name, value in before.items()})
    assert "1 tensor changed but would not be part of the LoRA: conv1d.weight" in str(
        refused(base, after, tmp_path / "out")
    )
    found = refused(base, after, tmp_path / "out", select=["conv1d"])
    assert (found.code, "conv1d.weight" in found.message) == ("LF013", True)
    report = loraformat.extract(base, after, tmp_path / "out", rank=2, rest="save")
    assert ([each.weight for each in report.data.weights], report.data.kept) == (["conv.weight"], ("conv1d.weight",))


def refused(base: Path, after: Path, out: Path, **options: Any) -> LoraFormatError:
    with pytest.raises(LoraFormatError) as found:
        loraformat.extract(base, after, out, **{"rank": 4, **options})
    assert not out.exists()
    assert [path for path in out.parent.iterdir() if ".partial" in path.name] == []
    return found.value


def test_what_cannot_be_compared_is_one_error(tmp_path: Path, tensors: Tensors) -> None:
    base, changed = write(tmp_path / "base", tensors), tuned(tensors, low_rank(3))
    out = tmp_path / "out"
    other = write(tmp_path / "other", {f"net.{name}": value for name, value in changed.items()})
    assert isinstance(found := refused(base, other, out), MergeError)
    assert "no tensor has its name" in found.message
    less = write(tmp_path / "less", {name: value for name, value in changed.items() if "layers.1" not in name})
    assert "9 tensors of the base are missing" in refused(base, less, out).message
    name = "model.layers.0.mlp.up_proj.weight"
    cut = write(tmp_path / "cut", {**changed, name: changed[name][:, :16].clone()})
    assert name in refused(base, cut, out).message
    broken = {**changed, name: changed[name].clone()}
    broken[name][3, 3] = float("nan")
    found = refused(base, write(tmp_path / "nan", broken), out)
    assert isinstance(found, NonFiniteValue)
    assert name in str(found)
    assert isinstance(refused(base, base, out), AdapterRefused)
    assert "--rank" in refused(base, other, out, rank=None).hint
    assert "matches" in refused(base, write(tmp_path / "fine", changed), out, select=["nothing"]).message


def test_a_bias_that_is_called_like_a_mask_is_not_forgotten(tmp_path: Path, tensors: Tensors) -> None:
    """A layer called attn has a bias; only a causal mask goes without a word, and only where it did not change."""
    own = {
        "h.0.attn.bias": torch.ones(8),
        "h.0.rotary_emb.inv_freq": torch.ones(4),
        "h.0.attn.masked_bias": torch.ones(2),
    }
    mask = torch.tril(torch.ones(8, 8, dtype=torch.bool))[None, None]
    base = write(tmp_path / "base", {**tensors, **own, "h.1.attn.bias": mask})
    moved = tuned(tensors, low_rank(3))
    after = write(tmp_path / "tuned", {**moved, **{name: value + 1 for name, value in own.items()}})
    found = refused(base, after, tmp_path / "out")
    assert all(name in found.message for name in own)
    assert "h.1.attn.bias" not in found.message, "the tuned model stores no mask"
    report = loraformat.extract(base, after, tmp_path / "saved", rank=4, rest="save")
    assert set(report.data.kept) == set(own)
    same = write(tmp_path / "same", {**moved, **own, "h.1.attn.bias": mask})
    assert loraformat.extract(base, same, tmp_path / "equal", rank=4).data.kept == ()
    other = write(tmp_path / "other", {**moved, **own, "h.1.attn.bias": ~mask})
    assert "h.1.attn.bias" in refused(base, other, tmp_path / "out").message
    without = write(tmp_path / "without", {**moved, "h.0.attn.masked_bias": own["h.0.attn.masked_bias"]})
    assert "1 tensor of the base is missing: h.0.attn.bias" in refused(base, without, tmp_path / "out").message


def test_a_cut_file_is_one_error(tmp_path: Path, tensors: Tensors) -> None:
    base, after = write(tmp_path / "base", tensors), write(tmp_path / "tuned", tuned(tensors, low_rank(3)))
    file = after / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = CliRunner().invoke(main, ["extract", str(base), str(after), "--rank", "4", "-o", str(tmp_path / "out")])
    assert done.exit_code == 3
    assert done.stderr.count("error") == 1
    assert not (tmp_path / "out").exists()


def test_integers_that_changed_are_not_carried(tmp_path: Path, tensors: Tensors) -> None:
    base = write(tmp_path / "base", {**tensors, "steps": torch.tensor([1])})
    after = write(tmp_path / "tuned", {**tuned(tensors, low_rank(3)), "steps": torch.tensor([2])})
    assert "steps" in refused(base, after, tmp_path / "out", rest="save").message
    assert loraformat.extract(base, after, tmp_path / "out", rank=4, rest="drop").data.left_out == ("steps",)


def test_a_dry_run_writes_nothing(tmp_path: Path, tensors: Tensors) -> None:
    base, after = write(tmp_path / "base", tensors), write(tmp_path / "tuned", tuned(tensors, low_rank(3)))
    arguments = ["extract", str(base), str(after), "--rank", "4", "--dry-run", "--format", "json"]
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["data"]["is_dry_run"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_saving_in_another_dtype_is_no_change(tmp_path: Path, tensors: Tensors) -> None:
    base, changed = write(tmp_path / "base", tensors), tuned(tensors, low_rank(3, ends=("q_proj.weight",)))
    report = loraformat.extract(base, write(tmp_path / "tuned", changed, torch.bfloat16), tmp_path / "out", rank=4)
    assert {each.weight.split(".")[-2] for each in report.data.weights} == {"q_proj"}


def test_a_quantized_base_is_compared_by_what_its_codes_mean(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    loraformat.dequantize("fixtures/quantized/nf4", dense)
    before = read(dense)
    name = next(name for name, value in sorted(before.items()) if value.ndim == 2 and "_proj" in name)
    change = torch.outer(torch.arange(before[name].shape[0]) / 100, torch.ones(before[name].shape[1]))
    after = {**before, name: before[name].float() + change}
    (tmp_path / "tuned").mkdir()
    save_file(after, tmp_path / "tuned" / "model.safetensors")
    report = loraformat.extract("fixtures/quantized/nf4", tmp_path / "tuned", tmp_path / "out", rank=1)
    assert [each.weight for each in report.data.weights] == [name]
    assert report.data.error < 1e-3, "the dense model is rounded to bfloat16"
