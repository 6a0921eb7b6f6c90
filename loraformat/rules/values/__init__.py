"""Family 4: the values themselves (`--deep`)."""

__all__ = ["oddities", "spectra", "stored"]
