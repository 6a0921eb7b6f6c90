"""What the verbs are given: paths, strengths, settings of a project."""

__all__ = ["discovery", "line_numbers", "settings", "strength", "subject", "tensor_names"]
