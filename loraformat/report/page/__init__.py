"""Reports as one page or one figure."""
