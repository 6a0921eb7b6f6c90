"""The arithmetic of a merge in a fixed order: the same bytes on every machine, with and without the compiled loop.

numpy's products, norms and sums compute no byte of a merge: their order depends on the processor, its threads and the
library. Its elementwise operations are those of IEEE 754, and may be used. Whoever merges calls

- `pack`, `product`, `multiply` for products in float64,
- `window` for W + left · right, rounded,
- `finish` for the rounding of what was computed step by step,
- `convert` for rounding alone,
- `codes` for codes of a few bits as numbers,
- `fold`, `row_squares`, `column_squares` for sums,
- `exp`, `cos_and_sin`, `solved`, `orthonormal` for what numpy takes from LAPACK and from libraries of the processor.
"""

from loraformat.arithmetic import codes
from loraformat.arithmetic.compiled import VARIABLE, Kernel, kernel, loop, open_kernel
from loraformat.arithmetic.factors import Packed, pack
from loraformat.arithmetic.functions import cos_and_sin, exp, orthonormal, solved
from loraformat.arithmetic.products import convert, finish, multiply, product, takes, window
from loraformat.arithmetic.rounding import rounded_bits
from loraformat.arithmetic.sums import column_squares, fold, row_squares
from loraformat.arithmetic.tally import TILE, Tally

__all__ = [
    "TILE",
    "VARIABLE",
    "Kernel",
    "Packed",
    "Tally",
    "codes",
    "column_squares",
    "convert",
    "cos_and_sin",
    "exp",
    "finish",
    "fold",
    "kernel",
    "loop",
    "multiply",
    "open_kernel",
    "orthonormal",
    "pack",
    "product",
    "rounded_bits",
    "row_squares",
    "solved",
    "takes",
    "window",
]
