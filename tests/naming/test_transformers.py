"""Stored names and names in memory; the table against the installed transformers where that is of its version."""

from __future__ import annotations

import json
import re
from typing import Any

import derive_names
import pytest
from pins import CONSTRAINTS, PYTHONS, skip_unless_installed, versions

from loraformat.naming import spelling_of

LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
VIT = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}


@pytest.mark.parametrize(
    ("config", "stored", "in_memory"),
    [
        (LLAVA, "language_model.model.layers.0.q.weight", "model.language_model.layers.0.q.weight"),
        (LLAVA, "language_model.lm_head.weight", "lm_head.weight"),
        (LLAVA, "model.language_model.layers.0.q.weight", "model.language_model.layers.0.q.weight"),
        (VIT, "vit.encoder.layer.0.attention.attention.query.weight", "vit.layers.0.attention.q_proj.weight"),
        (VIT, "classifier.weight", "classifier.weight"),
        ({"model_type": "llama"}, "model.layers.0.q.weight", "model.layers.0.q.weight"),
        ({}, "x", "x"),
    ],
)
def test_names_in_memory(config: dict[str, object], stored: str, in_memory: str) -> None:
    spelled = spelling_of(config).in_memory(stored)
    assert (spelled.names, spelled.operation) == ((in_memory,), "rename")


def test_experts_have_a_number_and_a_place_among_what_is_joined() -> None:
    spelled = spelling_of({"model_type": "mixtral"}).in_memory("model.layers.0.block_sparse_moe.experts.12.w3.weight")
    assert spelled.names == ("model.layers.0.mlp.experts.gate_up_proj",)
    assert (spelled.operation, spelled.expert, spelled.source, spelled.sources) == ("experts", 12, 1, 2)


def test_the_text_part_of_a_composed_model_brings_its_rules() -> None:
    config = {**LLAVA, "text_config": {"model_type": "mixtral"}}
    spelled = spelling_of(config).in_memory("language_model.model.layers.0.block_sparse_moe.experts.0.w2.weight")
    assert spelled.names == ("model.language_model.layers.0.mlp.experts.down_proj",)


def table() -> dict[str, Any]:
    return json.loads(derive_names.TABLE.read_text(encoding="utf-8"))


def version_of(content: dict[str, Any]) -> str:
    (version,) = re.findall(r"transformers (\S+),", content["source"])
    return version


def test_the_table_is_of_the_transformers_that_the_suite_installs() -> None:
    """Else the comparison below would be skipped by everybody: the newest Python has the newest version."""
    assert versions(CONSTRAINTS, PYTHONS[-1])["transformers"] == [version_of(table())]


def test_the_table_has_the_rules_of_the_installed_transformers() -> None:
    rows = table()["rules"]
    skip_unless_installed("transformers", version_of(table()))
    rules = {name: rows[found] if isinstance(found, str) else found for name, found in rows.items()}
    assert rules == derive_names.rules()
