"""The commands, one module each, named like it; `version` is in `help`."""

__all__: list[str] = []
