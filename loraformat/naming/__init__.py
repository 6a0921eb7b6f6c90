"""How other projects spell a weight: tables and string functions, no tensors."""

from loraformat.naming.config_levels import levels_of
from loraformat.naming.heads import Heads, heads_of
from loraformat.naming.litgpt import Family, family_of
from loraformat.naming.llama_cpp import (
    LlamaCppModel,
    known_classes,
    model_of_config,
    model_of_settings,
    source_row,
)
from loraformat.naming.tasks import TASKS, TaskClass, task_classes
from loraformat.naming.ties import architecture_of, parts_cleanly, scales_if_tied, tied_names
from loraformat.naming.transformers import Spelled, Spelling, spelling_of

__all__ = [
    "TASKS",
    "Family",
    "Heads",
    "LlamaCppModel",
    "Spelled",
    "Spelling",
    "TaskClass",
    "architecture_of",
    "families",
    "family_of",
    "heads_of",
    "known_classes",
    "levels_of",
    "llama_cpp",
    "model_of_config",
    "model_of_settings",
    "parts_cleanly",
    "scales_if_tied",
    "source_row",
    "spelling_of",
    "task_classes",
    "tied_names",
]
