"""The verbs that make adapters from adapters: one function a module, named like it, returning a Report."""

__all__ = [
    "combine",
    "compatible",
    "factoring",
    "methods",
    "options",
    "other_tuners",
    "output",
    "pick",
    "resize",
    "scale",
    "selection",
    "sizes",
    "sources",
]
