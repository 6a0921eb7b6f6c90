"""Products, sums and roundings in one fixed order: the same bytes on every machine."""

from loraformat.arithmetic.factors import Packed, pack
from loraformat.arithmetic.products import finish, multiply, product, takes, window
from loraformat.arithmetic.sums import column_squares, fold, row_squares
from loraformat.arithmetic.tally import TILE, Tally

__all__ = [
    "TILE",
    "Packed",
    "Tally",
    "column_squares",
    "finish",
    "fold",
    "multiply",
    "pack",
    "product",
    "row_squares",
    "takes",
    "window",
]
