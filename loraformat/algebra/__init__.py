"""Arithmetic on updates: norms and inner products from the factors. Knows no files."""
