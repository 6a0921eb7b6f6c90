"""The verbs between models and adapters: one function a module, named like it, returning a Report."""

__all__ = ["ablate", "extract", "init", "unmerge"]
