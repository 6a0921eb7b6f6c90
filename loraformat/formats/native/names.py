"""File names of the native format, and how its tensors are called."""

from __future__ import annotations

CONFIG = "lora_config.json"
WEIGHTS = {"safetensors": "lora_weights.safetensors", "torch": "lora_weights.pt"}
TABLES = {"safetensors": "embedding_weights.safetensors", "torch": "embedding_weights.pt"}
OWN_FILES = (CONFIG, *WEIGHTS.values(), *TABLES.values())

MAX_NAME = 1_024

FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude")
WHOLE = ("replacement", "difference", "rows")


def is_valid(name: str) -> bool:
    """Whether a tensor name keeps to N17: 1 to 1,024 characters, at least two components, none of them empty."""
    components = name.split(".")
    return len(name) <= MAX_NAME and len(components) > 1 and all(components)


def split(name: str) -> tuple[str, str]:
    """(what it belongs to, part): a module path and one of FACTORS, or a weight's name and one of WHOLE.

    Other names come back whole, with the part "".
    """
    owner, _, part = name.rpartition(".")
    return (owner, part) if owner and part in (*FACTORS, *WHOLE) else (name, "")
