"""Rows of one tensor of the output, exactly."""

__all__ = ["apply", "combination", "computer", "kinds", "prepared", "retention", "windows"]
