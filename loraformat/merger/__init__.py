"""Base and adapters to a merged checkpoint: planned from headers, executed in windows."""

from loraformat import arithmetic as kernel  # under the name by which it is checked from outside
from loraformat.merger.compute.combination import METHODS as COMBINATIONS
from loraformat.merger.compute.preimages import Likeness, Preimages, Repetition, Reversal
from loraformat.merger.compute.retention import (
    retentions,
    rounding_findings,
    total_base_change,
    total_code_error,
    total_share,
)
from loraformat.merger.compute.windows import Resources
from loraformat.merger.dense_delta import delta
from loraformat.merger.inputs import Inputs, base_names, fingerprints_of, open_inputs
from loraformat.merger.kinds import check_combination, check_kinds
from loraformat.merger.plan.data import AdapterSource, Arithmetic, MergePlan, ShardPlan
from loraformat.merger.plan.layer_replication import as_written
from loraformat.merger.plan.notes import findings_of
from loraformat.merger.plan.planner import plan_merge
from loraformat.merger.preview import Opened, Preview, Survey, previews_of
from loraformat.merger.write.file_tasks import FileEngine, FileTask, Receipt, TaskFiles, execute, tasks_of
from loraformat.merger.write.other_files import file_names, weight_nbytes, write_others
from loraformat.merger.write.receipts import Facts, differences, facts_in, word_of
from loraformat.merger.write.run import Source, Trust, permissions_of, run_merge, source_of
from loraformat.merger.write.shares import Share, divided, facts_of_merge, finish_merge, run_share, shares_of, sizes_of
from loraformat.merger.write.weights import Written, write_weights

__all__ = [
    "COMBINATIONS",
    "AdapterSource",
    "Arithmetic",
    "Facts",
    "FileEngine",
    "FileTask",
    "Inputs",
    "Likeness",
    "MergePlan",
    "Opened",
    "Preimages",
    "Preview",
    "Receipt",
    "Repetition",
    "Resources",
    "Reversal",
    "ShardPlan",
    "Share",
    "Source",
    "Survey",
    "TaskFiles",
    "Trust",
    "Written",
    "as_written",
    "base_names",
    "check_combination",
    "check_kinds",
    "delta",
    "differences",
    "divided",
    "execute",
    "facts_in",
    "facts_of_merge",
    "file_names",
    "findings_of",
    "fingerprints_of",
    "finish_merge",
    "kernel",
    "open_inputs",
    "permissions_of",
    "plan",
    "plan_merge",
    "previews_of",
    "retentions",
    "rounding_findings",
    "run_merge",
    "run_share",
    "shares_of",
    "sizes_of",
    "source_of",
    "tasks_of",
    "total_base_change",
    "total_code_error",
    "total_share",
    "weight_nbytes",
    "word_of",
    "write",
    "write_others",
    "write_weights",
]
