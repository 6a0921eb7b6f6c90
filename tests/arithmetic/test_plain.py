"""Without a compiled loop: whatever the library of matrix products does, the bytes are the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from arithmetic.cases import LOOPS

WINDOWS = """
import hashlib
import numpy as np
from loraformat import arithmetic
from loraformat.model.tensors import DType
rng, found, proposed = np.random.default_rng(0), hashlib.sha256(), hashlib.sha256()
with np.errstate(all="ignore"):
    for dtype in (DType.BF16, DType.F16, DType.F32):
        for rank in (1, 16, 64, 200):
            rows, cols = 70, 300
            bits = arithmetic.rounded_bits(rng.standard_normal((rows, cols)) * 0.02, dtype)
            packed = arithmetic.pack(rng.standard_normal((rows, rank)), rng.standard_normal((rank, cols)) * 0.1)
            written = np.zeros_like(bits)
            arithmetic.window(packed, 0, rows, bits.data.cast("B"), dtype, written.data.cast("B"), dtype)
            found.update(written.tobytes() + arithmetic.product(packed, 0, 3).tobytes())
            proposed.update((packed.left @ packed.right_matrix()).tobytes())
print(found.hexdigest(), proposed.hexdigest())
"""


def digests(**environment: str) -> tuple[str, str]:
    """(of what is written, of what the library's products are) in a process of its own."""

    done = subprocess.run(
        [sys.executable, "-c", WINDOWS], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    written, proposed = done.stdout.split()
    return written, proposed


@pytest.fixture(scope="module")
def wanted() -> str:
    return digests(LORAFORMAT_LOOP=LOOPS[0])[0]


def test_other_products_of_the_library_give_the_same_bytes(wanted: str) -> None:
    """OpenBLAS has other code for other processors; numpy's own wheels hold all of it."""
    tried = [
        digests(LORAFORMAT_LOOP="numpy", OPENBLAS_CORETYPE=processor, OPENBLAS_NUM_THREADS=threads)
        for processor, threads in (("Haswell", "1"), ("Prescott", "2"), ("Sandybridge", "1"))
    ]
    assert {written for written, _ in tried} == {wanted}
    if len({proposed for _, proposed in tried}) == 1:
        pytest.skip("numpy's library here takes no notice of OPENBLAS_CORETYPE")
