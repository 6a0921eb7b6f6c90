"""Tuners of PEFT that multiply the weight: scaling, rotations, changes of basis."""

__all__: list[str] = []
