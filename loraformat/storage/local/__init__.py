"""Files of this machine: read, written whole or not at all."""

__all__ = ["folders", "staging", "store", "targets", "through"]
