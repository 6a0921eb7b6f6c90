"""The commands that make adapters of adapters."""

__all__ = ["combine", "pick", "resize", "scale", "shared"]
