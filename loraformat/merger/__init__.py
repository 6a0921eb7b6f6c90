"""Base and adapters to a merged checkpoint: planned from headers, executed in windows."""

from loraformat.merger.build import plan_merge
from loraformat.merger.copies import Inputs
from loraformat.merger.execute import Limits, write_shard
from loraformat.merger.folder import file_names, weight_nbytes, write_others
from loraformat.merger.notes import findings_of
from loraformat.merger.plan import AdapterSource, MergePlan, ShardPlan
from loraformat.merger.stack import repeated

__all__ = [
    "AdapterSource",
    "Inputs",
    "Limits",
    "MergePlan",
    "ShardPlan",
    "file_names",
    "findings_of",
    "plan_merge",
    "repeated",
    "weight_nbytes",
    "write_others",
    "write_shard",
]
