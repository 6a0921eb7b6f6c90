"""The inputs of the verbs: paths, strengths, project settings."""

__all__ = ["discovery", "line_numbers", "made_by", "settings", "strength", "subject", "tensor_names"]
