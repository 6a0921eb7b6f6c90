"""Makes loraformat/naming/transformers_tasks.json from the classes of the installed transformers.

Run as a script it writes the file; tests/naming compares it with the installed version where that is the same.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import derive_names

TABLE = Path(__file__).parent.parent / "loraformat" / "naming" / "transformers_tasks.json"

# PEFT's task types whose classes have a head of their own → the table of transformers that names these classes.
TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


def tasks() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(model_type, task, what its class is called and has)."""
    from transformers.models.auto import modeling_auto

    for task, names in TASKS.items():
        for model_type, class_name in sorted(getattr(modeling_auto, names).items()):
            entry = described(model_type, class_name)
            if entry is not None:
                yield model_type, task, entry


def described(model_type: str, class_name: str) -> dict[str, Any] | None:
    import torch
    import transformers

    try:
        config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
        model_class = getattr(transformers, class_name)
        with torch.device("meta"):
            return names_of(model_class(derive_names.small(config_class())))
    except Exception as error:  # noqa: BLE001 - a class that cannot be made without files or other packages has no entry
        print(f"{class_name}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
        return None


def names_of(instance: Any) -> dict[str, Any] | None:
    """The class, its path to the bare model and what that is made of, the weights beside it, and those of a pooler."""
    prefix = instance.base_model_prefix
    names = [name for name, _ in instance.named_parameters()]
    inside = [name for name in names if name.startswith(f"{prefix}.")]
    if not inside:
        return None
    own = [name for name in names if not name.startswith(f"{prefix}.")]
    pooler = [name for name in inside if ".pooler." in name]
    table = instance.get_input_embeddings()
    embedding = next((name for name, value in instance.named_parameters() if value is getattr(table, "weight", 0)), "")
    return {
        "class": type(instance).__name__,
        "prefix": prefix,
        "parts": sorted({name.split(".")[1] for name in inside}),
        "embedding": embedding.removeprefix(f"{prefix}."),
        "head": sorted(own),
        "pooler": sorted(pooler),
    }


def dumped() -> str:
    """One line for each model and task."""
    import transformers

    lines = [f'"{model_type} {task}": {json.dumps(entry)}' for model_type, task, entry in sorted(tasks(), key=str)]
    return f'{{\n"transformers": "{transformers.__version__}",\n"tasks": {{\n' + ",\n".join(lines) + "\n}\n}\n"


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    TABLE.write_text(dumped(), encoding="utf-8")
