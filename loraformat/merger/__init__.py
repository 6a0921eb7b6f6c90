"""Base and adapters to a merged checkpoint: planned from headers, executed in windows."""

from loraformat.merger.build import plan_merge
from loraformat.merger.copies import Inputs
from loraformat.merger.execute import Written, write_weights
from loraformat.merger.folder import file_names, weight_nbytes, write_others
from loraformat.merger.notes import findings_of
from loraformat.merger.plan import AdapterSource, Arithmetic, MergePlan, ShardPlan
from loraformat.merger.preview import Opened, Preview, previews_of
from loraformat.merger.retention import retentions, rounding_findings, total_share
from loraformat.merger.run import Source, Trust, permissions_of, run_merge, source_of
from loraformat.merger.stack import as_written
from loraformat.merger.windows import Limits

__all__ = [
    "AdapterSource",
    "Arithmetic",
    "Inputs",
    "Limits",
    "MergePlan",
    "Opened",
    "Preview",
    "ShardPlan",
    "Source",
    "Trust",
    "Written",
    "as_written",
    "file_names",
    "findings_of",
    "permissions_of",
    "plan_merge",
    "previews_of",
    "retentions",
    "rounding_findings",
    "run_merge",
    "source_of",
    "total_share",
    "weight_nbytes",
    "write_others",
    "write_weights",
]
