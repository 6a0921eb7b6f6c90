"""What the verbs are given: paths, strengths, settings of a project."""
