"""Adapters of image and video models: one reader for all dialects, one writer of each.

A file is a point in five dimensions: the prefix of its names (which component), the naming (diffusers', the original's,
dotted or flattened), fused modules or split ones, the suffix (which tensor of the update) and where the scale stands.
"""

__all__ = ["canonical", "entries", "headers", "prefixes", "read", "resolve", "training", "write"]
