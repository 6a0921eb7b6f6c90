"""Functions of numbers and of matrices, made of products, sums and elementwise operations in a fixed order."""

from loraformat.arithmetic.functions.elementary import cos_and_sin, exp
from loraformat.arithmetic.functions.factorizations import orthonormal, solved

__all__ = ["cos_and_sin", "exp", "orthonormal", "solved"]
