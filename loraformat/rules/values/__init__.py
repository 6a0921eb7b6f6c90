"""Family 4: the values themselves (`--deep`)."""
