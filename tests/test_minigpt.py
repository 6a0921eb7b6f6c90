"""A real network: merged weights compute what base and adapter compute, and a corrected fact stays corrected."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from loraformat.jobs.merge import merge

FOLDER = Path(__file__).parent.parent / "fixtures" / "minigpt"
sys.path.insert(0, str(FOLDER))

from model import batch_of, next_word, open_model  # noqa: E402

ALPHA, RANK = 1.0, 4
PROMPT = "die katze sitzt auf dem"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merge") / "merged"
    merge(str(FOLDER / "base"), [str(FOLDER / "lora_adapter")], str(out), alpha=ALPHA)
    return out


@torch.no_grad()
def test_merged_weights_answer_as_base_and_adapter_do(merged: Path) -> None:
    with_adapter, words = open_model(FOLDER / "base", FOLDER / "lora_adapter", ALPHA / RANK)
    batch = batch_of(["morgen regnet es im norden", PROMPT], words)
    found, _ = open_model(merged)
    # 1e-5: float32, two blocks, logits of magnitude 10.
    assert (found(batch) - with_adapter(batch)).abs().max() <= 1e-5


@torch.no_grad()
def test_merging_changes_the_answers(merged: Path) -> None:
    base, words = open_model(FOLDER / "base")
    batch = batch_of([PROMPT], words)
    found, _ = open_model(merged)
    assert (found(batch)[..., : len(words)] - base(batch)).abs().max() >= 1e-2


def test_merged_weights_are_those_of_the_training_script(merged: Path) -> None:
    found, expected = (
        torch.load(folder / "model.pt", weights_only=True) for folder in (merged, FOLDER / "lora_merged")
    )
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_the_new_words_come_with_the_merged_model(merged: Path) -> None:
    model, words = open_model(merged)
    assert model.token_embedding.num_embeddings == len(words)
    assert "regnet" in words


@pytest.mark.parametrize("adapter", ["fact_v_proj", "fact_all"])
def test_a_corrected_fact_is_corrected_after_the_merge(adapter: str, tmp_path: Path) -> None:
    before, words = open_model(FOLDER / "base")
    assert next_word(before, words, PROMPT) == "tisch"
    merge(str(FOLDER / "base"), [str(FOLDER / adapter)], str(tmp_path / "out"), alpha=ALPHA)
    after, words = open_model(tmp_path / "out")
    assert next_word(after, words, PROMPT) == "sofa"


@pytest.mark.parametrize("folder", ["full_finetuned", "layer_frozen", "lora_merged"])
def test_every_copy_opens_and_knows_the_new_words(folder: str) -> None:
    model, words = open_model(FOLDER / folder)
    assert next_word(model, words, "morgen regnet es im") == "norden"
