"""The classes of transformers with a task head: the name of the head, and of the model below it.

Source: transformers 5.23.0, models/auto/modeling_auto.py; the table is made by tests/derive_tasks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraformat.naming.tables import table

_TABLE = "transformers_tasks.json"

# In PEFT's words, as `task_type` states them.
TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True, slots=True)
class TaskClass:
    """A class with the head of a task.

    Attributes:
        task: "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS".
        name: of the class: "LlamaForSequenceClassification".
        prefix: where the bare model is in it: "model".
        parts: the first components of names in the bare model: "embed_tokens", "layers", "norm".
        embedding: the input embedding of the bare model, below `prefix`; "" where the class has none.
        head: the weights beside the bare model.
        pooler: weights of a pooler in the bare model, which checkpoints of other classes may lack.
    """

    task: str
    name: str
    prefix: str
    parts: tuple[str, ...]
    embedding: str
    head: tuple[str, ...]
    pooler: tuple[str, ...]


def task_classes(config: Mapping[str, Any]) -> tuple[TaskClass, ...]:
    """The classes with a head for the `model_type` of a config.json; () where none is known."""
    found = table(_TABLE)["tasks"]
    entries = ((task, found.get(f"{config.get('model_type')} {task}")) for task in TASKS)
    return tuple(
        TaskClass(
            task=task,
            name=entry["class"],
            prefix=entry["prefix"],
            parts=tuple(entry["parts"]),
            embedding=entry["embedding"],
            head=tuple(entry["head"]),
            pooler=tuple(entry["pooler"]),
        )
        for task, entry in entries
        if entry is not None
    )
