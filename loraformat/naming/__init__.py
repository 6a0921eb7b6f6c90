"""How other projects spell a weight: tables and string functions, no tensors."""

from loraformat.naming.config_levels import levels_of
from loraformat.naming.litgpt import Family, family_of
from loraformat.naming.tasks import TASKS, TaskClass, task_classes
from loraformat.naming.ties import architecture_of, parts_cleanly, scales_if_tied, tied_names
from loraformat.naming.transformers import Spelled, Spelling, spelling_of

__all__ = [
    "TASKS",
    "Family",
    "Spelled",
    "Spelling",
    "TaskClass",
    "architecture_of",
    "families",
    "family_of",
    "levels_of",
    "parts_cleanly",
    "scales_if_tied",
    "spelling_of",
    "task_classes",
    "tied_names",
]
