"""Tables that several parts of a model share: adapters of PEFT that part or resize them, against what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_architectures_against_peft import T5, WHISPER

import loraformat
from loraformat.errors import MergeError

BART = {**WHISPER, "max_position_embeddings": 32, "scale_embedding": False}
SPEECH = {
    "input_features": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32),
    "decoder_input_ids": torch.tensor([[1, 4, 9]]),
}
PAIRS = {**tiny.TOKENS, "decoder_input_ids": torch.tensor([[1, 4, 9]])}

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "whisper": ("Whisper", "WhisperForConditionalGeneration", WHISPER, SPEECH),
    "bart": ("Bart", "BartForConditionalGeneration", BART, PAIRS),
    "mbart": ("MBart", "MBartForConditionalGeneration", BART, PAIRS),
    "pegasus": ("Pegasus", "PegasusForConditionalGeneration", BART, PAIRS),
    "m2m100": ("M2M100", "M2M100ForConditionalGeneration", BART, PAIRS),
    "t5": ("T5", "T5ForConditionalGeneration", T5, PAIRS),
    "mt5": ("MT5", "MT5ForConditionalGeneration", T5, PAIRS),
}
KINDS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "lora on the head": lambda heads: {"target_modules": ["q_proj", "q", *heads]},
    "the head saved": lambda heads: {"target_modules": ["q_proj", "q"], "modules_to_save": heads},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_a_head_that_leaves_a_shared_table(name: str, kind: str, tmp_path: Path) -> None:
    stem, model_class, settings, inputs = CASES[name]
    model = tiny.build(model_class, f"{stem}Config", settings)
    heads = [head for head in ("proj_out", "lm_head") if hasattr(model, head)]
    both = tiny.adapted(model, tmp_path, **KINDS[kind](heads))
    report = loraformat.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", verify="full")
    tiny.check_merged(tmp_path / "out", model_class, both, inputs)
    kept = json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings") is not False
    assert ("LF821" in {finding.code for finding in report.findings}) == kept


def resized(folder: Path, **lora: Any) -> Any:
    """BART with four tokens more, of which the base that is saved knows nothing."""
    model = tiny.build("BartForConditionalGeneration", "BartConfig", BART)
    with torch.no_grad():
        model.final_logits_bias += torch.linspace(-1, 1, 40)
    model.save_pretrained(folder / "base")
    model.resize_token_embeddings(44)
    both = tiny.adapted(model, folder, target_modules=["q_proj"], **lora)
    both.save_pretrained(folder / "adapter", save_embedding_layers=True)
    return both


def test_new_tokens_of_bart(tmp_path: Path) -> None:
    """The bias of the logits grows too, by zeros."""
    both = resized(tmp_path)
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"), verify="full")
    tiny.check_merged(tmp_path / "out", "BartForConditionalGeneration", both, PAIRS)


def test_tables_that_part_at_different_lengths_are_refused(tmp_path: Path) -> None:
    """PEFT's copy of `shared` is used by neither half of the model, whose own longer tables are not in the file."""
    resized(tmp_path, modules_to_save=["shared", "lm_head"])
    with pytest.raises(MergeError, match=r"44 rows with the update, .*embed_tokens.weight keeps 40"):
        loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
