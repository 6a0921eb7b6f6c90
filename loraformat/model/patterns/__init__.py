"""Regular expressions from configs, matched in linear time."""

__all__ = ["keys", "matching"]
