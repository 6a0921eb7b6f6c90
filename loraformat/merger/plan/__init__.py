"""What will be done, as data, from headers and configs alone."""

__all__ = ["data", "edits", "findings", "layer_replication", "notes", "planner", "serialized"]
