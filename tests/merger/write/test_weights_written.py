"""Whole merges, files in and files out, against the float64 oracle and against the base's own bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, contents, load, low_rank, merge, save_base, weights
from oracle import merged

from loraformat.errors import MergeError, NonFiniteValue, ShapeMismatch, UnmatchedUpdate, UnsupportedUpdate
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Magnitude, Replace, Rows

Q, UP, EMBED, HEAD = (
    "model.layers.0.q_proj.weight",
    "model.layers.1.up_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


def table(rows: int, seed: int = 9) -> LazyTensor:
    return LazyTensor.of(torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_touched_weights_are_rounded_once_and_the_rest_is_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights(dtype=dtype)
    base = save_base(tmp_path / "base", tensors, config())
    updates = {Q: low_rank(24, 24), UP: low_rank(130, 24)}
    result = load(merge(base, tmp_path / "out", adapter(updates)))
    assert result.keys() == tensors.keys()
    for name, weight in tensors.items():
        if name not in updates:
            assert torch.equal(result[name], weight)
            continue
        exact = merged(weight, [updates[name]])
        # float32 sums (float64 for float64) within 1e-6 of the exact value, then half a unit in the last place
        room = torch.finfo(dtype).eps / 2 * exact.abs() + (1e-12 if dtype == torch.float64 else 1e-5)
        assert ((result[name].double() - exact).abs() <= room).all()


def test_neither_threads_nor_memory_nor_shards_change_a_byte(tmp_path: Path) -> None:
    tensors = weights(dtype=torch.bfloat16)
    base = save_base(tmp_path / "base", tensors, config(), shards=3)
    vector = Magnitude(LazyTensor.of(torch.rand(24) + 1), 0)
    embedding = LowRank(table(70), LazyTensor.of(torch.eye(24)), 0.1, vector, is_embedding=True)
    change = adapter({Q: low_rank(24, 24), UP: low_rank(130, 24), EMBED: embedding})
    first = contents(merge(base, tmp_path / "a", change))
    for number, (jobs, memory) in enumerate([(1, 1), (2, 1), (4, 1 << 18), (2, 1 << 30)]):
        assert contents(merge(base, tmp_path / f"b{number}", change, jobs=jobs, memory_nbytes=memory)) == first


def test_wide_rows_give_the_same_bytes_too(tmp_path: Path) -> None:
    """Rows so long that a tile does not stay in the cache are computed in lower strips."""
    for cols in (3200, 9000):
        tensors = {Q: torch.randn(150, cols, generator=torch.Generator().manual_seed(cols)).bfloat16()}
        base = save_base(tmp_path / f"base{cols}", tensors, config())
        change = adapter({Q: low_rank(150, cols, rank=8)})
        first = contents(merge(base, tmp_path / f"a{cols}", change))
        for number, (jobs, memory) in enumerate([(1, 1), (2, 1), (4, 1 << 22), (2, 1 << 30)]):
            assert (
                contents(merge(base, tmp_path / f"{cols}b{number}", change, jobs=jobs, memory_nbytes=memory)) == first
            )


def test_an_adapter_that_adds_nothing_gives_the_same_bytes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=2)
    zero = LowRank(LazyTensor.of(torch.zeros(24, 2)), LazyTensor.of(torch.zeros(2, 24)), 1.0)
    assert contents(merge(base, tmp_path / "out", adapter({Q: zero}))) == contents(base)


def test_several_adapters_are_summed_and_rounded_once(tmp_path: Path) -> None:
    tensors = {Q: torch.ones(24, 24, dtype=torch.bfloat16)}
    base = save_base(tmp_path / "base", tensors, config())
    # Each is 3/8 of a unit in the last place (2⁻⁷) of 1.0: alone it is rounded away, two of them are not.
    step = LowRank(LazyTensor.of(torch.full((24, 1), 3 / 1024)), LazyTensor.of(torch.ones(1, 24)), 1.0)
    once = load(merge(base, tmp_path / "once", adapter({Q: step})))[Q]
    twice = load(merge(base, tmp_path / "twice", adapter({Q: step}), adapter({Q: step})))[Q]
    assert torch.equal(once, tensors[Q])
    assert torch.equal(twice, torch.full_like(tensors[Q], 1 + 2**-7))


def test_weights_stored_as_in_by_out_take_the_transposed_update(tmp_path: Path) -> None:
    stored = {
        "h.0.attn.c_attn.weight": torch.randn(24, 72),
        "h.0.attn.c_proj.weight": torch.randn(24, 24),
        "h.0.attn.dense.weight": torch.randn(24, 24),
    }
    base = save_base(tmp_path / "base", stored, {"model_type": "gpt2"})
    vector = Magnitude(LazyTensor.of(torch.rand(72) + 1), 1)
    plain = low_rank(72, 24)
    dora = LowRank(plain.up, plain.down, plain.scale, vector)
    updates = dict(zip(stored, [dora, low_rank(24, 24), low_rank(24, 24)], strict=True))
    result = load(merge(base, tmp_path / "out", adapter(updates)))
    for name, weight in stored.items():
        expected = merged(weight, [updates[name]], transposed="dense" not in name)
        assert torch.allclose(result[name].double(), expected, atol=1e-5)


def test_a_resized_table_follows_into_config_and_tie(tmp_path: Path) -> None:
    settings = config(tied=True, text_config={"vocab_size": 70, "x": 1}, other="kept")
    base = save_base(tmp_path / "base", weights(tied=True), settings)
    new = table(75)
    out = merge(base, tmp_path / "out", adapter({EMBED: Replace(new)}))
    result = load(out)
    assert torch.equal(result[EMBED], new.torch())
    assert HEAD not in result
    assert json.loads((out / "config.json").read_text()) == {
        **settings,
        "vocab_size": 75,
        "text_config": {"vocab_size": 75, "x": 1},
    }


def test_equal_tables_for_both_ends_of_a_tie_stay_one(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(tied=True), config(tied=True))
    out = merge(base, tmp_path / "out", adapter({EMBED: Replace(table(75)), HEAD: Replace(table(75))}))
    assert HEAD not in load(out)
    assert json.loads((out / "config.json").read_text()) == config(tied=True) | {"vocab_size": 75}


def test_different_tables_for_both_ends_untie_them(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(tied=True), config(tied=True))
    out = merge(base, tmp_path / "out", adapter({EMBED: Replace(table(75)), HEAD: Replace(table(75, seed=1))}))
    result = load(out)
    assert torch.equal(result[EMBED], table(75).torch())
    assert torch.equal(result[HEAD], table(75, seed=1).torch())
    assert json.loads((out / "config.json").read_text()) == config(tied=False) | {"vocab_size": 75}


@pytest.mark.parametrize("shards", [1, 2])
def test_an_update_of_a_tied_head_leaves_the_embedding_alone(tmp_path: Path, shards: int) -> None:
    tensors = weights(tied=True)
    base = save_base(tmp_path / "base", tensors, config(tied=True), shards=shards)
    update = low_rank(70, 24)
    out = merge(base, tmp_path / "out", adapter({HEAD: update}))
    result = load(out)
    assert torch.equal(result[EMBED], tensors[EMBED])
    assert torch.allclose(result[HEAD].double(), merged(tensors[EMBED], [update]), atol=1e-5)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == result.keys()
        assert index["metadata"] == {"total_size": sum(t.nbytes for t in result.values()), "kept": 1}


def test_a_trained_copy_of_one_end_leaves_the_old_table_at_the_other(tmp_path: Path) -> None:
    tensors = weights(tied=True)
    base = save_base(tmp_path / "base", tensors, config(tied=True))
    result = load(merge(base, tmp_path / "out", adapter({EMBED: Replace(table(70), follows_tie=False)})))
    assert torch.equal(result[EMBED], table(70).torch())
    assert torch.equal(result[HEAD], tensors[EMBED])


def test_an_embedding_whose_tied_head_is_unknown_is_refused(tmp_path: Path) -> None:
    settings = {"tie_word_embeddings": True}
    base = save_base(tmp_path / "base", weights(tied=True), settings)
    with pytest.raises(MergeError, match="the tied output head cannot be identified"):
        merge(base, tmp_path / "out", adapter({EMBED: Replace(table(70), follows_tie=False)}))


def test_a_model_whose_halves_share_a_table_is_not_untied(tmp_path: Path) -> None:
    settings = {"model_type": "marian", "architectures": ["MarianMTModel"], "tie_word_embeddings": True}
    base = save_base(tmp_path / "base", weights(tied=True), settings)
    with pytest.raises(UnsupportedUpdate, match="MarianMTModel shares its table"):
        merge(base, tmp_path / "out", adapter({HEAD: low_rank(70, 24)}))


def test_rows_are_replaced_and_appended(tmp_path: Path) -> None:
    tensors = weights()
    base = save_base(tmp_path / "base", tensors, config())
    rows = Rows((71, 3, 70), table(3))
    result = load(out := merge(base, tmp_path / "out", adapter({EMBED: rows, HEAD: rows})))
    assert torch.equal(result[EMBED], merged(tensors[EMBED], [rows]).float())
    assert torch.equal(result[HEAD], merged(tensors[HEAD], [rows]).float())
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 72


def test_rows_with_a_gap_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    with pytest.raises(ShapeMismatch, match="those in between are missing"):
        merge(base, tmp_path / "out", adapter({EMBED: Rows((72,), table(1))}))


def save_torch(folder: Path, tensors: dict[str, torch.Tensor], file: str = "model.pt") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(tied=True)))
    torch.save(tensors, folder / file)
    return folder


def test_a_pt_base_stays_one_and_its_shared_storage_stays_shared(tmp_path: Path) -> None:
    tensors = weights(tied=True)
    tensors[HEAD] = tensors[EMBED]
    base = save_torch(tmp_path / "base", tensors)
    out = merge(base, tmp_path / "out", adapter({EMBED: Replace(table(75)), Q: low_rank(24, 24)}), jobs=2)
    result = torch.load(out / "model.pt", weights_only=True)
    assert list(result) == list(tensors)
    assert result[HEAD].data_ptr() == result[EMBED].data_ptr()
    assert torch.equal(result[HEAD], table(75).torch())
    assert torch.allclose(result[Q].double(), merged(tensors[Q], [low_rank(24, 24)]), atol=1e-5)
    assert torch.equal(result[UP], tensors[UP])


def test_a_pt_base_with_a_changed_head_no_longer_shares(tmp_path: Path) -> None:
    tensors = weights(tied=True)
    tensors[HEAD] = tensors[EMBED]
    base = save_torch(tmp_path / "base", tensors)
    result = load(merge(base, tmp_path / "out", adapter({HEAD: low_rank(70, 24)})))
    assert torch.equal(result[EMBED], tensors[EMBED])
    assert torch.allclose(result[HEAD].double(), merged(tensors[EMBED], [low_rank(70, 24)]), atol=1e-5)


def test_strided_tensors_of_a_pt_base_are_read_in_order(tmp_path: Path) -> None:
    tensors = {Q: torch.randn(24, 24).T, UP: torch.randn(24, 130).T, "x": torch.tensor(3.0), "e": torch.zeros(0, 3)}
    base = save_torch(tmp_path / "base", tensors)
    result = load(merge(base, tmp_path / "out", adapter({Q: low_rank(24, 24)})))
    assert torch.allclose(result[Q].double(), merged(tensors[Q], [low_rank(24, 24)]), atol=1e-5)
    assert all(torch.equal(result[name], tensors[name]) for name in (UP, "x", "e"))


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_the_container_can_be_changed(tmp_path: Path, container: str) -> None:
    tensors = weights()
    bases = {
        "torch": save_base(tmp_path / "safe", tensors, config(), shards=2),
        "safetensors": save_torch(tmp_path / "pt", tensors, "pytorch_model.bin"),
    }
    out = merge(bases[container], tmp_path / "out", adapter({Q: low_rank(24, 24)}), container=container, jobs=2)
    suffix = {"torch": ".bin", "safetensors": ".safetensors"}[container]
    assert {path.suffix for path in out.iterdir()} == {suffix, ".json"}
    result = load(out)
    assert result.keys() == tensors.keys()
    assert torch.equal(result[UP], tensors[UP])
    assert torch.allclose(result[Q].double(), merged(tensors[Q], [low_rank(24, 24)]), atol=1e-5)
    for index in out.glob("*.index.json"):
        files = set(json.loads(index.read_text())["weight_map"].values())
        assert files == {path.name for path in out.iterdir() if path.suffix == suffix}


def test_bin_shards_keep_their_names_and_their_index(tmp_path: Path) -> None:
    tensors, base = weights(), tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config()))
    names = sorted(tensors)
    weight_map = {}
    for number in (1, 2):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names[number - 1 :: 2]}, base / file)
        weight_map |= dict.fromkeys(names[number - 1 :: 2], file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    tables = {Q: low_rank(24, 24), EMBED: Replace(table(75)), HEAD: Replace(table(75, seed=1))}
    out = merge(base, tmp_path / "out", adapter(tables), jobs=2)
    result = load(out)
    assert torch.allclose(result[Q].double(), merged(tensors[Q], [low_rank(24, 24)]), atol=1e-5)
    assert torch.equal(result[EMBED], table(75).torch())
    assert torch.equal(result[UP], tensors[UP])
    grown = {"total_size": total + 2 * 5 * 24 * 4}
    assert json.loads((out / "pytorch_model.bin.index.json").read_text()) == {**index, "metadata": grown}
    for name, file in weight_map.items():
        assert name in torch.load(out / file, weights_only=True)


def test_weights_in_another_form_are_not_copied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    (base / "pytorch_model.bin").write_bytes(b"stale")
    (base / "README.md").write_text("kept")
    (base / "original").mkdir()
    out = merge(base, tmp_path / "out", adapter({Q: low_rank(24, 24)}))
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


def test_an_update_without_a_home_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    updates = {Q: low_rank(24, 24), "model.layers.7.q_proj.weight": low_rank(24, 24)}
    with pytest.raises(UnmatchedUpdate, match=r"1 of 2 .* model\.layers\.7\.q_proj.*model\.layers\.[01]\.q_proj"):
        merge(base, tmp_path / "out", adapter(updates))
    assert not (tmp_path / "out").exists()


def test_an_update_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    with pytest.raises(ShapeMismatch, match=r"\(24, 32\).*\(24, 24\)"):
        merge(base, tmp_path / "out", adapter({Q: low_rank(24, 32)}))


def test_two_replacements_of_one_tensor_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    one = adapter({EMBED: Replace(table(70))})
    with pytest.raises(MergeError, match="adapters 1, 2 each replace"):
        merge(base, tmp_path / "out", one, one)


def test_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {Q: torch.zeros(24, 24, dtype=torch.int8)}, config())
    with pytest.raises(UnsupportedUpdate, match="the base is quantized"):
        merge(base, tmp_path / "out", adapter({Q: low_rank(24, 24)}))


def test_overflow_of_the_base_dtype_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {Q: torch.zeros(24, 24, dtype=torch.float16)}, config())
    huge = LowRank(LazyTensor.of(torch.full((24, 1), 1e4)), LazyTensor.of(torch.full((1, 24), 1e4)), 1.0)
    with pytest.raises(NonFiniteValue, match=r"row 0, column 0 .* F16"):
        merge(base, tmp_path / "out", adapter({Q: huge}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
