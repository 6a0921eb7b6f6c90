"""The commands that make adapters from adapters or from models."""

__all__ = ["ablate", "combine", "extract", "init", "pick", "resize", "scale", "shared", "unmerge"]
