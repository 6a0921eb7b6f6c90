"""The table of tied names against the classes of the installed transformers."""

from __future__ import annotations

import importlib
import json

import derive_ties
import pytest
from pins import CONSTRAINTS, PYTHONS, skip_unless_installed, versions

from loraformat.naming import parts_cleanly, tied_names

CLASSES = [
    ("llama", "LlamaForCausalLM", True),
    ("gpt2", "GPT2LMHeadModel", True),
    ("mamba", "MambaForCausalLM", True),
    ("modernbert", "ModernBertForMaskedLM", True),
    ("llava", "LlavaForConditionalGeneration", True),
    ("bert", "BertForMaskedLM", False),
    ("t5", "T5ForConditionalGeneration", True),
    ("whisper", "WhisperForConditionalGeneration", True),
    ("marian", "MarianMTModel", False),
    ("bert", "BertForSequenceClassification", False),
    ("llama", "LlamaModel", False),
]


def test_the_table_is_of_the_transformers_that_the_suite_installs() -> None:
    """Else the comparison below would be skipped by everybody: the newest Python has the newest version."""
    table = json.loads(derive_ties.TABLE.read_text(encoding="utf-8"))
    assert versions(CONSTRAINTS, PYTHONS[-1])["transformers"] == [table["transformers"]]


@pytest.mark.parametrize(("module", "name", "is_clean"), CLASSES)
def test_a_class_ties_what_the_table_says(module: str, name: str, is_clean: bool) -> None:
    table = json.loads(derive_ties.TABLE.read_text(encoding="utf-8"))
    skip_unless_installed("transformers", table["transformers"])
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = {"architectures": [name]}
    assert tied_names(config) == (getattr(code, name)._tied_weights_keys or {})
    assert parts_cleanly(config) is is_clean


def test_a_class_ties_what_its_bare_model_ties_too() -> None:
    shared = "model.shared.weight"
    config = {"architectures": ["BartForConditionalGeneration"]}
    halves = {f"model.{half}.embed_tokens.weight": shared for half in ("encoder", "decoder")}
    assert tied_names(config) == {"lm_head.weight": shared, **halves}
    assert parts_cleanly(config)


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": ["SomebodysForCausalLM"]}])
def test_a_class_that_is_not_known_is_told_from_one_that_ties_nothing(config: dict[str, object]) -> None:
    assert tied_names(config) is None
    assert not parts_cleanly(config)
