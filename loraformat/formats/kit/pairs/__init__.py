"""Pairs of factors in the state dicts of hand-written code: what all formats of that kind share. No format itself."""

__all__ = ["read", "spelling", "torchtune_file"]
