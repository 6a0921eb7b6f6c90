"""The commands that make adapters of adapters or of models."""

__all__ = ["ablate", "combine", "extract", "init", "pick", "resize", "scale", "shared", "unmerge"]
