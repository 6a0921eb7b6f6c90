"""The head of a task that an adapter brings and its base lacks: the base as the task's class has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.model.adapter import Adapter, module_of
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import BaseWeight, Checkpoint, StoredTensor, TaskHead
from loraformat.model.tensors import DType, Span
from loraformat.model.updates import Replace
from loraformat.naming import TASKS, TaskClass, spelling_of, task_classes

if TYPE_CHECKING:
    from loraformat.model.tensors import Values


def with_task_head(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base as the class has it that the adapter was trained on, where the adapter brings that class's head.

    The head stands in it with no rows, which the adapter's tensors then replace; the head of the base's own class is
    left out, and the bare model below is called as the class calls it. A base that has the head, or of which not all is
    known that the class needs, comes back as it is.

    Source: peft 0.21.2, peft_model.py `PeftModelForSequenceClassification`; transformers 5.23.0, `save_pretrained` of
    the merged model.
    """
    brought = _brought(base, adapter)
    chosen = _class_of(brought, base, adapter)
    if base.task is not None or chosen is None:
        return base
    names = _names_in(chosen, base)
    if names is None or _missing(chosen, brought, names):
        return base
    return _rebuilt(base, chosen, names, brought)


def why_headless(weight: str, base: Checkpoint, adapter: Adapter) -> str:
    """Why a weight of a head that the base lacks was not taken for one; "" for a weight that is none."""
    if base.task is not None or not any(isinstance(update, Replace) for update in adapter.updates.get(weight, ())):
        return ""
    brought = _brought(base, adapter)
    fitting = [one for one in _fitting(brought, base) if weight in (*one.head, *one.pooler)]
    if not fitting:
        return _of_unknown_class(weight, base)
    chosen = _class_of(brought, base, adapter)
    if chosen is None:
        choice = " or ".join(f"{one.task} ({one.name})" for one in fitting)
        return f"it is a task head: name the task with --assume task=, {choice}"
    names = _names_in(chosen, base)
    missing = None if names is None else _missing(chosen, brought, names)
    if missing:
        return f"{chosen.name} also needs {missing[0]}, which is neither in the base nor in the adapter"
    return f"it is the head of {chosen.name}, but this base does not contain the bare model"


_HEAD_MODULES = ("score", "classifier", "qa_outputs", "classification_head")


def _of_unknown_class(weight: str, base: Checkpoint) -> str:
    if weight.split(".", maxsplit=1)[0] not in _HEAD_MODULES:
        return ""
    model_type = base.config.get("model_type")
    what = f'the model_type "{model_type}"' if isinstance(model_type, str) else "a base without model_type"
    return f"it is a task head, but no class with such a head is known for {what}"


def _brought(base: Checkpoint, adapter: Adapter) -> Mapping[str, Replace]:
    """The whole weights of an adapter that its base lacks."""
    chains = ((weight, chain[0]) for weight, chain in adapter.updates.items() if chain and weight not in base.tensors)
    return {weight: first for weight, first in chains if isinstance(first, Replace) and first.shape}


def _fitting(brought: Mapping[str, Replace], base: Checkpoint) -> list[TaskClass]:
    if not brought:
        return []
    return [one for one in task_classes(base.config) if any(weight in one.head for weight in brought)]


def _class_of(brought: Mapping[str, Replace], base: Checkpoint, adapter: Adapter) -> TaskClass | None:
    """The one class that the adapter can have been trained on, by what it states and by the names of the head."""
    fitting = _fitting(brought, base)
    mapping = adapter.config.raw.get("auto_mapping")
    stated = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    named = [one for one in fitting if one.name == stated]
    if adapter.config.task in TASKS:
        named = [one for one in fitting if one.task == adapter.config.task]
    elif not named:
        named = _whole(fitting, brought)
    return named[0] if len(named) == 1 else None


def _whole(fitting: list[TaskClass], brought: Mapping[str, Replace]) -> list[TaskClass]:
    """The classes whose head is what the adapter brings, all of it and no more."""
    return [one for one in fitting if set(one.head) == brought.keys() & {w for each in fitting for w in each.head}]


