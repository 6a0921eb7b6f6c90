"""A head of a task that the base lacks: which class it is taken for, and what is said where it is taken for none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from loraformat.matching.tasks import why_headless, with_task_head
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.checkpoint import Checkpoint, StoredTensor, WeightFile
from loraformat.model.tensors import DType, LazyTensor, Span
from loraformat.model.updates import Replace

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LLAMA_WEIGHTS = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight")
BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
BERT_WEIGHTS = ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight", "cls.bias")
SEQ, TOKEN = "LlamaForSequenceClassification", "LlamaForTokenClassification"


def base(names: tuple[str, ...] = LLAMA_WEIGHTS, config: Mapping[str, Any] = LLAMA, shards: int = 1) -> Checkpoint:
    files, tensors = {}, {}
    for number in range(shards):
        own = names[number::shards]
        files[f"f{number}"] = WeightFile(f"f{number}", "safetensors", 99, own, data_start=7)
        tensors |= {
            name: StoredTensor(f"f{number}", DType.F32 if name.endswith("bias") else DType.BF16, (8, 4), Span(7, 9))
            for name in own
        }
    return Checkpoint("base", files, tensors, config=config)


def adapter(shapes: Mapping[str, tuple[int, ...]], task: str | None = None, **raw: Any) -> Adapter:
    updates = {name: (Replace(LazyTensor.of(torch.ones(shape))),) for name, shape in shapes.items()}
    return Adapter(config=AdapterConfig(task=task, raw=raw), updates=updates)


@pytest.mark.parametrize(
    ("shapes", "task", "raw", "wanted"),
    [
        ({"score.weight": (3, 4)}, "SEQ_CLS", {}, SEQ),
        ({"score.weight": (3, 4), "score.bias": (3,)}, "TOKEN_CLS", {}, TOKEN),
        ({"score.weight": (3, 4)}, None, {}, SEQ),
        ({"score.weight": (3, 4), "score.bias": (3,)}, None, {}, TOKEN),
        ({"score.weight": (3, 4)}, "CAUSAL_LM", {}, SEQ),
        ({"score.weight": (3, 4)}, None, {"auto_mapping": {"base_model_class": TOKEN}}, TOKEN),
        ({"score.weight": (3, 4)}, "SEQ_CLS", {"auto_mapping": {"base_model_class": TOKEN}}, SEQ),
        ({"score.weight": (3, 4)}, None, {"auto_mapping": {"base_model_class": "Other"}}, SEQ),
        ({"score.weight": (3, 4)}, None, {"auto_mapping": "x"}, SEQ),
        ({"score.weight": (3, 4)}, "QUESTION_ANS", {}, None),
        ({"score.bias": (3,)}, None, {}, None),
        ({"other.weight": (3, 4)}, "SEQ_CLS", {}, None),
        ({"score.weight": ()}, "SEQ_CLS", {}, None),
        ({}, "SEQ_CLS", {}, None),
    ],
)
def test_which_class_a_head_is_taken_for(
    shapes: dict[str, tuple[int, ...]], task: str | None, raw: dict[str, Any], wanted: str | None
) -> None:
    plain = base()
    found = with_task_head(plain, adapter(shapes, task, **raw))
    if wanted is None:
        assert found is plain
        return
    assert found.task is not None
    assert (found.task.name, found.config["architectures"]) == (wanted, [wanted])
    assert with_task_head(found, adapter(shapes, task, **raw)) is found


def test_the_base_as_the_class_has_it() -> None:
    """The head has no rows yet and the dtype of the base; the head of the base's own class is gone."""
    found = with_task_head(base(shards=2), adapter({"score.weight": (3, 4)}, "SEQ_CLS"))
    assert found.task is not None
    assert found.task.dropped == ("lm_head.weight",)
    assert (found.task.head, found.task.renamed) == (("score.weight",), {})
    head = found.tensors["score.weight"]
    assert (head.file, head.shape, head.dtype, head.span) == ("f1", (0, 4), DType.BF16, Span(7, 0))
    assert found.tensors.keys() == {"score.weight", *LLAMA_WEIGHTS} - {"lm_head.weight"}
    assert {name: file.names for name, file in found.files.items()} == {
        "f0": ("model.embed_tokens.weight",),
        "f1": ("model.layers.0.mlp.up_proj.weight", "score.weight"),
    }
    assert found.task.rewritten == {"f0", "f1"}


def test_a_file_whose_tensors_stay_is_not_written_again() -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight")
    found = with_task_head(base(names, shards=3), adapter({"score.weight": (3, 4)}, "SEQ_CLS"))
    assert found.task is not None
    assert found.task.rewritten == {"f1", "f2"}  # the one of lm_head, and the last, which takes the new head


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_bare_model_is_called_as_the_class_calls_it(prefix: str) -> None:
    names = tuple(name.replace("bert.", prefix) for name in BERT_WEIGHTS)
    head = {"classifier.weight": (2, 4), "classifier.bias": (2,)}
    found = with_task_head(base(names, BERT), adapter(head, "TOKEN_CLS"))
    assert found.tensors.keys() == {*head, *BERT_WEIGHTS} - {"cls.bias"}
    assert {found.tensors[name].dtype for name in head} == {DType.BF16}  # as most of the base; its bias is F32
    assert found.task is not None
    assert found.task.renamed == ({} if prefix else {name: f"bert.{name}" for name in names if name != "cls.bias"})


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (("layers.0.mlp.up_proj.weight",), LLAMA),  # no embedding says where the model is
        (("a.embed_tokens.weight", "b.embed_tokens.weight"), LLAMA),  # two do
        (("xembed_tokens.weight",), LLAMA),
        (LLAMA_WEIGHTS, {**LLAMA, "model_type": "of-nobody"}),
        (LLAMA_WEIGHTS, {}),
    ],
)
def test_a_base_that_is_not_clear_stays_as_it_is(names: tuple[str, ...], config: dict[str, Any]) -> None:
    plain = base(names, config)
    assert with_task_head(plain, adapter({"score.weight": (3, 4)}, "SEQ_CLS")) is plain


