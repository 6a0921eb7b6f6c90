"""What will be done, as data, from headers and configs alone."""
