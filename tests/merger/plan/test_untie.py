"""Names that share a table: who follows, who is parted, and what is refused because the model would be another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, load, low_rank, merge, merge_and_tell, save_base, weights
from oracle import merged

from loraformat.errors import MergeError, UnsupportedUpdate
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Replace, Rows

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def table(rows: int, seed: int = 9) -> LazyTensor:
    return LazyTensor.of(torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)))


def test_the_class_tells_the_names_of_its_tie(tmp_path: Path) -> None:
    """Mamba calls its embedding by a name that no list of names would find."""
    old = torch.randn(70, 24)
    settings = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 70}
    base = save_base(tmp_path / "base", {"backbone.embeddings.weight": old}, settings)
    update = low_rank(70, 24)
    out = merge(base, tmp_path / "out", adapter({"backbone.embeddings.weight": update}))
    result = load(out)
    assert torch.equal(result[HEAD], old)
    assert torch.allclose(result["backbone.embeddings.weight"].double(), merged(old, [update]), atol=1e-5)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("BertForMaskedLM", "bert.embeddings.word_embeddings.weight"),
        ("MarianMTModel", "model.decoder.embed_tokens.weight"),
        ("SomebodysForCausalLM", "model.embed_tokens.weight"),
    ],
)
def test_what_cannot_be_parted_without_another_change_is_refused(tmp_path: Path, architecture: str, name: str) -> None:
    settings = {"architectures": [architecture], "tie_word_embeddings": True, "vocab_size": 70}
    base = save_base(tmp_path / "base", {name: torch.randn(70, 24)}, settings)
    with pytest.raises(
        (UnsupportedUpdate, MergeError), match=r"untie it from|the tied output head cannot be identified"
    ):
        merge(base, tmp_path / "out", adapter({name: low_rank(70, 24)}))
    assert not (tmp_path / "out").exists()


def test_a_class_without_a_head_has_nothing_to_part(tmp_path: Path) -> None:
    name, old = "bert.embeddings.word_embeddings.weight", torch.randn(70, 24)
    settings = {"architectures": ["BertForSequenceClassification"], "tie_word_embeddings": True, "vocab_size": 70}
    base = save_base(tmp_path / "base", {name: old}, settings)
    result = load(merge(base, tmp_path / "out", adapter({name: low_rank(70, 24)})))
    assert list(result) == [name]
    assert torch.allclose(result[name].double(), merged(old, [low_rank(70, 24)]), atol=1e-5)


@pytest.mark.parametrize("stored", [False, True])
def test_a_head_with_an_update_of_its_own_still_follows_new_values(tmp_path: Path, stored: bool) -> None:
    """The un-merged head is the tied table with the new values, plus the update."""
    tensors = weights(tied=True)
    if stored:
        tensors[HEAD] = tensors[EMBED].clone()
    base = save_base(tmp_path / "base", tensors, config(tied=True))
    rows, update = Rows((3, 5), table(2)), low_rank(70, 24)
    result = load(merge(base, tmp_path / "out", adapter({EMBED: rows, HEAD: update})))
    assert torch.allclose(result[EMBED].double(), merged(tensors[EMBED], [rows]))
    assert torch.allclose(result[HEAD].double(), merged(tensors[EMBED], [rows, update]), atol=1e-5)
    grown, wide = Replace(table(75)), low_rank(75, 24)
    result = load(merge(base, tmp_path / "grown", adapter({EMBED: grown, HEAD: wide})))
    assert torch.allclose(result[HEAD].double(), merged(tensors[EMBED], [grown, wide]), atol=1e-5)


@pytest.mark.parametrize("rows", [(3, 5), (5, 3)])
@pytest.mark.parametrize("stored", [False, True])
def test_names_that_get_different_rows_part(tmp_path: Path, rows: tuple[int, int], stored: bool) -> None:
    tensors = weights(tied=True)
    if stored:
        tensors[HEAD] = tensors[EMBED].clone()
    base = save_base(tmp_path / "base", tensors, config(tied=True))
    updates = {name: Rows((row,), table(1)) for name, row in zip((EMBED, HEAD), rows, strict=True)}
    out = merge(base, tmp_path / "out", adapter(updates))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    result = load(out)
    for name, update in updates.items():
        assert torch.equal(result[name].double(), merged(tensors[EMBED], [update]))


@pytest.mark.parametrize("is_equal", [True, False])
@pytest.mark.parametrize("indices", [None, (3, 5)], ids=["table", "rows"])
def test_names_that_get_equal_values_stay_one(tmp_path: Path, indices: tuple[int, ...] | None, is_equal: bool) -> None:
    """Whether the values stand in one tensor or in two."""

    def update(seed: int) -> Replace | Rows:
        return Replace(table(70, seed)) if indices is None else Rows(indices, table(len(indices), seed))

    tensors = weights(tied=True)
    base = save_base(tmp_path / "base", tensors, config(tied=True))
    change = adapter({EMBED: update(1), HEAD: update(1 if is_equal else 2)})
    out = merge(base, tmp_path / "out", change)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is is_equal
    result = load(out)
    assert torch.equal(result[EMBED].double(), merged(tensors[EMBED], [update(1)]))
    if is_equal:
        assert HEAD not in result
    else:
        assert torch.equal(result[HEAD].double(), merged(tensors[EMBED], [update(2)]))


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_a_table_and_a_row_of_one_name_part_it_from_the_other(tmp_path: Path, name: str) -> None:
    """Both follow the tie, but the names would not get the same."""
    tensors = weights(tied=True)
    base = save_base(tmp_path / "base", tensors, config(tied=True))
    other = HEAD if name == EMBED else EMBED
    chain = (Replace(table(70)), Rows((3,), table(1, 2)))
    result = load(merge(base, tmp_path / "out", adapter({name: chain, other: Replace(table(70))})))
    assert torch.equal(result[name].double(), merged(tensors[EMBED], list(chain)))
    assert torch.equal(result[other], table(70).torch())


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize(
    "settings", [config(tied=True), {"architectures": ["LlamaForCausalLM"]}], ids=["said", "silent"]
)
def test_two_different_stored_tables_are_not_tied_whatever_the_config_says(
    tmp_path: Path, settings: dict[str, object], container: str
) -> None:
    tensors = weights()
    base = save_base(tmp_path / "base", tensors, settings)
    if container == "torch":
        (base / "model.safetensors").unlink()
        torch.save(tensors, base / "pytorch_model.bin")
    change = adapter({EMBED: Replace(table(70))})
    merge_and_tell(base, tmp_path / "out", change, same=lambda one, other: torch.equal(tensors[one], tensors[other]))
    result = load(tmp_path / "out")
    assert torch.equal(result[EMBED], table(70).torch())
    assert torch.equal(result[HEAD], tensors[HEAD])


@pytest.mark.parametrize("is_one", [True, False])
def test_equal_stored_tables_of_a_torch_file_are_tied(tmp_path: Path, is_one: bool) -> None:
    tensors = weights(tied=True)
    base = save_base(tmp_path / "base", tensors, config(tied=True))
    (base / "model.safetensors").unlink()
    tensors[HEAD] = tensors[EMBED] if is_one else tensors[EMBED].clone()
    torch.save(tensors, base / "pytorch_model.bin")
    out = merge(base, tmp_path / "out", adapter({EMBED: Replace(table(70))}))
    assert {name: torch.equal(load(out)[name], table(70).torch()) for name in (EMBED, HEAD)} == {
        EMBED: True,
        HEAD: True,
    }
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("update", [Replace(table(75)), Rows((70,), table(1))])
def test_a_vocabulary_that_grows_in_one_of_two_tables_is_refused(tmp_path: Path, update: Replace | Rows) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    with pytest.raises(
        MergeError, match=r"embed_tokens.weight has 7[15] rows with the update, but lm_head.weight keeps 70"
    ):
        merge(base, tmp_path / "out", adapter({EMBED: update}))


def test_a_vocabulary_that_grows_in_both_tables_grows(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    out = merge(base, tmp_path / "out", adapter({EMBED: Rows((70,), table(1)), HEAD: Rows((70,), table(1, 2))}))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 71
    assert {tuple(load(out)[name].shape) for name in (EMBED, HEAD)} == {(71, 24)}


@pytest.mark.parametrize("rows", [75, 60])
def test_names_that_part_with_other_numbers_of_rows_are_refused(tmp_path: Path, rows: int) -> None:
    base = save_base(tmp_path / "base", weights(tied=True), config(tied=True))
    change = adapter({EMBED: Replace(table(rows), follows_tie=False)})
    most, least = (EMBED, HEAD) if rows > 70 else (HEAD, EMBED)
    with pytest.raises(
        MergeError, match=rf"^merge: {most} has {max(rows, 70)} rows .*, but {least} keeps {min(rows, 70)}"
    ):
        merge(base, tmp_path / "out", change)


@pytest.mark.parametrize("grows", [True, False])
def test_a_bias_with_a_value_for_each_token_must_grow_too(tmp_path: Path, grows: bool) -> None:
    """Rows that stand in the table already leave it as long as it is."""
    base = save_base(tmp_path / "base", {**weights(), "lm_head.bias": torch.zeros(70)}, config())
    row = 70 if grows else 69
    change = adapter({EMBED: Rows((row,), table(1)), HEAD: Rows((row,), table(1, 2))})
    if not grows:
        assert torch.equal(load(merge(base, tmp_path / "out", change))[EMBED][69], table(1).torch()[0])
        return
    with pytest.raises(MergeError, match=r"lm_head.weight has 71 rows .*, but lm_head.bias keeps 70"):
        merge(base, tmp_path / "out", change)
