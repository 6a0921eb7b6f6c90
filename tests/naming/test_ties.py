"""The table of tied names against the classes of the installed transformers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import derive_ties
import pytest

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
    """Else the comparison below would be skipped by everybody."""
    table = json.loads(derive_ties.TABLE.read_text(encoding="utf-8"))
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"transformers=={table['transformers']}" in pins


@pytest.mark.parametrize(("module", "name", "is_clean"), CLASSES)
def test_a_class_ties_what_the_table_says(module: str, name: str, is_clean: bool) -> None:
    import transformers

    table = json.loads(derive_ties.TABLE.read_text(encoding="utf-8"))
    if transformers.__version__ != table["transformers"]:
        pytest.skip("the table is of another version")
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
