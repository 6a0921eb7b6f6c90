"""Regular expressions out of configs, matched in linear time."""

__all__ = ["keys", "matching"]
