"""Arithmetic on the weights of models. Pure: a weight is anything that gives rows of values."""

__all__ = ["difference", "directions", "first_factors"]
