"""The commands that make adapters of adapters or of models."""

__all__ = ["combine", "extract", "pick", "resize", "scale", "shared", "unmerge"]
