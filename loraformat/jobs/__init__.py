"""The verbs: one function a module, named like it, returning a Report."""

__all__ = [
    "algebra",
    "card",
    "convert",
    "demo",
    "diff",
    "estimate",
    "explain",
    "formats",
    "inputs",
    "inspect",
    "merge",
    "plot",
    "stamp",
    "validate",
    "verify",
    "weights",
]
