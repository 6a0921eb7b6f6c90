"""Rows of one tensor of the output, exactly."""

__all__ = ["apply", "computer", "kinds", "preimages", "prepared", "retention", "windows"]