def test_of_two_places_the_one_that_the_class_has_is_taken() -> None:
    names = (*LLAMA_WEIGHTS, "draft.embed_tokens.weight")
    found = with_task_head(base(names), adapter({"score.weight": (3, 4)}, "SEQ_CLS"))
    assert found.task is not None
    assert sorted(found.task.dropped) == ["draft.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("task", "rows", "config", "labels"),
    [
        ("SEQ_CLS", 3, {}, 3),
        ("SEQ_CLS", 1, {}, 1),
        ("SEQ_CLS", 2, {}, None),  # two are what transformers takes for granted
        ("SEQ_CLS", 3, {"id2label": {"0": "a", "1": "b", "2": "c"}}, None),
        ("SEQ_CLS", 2, {"id2label": {"0": "a", "1": "b", "2": "c"}}, 2),
        ("SEQ_CLS", 3, {"num_labels": 2}, 3),
    ],
)
def test_the_config_gets_as_many_labels_as_the_head_has(
    task: str, rows: int, config: dict[str, Any], labels: int | None
) -> None:
    found = with_task_head(base(config={**LLAMA, **config}), adapter({"score.weight": (rows, 4)}, task))
    assert found.task is not None
    wanted: dict[str, Any] = {"architectures": [SEQ]}
    if labels is not None:
        wanted["id2label"] = {str(n): f"LABEL_{n}" for n in range(labels)}
        wanted["label2id"] = {f"LABEL_{n}": n for n in range(labels)}
        wanted |= {"num_labels": labels} if "num_labels" in config else {}
    assert found.task.config == wanted


def test_a_head_whose_parts_disagree_says_nothing_of_labels() -> None:
    head = {"score.weight": (3, 4), "score.bias": (5,)}
    found = with_task_head(base(), adapter(head, "TOKEN_CLS"))
    assert found.task is not None
    assert found.task.config == {"architectures": [TOKEN]}


def test_answers_to_questions_have_no_labels() -> None:
    head = {"qa_outputs.weight": (2, 4), "qa_outputs.bias": (2,)}
    found = with_task_head(base(BERT_WEIGHTS, {**BERT, "id2label": {"0": "x"}}), adapter(head, "QUESTION_ANS"))
    assert found.task is not None
    assert found.task.config == {"architectures": ["BertForQuestionAnswering"]}


POOLER = "bert.pooler.dense.weight"


@pytest.mark.parametrize(
    ("weight", "found_base", "brought", "told"),
    [
        (
            "score.weight",
            base(),
            adapter({"score.weight": (3, 4), "score.bias": (3,)}, "QUESTION_ANS"),
            "name the task",
        ),
        ("score.bias", base(), adapter({"score.bias": (3,)}), f"task=, TOKEN_CLS ({TOKEN})"),
        (
            "classifier.weight",
            base(BERT_WEIGHTS, BERT),
            adapter({"classifier.weight": (2, 4)}, "SEQ_CLS"),
            "BertForSequenceClassification also needs bert.pooler.dense.bias",
        ),
        (
            "score.weight",
            base(("layers.0.mlp.up_proj.weight",)),
            adapter({"score.weight": (3, 4)}, "SEQ_CLS"),
            f"the head of {SEQ}, but this base does not contain the bare model",
        ),
        ("score.weight", base(config={"model_type": "x"}), adapter({"score.weight": (3, 4)}), 'model_type "x"'),
        ("qa_outputs.bias", base(config={}), adapter({"qa_outputs.bias": (3,)}), "a base without model_type"),
        ("classifier.w", base(config={}), adapter({"classifier.w": (3,)}), "no class with such a head"),
        ("classification_head.w", base(config={}), adapter({"classification_head.w": (3,)}), "no class"),
        ("my.score.weight", base(config={}), adapter({"my.score.weight": (3, 4)}), ""),
        ("scores.weight", base(config={}), adapter({"scores.weight": (3, 4)}), ""),
        ("absent.weight", base(), adapter({"score.weight": (3, 4)}), ""),
    ],
)
def test_why_a_head_was_not_taken_for_one(weight: str, found_base: Checkpoint, brought: Adapter, told: str) -> None:
    message = why_headless(weight, found_base, brought)
    assert told in message
    assert bool(told) is bool(message)


def test_nothing_is_said_of_a_base_that_has_its_head() -> None:
    brought = adapter({"score.weight": (3, 4)}, "SEQ_CLS")
    assert why_headless("score.weight", with_task_head(base(), brought), brought) == ""
