"""Rows of one tensor of the output, exactly."""

__all__ = ["apply", "combination", "computer", "kinds", "preimages", "prepared", "retention", "windows"]
