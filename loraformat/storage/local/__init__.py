"""Local files: read, and written completely or not at all."""

__all__ = ["folders", "interrupts", "spool", "staging", "store", "targets", "through"]
