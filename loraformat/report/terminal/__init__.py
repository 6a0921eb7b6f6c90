"""Reports for people at a terminal. rich is imported here."""

__all__ = ["text"]
