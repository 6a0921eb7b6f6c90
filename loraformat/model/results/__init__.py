"""What the verbs find out, as data: all that a renderer knows."""
