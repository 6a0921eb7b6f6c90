"""Regular expressions out of configs, matched in linear time."""
