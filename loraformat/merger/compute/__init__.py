"""Rows of one tensor of the output, exactly."""

__all__ = ["apply", "computer", "kernel", "kinds", "prepared", "retention", "windows"]