def _names_in(chosen: TaskClass, base: Checkpoint) -> dict[str, str] | None:
    """Stored name → its name in a checkpoint of the class, for all that the class has; None where that is not clear."""
    spelling = spelling_of(base.config)
    memory = {name: spelling.in_memory(name).names[0] for name in base.tensors}
    wanted = f"{chosen.prefix}."
    ends = [name.removesuffix(chosen.embedding) for name in memory.values() if name.endswith(chosen.embedding)]
    before = {start for start in ends if not start or start.endswith(".")} if chosen.embedding else set()
    if wanted in before:
        before = {wanted}
    if len(before) != 1:
        return None
    (prefix,) = before
    inside = {
        name: known
        for name, known in memory.items()
        if known.startswith(prefix) and known[len(prefix) :].split(".")[0] in chosen.parts
    }
    own = {name: name for name, known in memory.items() if known in chosen.head}
    if prefix == wanted:
        return {**{name: name for name in inside}, **own}
    if any(name != known for name, known in inside.items()):
        return None
    return {**{name: wanted + name[len(prefix) :] for name in inside}, **own}


def _missing(chosen: TaskClass, brought: Mapping[str, Replace], names: Mapping[str, str]) -> list[str]:
    """Weights of the head and of a pooler that nobody has; a module that is brought is brought whole."""
    there = {module_of(name) for name in (*brought, *names.values())}
    return [name for name in (*chosen.head, *chosen.pooler) if module_of(name) not in there]


def _rebuilt(
    base: Checkpoint, chosen: TaskClass, names: Mapping[str, str], brought: Mapping[str, Replace]
) -> Checkpoint:
    home = list(base.files)[-1]
    dtype = _dtype_of(base)
    head = [name for name in brought if name in (*chosen.head, *chosen.pooler)]
    new = {
        name: StoredTensor(home, dtype, (0, *brought[name].shape[1:]), Span(base.files[home].data_start, 0))
        for name in head
    }
    files = {}
    for name, file in base.files.items():
        kept = tuple(names[old] for old in file.names if old in names)
        files[name] = replace(file, names=(*kept, *(head if name == home else ())))
    renamed = {old: kept for old, kept in names.items() if old != kept}
    return replace(
        base,
        files=files,
        tensors={**{names[old]: stored for old, stored in base.tensors.items() if old in names}, **new},
        weights={
            **{names[old]: replace(base.weights[old], name=names[old]) for old in base.weights if old in names},
            **({name: _empty(name, stored) for name, stored in new.items()} if base.weights else {}),
        },
        config={**base.config, "architectures": [chosen.name]},
        task=TaskHead(
            name=chosen.name,
            head=tuple(head),
            dropped=tuple(old for old in base.tensors if old not in names),
            renamed=renamed,
            rewritten=frozenset(n for n, file in base.files.items() if files[n].names != file.names),
            config=_labels(base.config, chosen, brought),
        ),
    )


def _dtype_of(base: Checkpoint) -> DType:
    """The dtype that most floating tensors of a base have, in which transformers would keep the head too."""
    stored = (tensor for tensor in base.tensors.values() if tensor.dtype.is_floating and not tensor.encoded)
    counts = Counter(tensor.dtype for tensor in stored)
    return counts.most_common(1)[0][0] if counts else DType.F32


def _empty(name: str, stored: StoredTensor) -> BaseWeight:
    def nothing(start: int, stop: int, buffer: memoryview) -> None:
        assert start == stop == len(buffer) == 0

    def none(*rows: int) -> Values:
        raise AssertionError(f"{name} has no rows in the base, but rows {rows} were requested")

    weight = BaseWeight(
        name=name,
        parts=(stored,),
        shape=stored.shape,
        dtype=stored.dtype,
        read=none,
        read_into=nothing,
        as_matrix=lambda _: weight,
    )
    return weight


# The modules of heads whose rows are the labels.
_LABELS = ("score", "classifier", "out_proj", "logits_proj")
# Source: transformers 5.23.0, configuration_utils.py: two labels where config.json has no `id2label`.
_DEFAULT_LABELS = 2


def _labels(config: Mapping[str, Json], chosen: TaskClass, brought: Mapping[str, Replace]) -> dict[str, Json]:
    """What config.json says about the labels, so that the class makes a head of the adapter's shape."""
    changes: dict[str, Json] = {"architectures": [chosen.name]}
    rows = {
        update.shape[0]
        for name, update in brought.items()
        if name in chosen.head and module_of(name).rpartition(".")[2] in _LABELS
    }
    known = config.get("id2label")
    count = len(known) if isinstance(known, Mapping) else _DEFAULT_LABELS
    if chosen.task == "QUESTION_ANS" or len(rows) != 1 or rows == {count}:
        return changes
    (count,) = rows
    changes["id2label"] = {str(number): f"LABEL_{number}" for number in range(count)}
    changes["label2id"] = {f"LABEL_{number}": number for number in range(count)}
    if "num_labels" in config:
        changes["num_labels"] = count
    return changes
