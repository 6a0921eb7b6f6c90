"""Weights that were quantized again, read back from the output and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from loraformat.containers.quantized.recoding import decoded_rows, rows_together, strayed
from loraformat.errors import MergeError
from loraformat.merger.verify.reference import Computed
from loraformat.model.checkpoint import Quantized

_BLOCK_NBYTES = 4 << 20


def recoded_checks(computed: Computed, written: Quantized, rows: list[int] | None) -> Iterator[Callable[[], None]]:
    """Comparisons of one weight, each of some of its rows.

    Args:
        written: the output, read as a base.
        rows: those that a sample is made of; None for all.

    Raises: MergeError (LF801), when they are made: a value is not what its code means.
    """
    expected = computed.expected
    weight = written.weights[expected.name]
    height, width = expected.matrix
    lines = max(1, width // weight.shape[-1])
    together = rows_together(weight)
    unit = math.lcm(computed.unit, together // math.gcd(together, lines))
    if rows is not None:
        starts = {row // unit * unit for row in rows}
        size = unit
    else:
        size = max(1, _BLOCK_NBYTES // (8 * width) // unit) * unit
        starts = set(range(0, height, size))

    def check(start: int) -> None:
        import numpy as np

        stop = min(height, start + size)
        base, exact = computed.rows(start, stop)
        slack = np.broadcast_to(np.asarray(computed.slack(start, stop), np.float64), exact.shape)
        base, exact, slack = (each.reshape(-1, weight.shape[-1]) for each in (base, exact, slack))
        if np.array_equal(base, exact) and np.array_equal(
            base, decoded_rows(written, expected.name, start * lines, len(base))
        ):
            return
        found = strayed(written, expected.name, exact, start * lines, slack)
        if found is not None:
            row, column, value = found
            wanted = float(exact[row - start * lines, column])
            raise MergeError(
                f"{expected.name}: row {row}, column {column} means {value!r} in the file, but the independent "
                "computation gives "
                f"{wanted!r} before quantization",
                where=written.stored.tensors[weight.parts[0]].file,
                hint="the disk or the memory of this machine may be faulty; otherwise please report a bug in "
                "loraformat",
            )

    for start in sorted(starts):
        yield lambda start=start: check(start)  # type: ignore[misc]
