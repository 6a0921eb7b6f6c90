"""The table of classes with a task's head against the installed transformers."""

from __future__ import annotations

import json

import derive_tasks
import pytest
from pins import CONSTRAINTS, PYTHONS, skip_unless_installed, versions

from loraformat.naming import TASKS, task_classes

SAMPLES = [
    ("llama", "LlamaForSequenceClassification"),
    ("bert", "BertForTokenClassification"),
    ("t5", "T5ForSequenceClassification"),
    ("distilbert", "DistilBertForQuestionAnswering"),
]


def test_the_table_is_of_the_transformers_that_the_suite_installs() -> None:
    """Else the comparison below would be skipped by everybody: the newest Python has the newest version."""
    table = json.loads(derive_tasks.TABLE.read_text(encoding="utf-8"))
    assert versions(CONSTRAINTS, PYTHONS[-1])["transformers"] == [table["transformers"]]


@pytest.mark.parametrize(("model_type", "name"), SAMPLES)
def test_a_class_has_the_head_that_the_table_says(model_type: str, name: str) -> None:
    table = json.loads(derive_tasks.TABLE.read_text(encoding="utf-8"))
    skip_unless_installed("transformers", table["transformers"])
    (found,) = [one for one in task_classes({"model_type": model_type}) if one.name == name]
    assert table["tasks"][f"{model_type} {found.task}"] == derive_tasks.described(model_type, name)


@pytest.mark.parametrize("config", [{}, {"model_type": "somebodys"}, {"model_type": 5}])
def test_a_model_that_is_not_known_has_no_classes(config: dict[str, object]) -> None:
    assert task_classes(config) == ()


def test_tasks_are_called_as_peft_calls_them() -> None:
    import peft

    assert set(TASKS) <= {task.value for task in peft.TaskType}
