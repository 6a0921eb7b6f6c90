"""Rows of one tensor of the output, exactly."""
