"""The commands, one module each, named like it."""

__all__: list[str] = []
