"""merge and dequantize: into one model, or into the components of a pipeline."""

from loraformat.jobs.merge.verbs import DEFAULT_MEMORY_NBYTES, dequantize, merge

__all__ = ["DEFAULT_MEMORY_NBYTES", "dequantize", "distribution", "merge", "prepare"]
