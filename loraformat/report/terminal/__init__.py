"""Reports for people at a terminal. rich is imported here."""
