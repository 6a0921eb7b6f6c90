"""Regular expressions from configs, matched in linear time."""

from loraformat.model.patterns.matching import fullmatch

__all__ = ["fullmatch", "keys", "matching"]
