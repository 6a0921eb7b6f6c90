"""What things are: frozen data about adapters, bundles and checkpoints. No I/O."""

__all__ = [
    "adapter",
    "assumptions",
    "binding",
    "blueprints",
    "bundle",
    "checkpoint",
    "floats",
    "format_files",
    "patterns",
    "results",
    "summary",
    "tensors",
    "unpaired",
    "updates",
]
