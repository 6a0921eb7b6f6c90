"""Tuners of PEFT whose modules share matrices or vectors."""

__all__: list[str] = []
