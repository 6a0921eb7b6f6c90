"""Files of this machine: read, written whole or not at all."""

__all__ = ["folders", "spool", "staging", "store", "targets", "through"]
