"""Rows of one tensor of the output, exactly."""

__all__ = ["apply", "computer", "kinds", "prepared", "retention", "windows"]
