"""What the verbs are given: paths, strengths, settings of a project."""

__all__ = ["discovery", "line_numbers", "made_by", "settings", "strength", "subject", "tensor_names"]
