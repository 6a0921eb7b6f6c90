"""Files of this machine: read, written whole or not at all."""

__all__ = ["folders", "interrupts", "spool", "staging", "store", "targets", "through"]
