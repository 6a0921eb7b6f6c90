"""Tuners of PEFT whose modules share matrices or vectors."""
