"""A fact of a small GPT: it comes with the LoRA of a fine-tuning, goes with unmerge, and goes with its direction."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import loraformat

FOLDER = Path(__file__).parents[3] / "fixtures" / "minigpt"
sys.path.insert(0, str(FOLDER))

from make import BASE_TEXTS, NEW_FACT, OLD_FACT, PROMPT  # noqa: E402
from model import batch_of, encode, loss_of, next_word, open_model  # noqa: E402

BASE = FOLDER / "base"
STEPS, RATE = 80, 1e-3


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base after a full fine-tuning, every parameter, on its sentences with one fact corrected."""
    torch.manual_seed(0)
    model, words = open_model(BASE)
    model.train()
    texts = [text.replace(OLD_FACT, NEW_FACT) if text.startswith(PROMPT) else text for text in BASE_TEXTS]
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0), batch_of(texts, words)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("facts") / "tuned"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pt")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(BASE / name, folder / name)
    return folder


def answer(folder: Path) -> tuple[str, float]:
    """(the word after the prompt, logit of the new fact less that of the old)."""
    model, words = open_model(folder)
    with torch.no_grad():
        logits = model(torch.tensor([encode(PROMPT, words)]))[0, -1]
    return next_word(model, words, PROMPT), float(logits[words[NEW_FACT]] - logits[words[OLD_FACT]])


def hidden(folder: Path) -> torch.Tensor:
    """What the last norm is given at the end of the prompt: (1, features)."""
    model, words = open_model(folder)
    found: list[torch.Tensor] = []
    model.ln_final.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0][0, -1:]))
    with torch.no_grad():
        model(torch.tensor([encode(PROMPT, words)]))
    return found[0]


def other_answers(folder: Path) -> list[str]:
    """The last words of all other sentences."""
    model, words = open_model(folder)
    texts = [text.rpartition(" ")[0] for text in BASE_TEXTS if not text.startswith(PROMPT)]
    return [next_word(model, words, text) for text in texts]


def test_the_extracted_lora_keeps_the_fact_and_unmerging_gives_the_old_one_back(tuned: Path, tmp_path: Path) -> None:
    assert answer(BASE)[0] == OLD_FACT
    word, apart = answer(tuned)
    assert word == NEW_FACT
    report = loraformat.extract(BASE, tuned, tmp_path / "lora", rank=8, rest="drop")
    assert 0 < report.data.error < 1
    loraformat.merge(BASE, [tmp_path / "lora"], tmp_path / "merged")
    found = answer(tmp_path / "merged")
    assert found[0] == NEW_FACT
    assert found[1] > 0.5 * apart
    loraformat.unmerge(tmp_path / "merged", [tmp_path / "lora"], tmp_path / "without")
    again = answer(tmp_path / "without")
    assert again[0] == OLD_FACT
    assert again[1] == pytest.approx(answer(BASE)[1], abs=1e-4)
    exact = loraformat.unmerge(tmp_path / "merged", [tmp_path / "lora"], tmp_path / "exact", base=BASE)
    assert exact.data.is_exact
    before, after = (torch.load(folder / "model.pt", weights_only=True) for folder in (BASE, tmp_path / "exact"))
    assert list(before) == list(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_all_that_changed_is_the_tuned_model(tuned: Path, tmp_path: Path) -> None:
    report = loraformat.extract(BASE, tuned, tmp_path / "all", rank=64, rest="save")
    assert report.data.error < 1e-6
    loraformat.merge(BASE, [tmp_path / "all"], tmp_path / "merged")
    assert answer(tmp_path / "merged")[1] == pytest.approx(answer(tuned)[1], abs=1e-3)
    assert other_answers(tmp_path / "merged") == other_answers(tuned)


def test_without_its_direction_the_fact_is_gone_and_the_others_stay(tuned: Path, tmp_path: Path) -> None:
    """The direction is that in which the fine-tuning moved what the head reads at the end of the prompt."""
    for name, folder in (("after", tuned), ("before", BASE)):
        np.save(tmp_path / f"{name}.npy", hidden(folder).numpy())
    loraformat.ablate(
        tuned,
        tmp_path / "ablated",
        direction_from=[(tmp_path / "after.npy", tmp_path / "before.npy")],
        select=["out_proj", "ff.2"],
        merge=True,
    )
    word, apart = answer(tmp_path / "ablated")
    assert word != NEW_FACT
    assert apart < 0.5 * answer(tuned)[1]
    kept = [one == other for one, other in zip(other_answers(tmp_path / "ablated"), other_answers(tuned), strict=True)]
    assert sum(kept) >= 0.8 * len(kept)
