"""Reports for CI services, editors and hooks."""
