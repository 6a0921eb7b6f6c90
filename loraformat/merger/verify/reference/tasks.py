"""A base with the head of a task, by the names of the class alone.

Source: transformers 5.23.0, models/auto/modeling_auto.py; peft 0.21.2, peft_model.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from loraformat.errors import MergeError
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import Span
from loraformat.model.updates import Replace
from loraformat.naming import TaskClass, spelling_of, task_classes


def with_head(
    tensors: Mapping[str, StoredTensor], name: str, config: Mapping[str, Json], adapters: Iterable[Adapter]
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint of the class `name`: those below its bare model, and a head without rows.

    Raises: MergeError (LF801): no class of that name is known for the model.
    """
    one = next((one for one in task_classes(config) if one.name == name), None)
    if one is None:
        raise MergeError(f"{name}: no class of that name is known for this model", where="verify")
    memory = spelling_of({key: value for key, value in config.items() if key != "architectures"})
    found: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        new = _name_in(one, stored, memory.in_memory(stored).names[0])
        if new is not None:
            found[new] = tensor
    plain = (tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating and not tensor.encoded)
    like = Counter(plain).most_common(1)[0][0]
    file = next(iter(tensors.values())).file
    for adapter in adapters:
        for weight, chain in adapter.updates.items():
            if weight in (*one.head, *one.pooler) and weight not in found and isinstance(chain[0], Replace):
                found[weight] = StoredTensor(file, like, (0, *chain[0].shape[1:]), Span(0, 0))
    return found


def _name_in(one: TaskClass, stored: str, known: str) -> str | None:
    """What the class's checkpoints call a tensor; None for one that the class does not have."""
    first, _, rest = known.partition(".")
    second = rest.partition(".")[0]
    if known in one.head or (first == one.prefix and second in one.parts):
        return stored
    if first in one.parts:
        return f"{one.prefix}.{known}"
    return f"{one.prefix}.{rest}" if second in one.parts else None
