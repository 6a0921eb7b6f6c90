"""The verbs: one function a module, named like it, returning a Report."""
