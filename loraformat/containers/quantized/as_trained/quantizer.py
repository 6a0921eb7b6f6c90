"""How bitsandbytes quantizes: its settings as text, its code books, and the arithmetic of one block.

Source: bitsandbytes 0.50.2, functional.py `quantize_4bit`, `create_dynamic_map`, backends/default/ops.py
`quantize_4bit`, `int8_vectorwise_quant`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING

from loraformat.containers.quantized.bitsandbytes import FP4_SIZES, INT8_STEP, NF4
from loraformat.errors import UsageError

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Singles: TypeAlias = NDArray[np.float32]

KINDS = ("nf4", "fp4", "int8")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
# Below it a block of zeros would be divided by zero.
_LEAST = 1e-38


@dataclass(frozen=True, slots=True)
class Quantizer:
    """The settings of bitsandbytes with which a model was loaded for training.

    >>> Quantizer.parse("nf4,double")
    Quantizer(kind='nf4', double=True, block=64, skip=(), experts=False)
    >>> str(Quantizer.parse("int8,skip=lm_head"))
    'int8,skip=lm_head'

    Attributes:
        kind: "nf4", "fp4" or "int8".
        double: whether scales are quantized too, `bnb_4bit_use_double_quant`.
        block: weights that share a scale.
        skip: `llm_int8_skip_modules`; () for the default, which is the head alone.
        experts: whether experts that are stored one by one are quantized, as transformers 4 does; transformers 5 keeps
            them in stacks, which bitsandbytes leaves alone.
    """

    kind: str
    double: bool = False
    block: int = 64
    skip: tuple[str, ...] = ()
    experts: bool = False

    @classmethod
    def parse(cls, text: str) -> Quantizer:
        """Settings out of "nf4,double,block=64,skip=lm_head,experts". Raises: UsageError (LF021)."""
        kind, *rest = text.split(",")
        if kind not in KINDS:
            raise _error(f"{kind!r:.40} is not a quantization of bitsandbytes, expected {', '.join(KINDS)}")
        found: dict[str, object] = {}
        skip: list[str] = []
        for word in rest:
            key, mark, value = word.partition("=")
            if word in ("double", "experts") and word not in found:
                found[word] = True
            elif key == "block" and value.isascii() and value.isdigit() and int(value) in BLOCKS and key not in found:
                found[key] = int(value)
            elif key == "skip" and mark and value:
                skip.append(value)
            else:
                sizes = ", ".join(map(str, BLOCKS))
                hint = f"expected double, block=N (N one of {sizes}), skip=MODULE or experts; only skip may repeat"
                raise _error(f"{word!r:.60} is not a setting", hint)
        if kind == "int8" and found.keys() & {"double", "block"}:
            raise _error("int8 has one scale per row, so double and block do not apply")
        return cls(kind, skip=tuple(skip), **found)  # type: ignore[arg-type]

    def __str__(self) -> str:
        flags = [one.name for one in fields(self) if getattr(self, one.name) is True]
        block = [f"block={self.block}"] if self.block != 64 else []
        return ",".join([self.kind, *flags, *block, *(f"skip={name}" for name in self.skip)])


def _error(text: str, hint: str = "") -> UsageError:
    return UsageError(text, where="--as-trained", hint=hint or "for example: --as-trained nf4,double")


@cache
def code_book(kind: str) -> Singles:
    """The numbers of the 16 codes of a type. Source: `get_4bit_type`."""
    import numpy as np

    found = np.array(NF4 if kind == "nf4" else (*FP4_SIZES, *(-size for size in FP4_SIZES)), np.float32)
    return np.asarray(found + np.float32(0), np.float32)  # the library has no -0


def scales_of(blocks: Singles) -> Singles:
    """The largest size of each row of a matrix."""
    import numpy as np

    return np.asarray(np.abs(blocks).max(axis=1, initial=0), np.float32)


def four_bits(blocks: Singles, scales: Singles, kind: str, *, is_cut: bool) -> tuple[NDArray[np.uint8], Singles]:
    """(place of each weight in the sorted code book, that code book): the number of middles that are below it.

    Args:
        blocks: (blocks, weights).
        scales: of each.
        is_cut: whether it is the rest of a weight, which the library divides by its scale; other blocks are multiplied
            by the inverse.
    """
    import numpy as np

    book = np.sort(code_book(kind))
    middles = (book[:-1] + book[1:]) / np.float32(2)
    least = np.maximum(scales, np.float32(_LEAST))[:, None]
    scaled = blocks / least if is_cut else blocks * (np.float32(1) / least)
    np.clip(scaled, -1, 1, out=scaled)
    places = np.zeros(blocks.shape, np.uint8)
    for middle in middles:
        places += scaled > middle
    return places, book


def eight_bits(rows: NDArray[np.float16]) -> tuple[Singles, Singles]:
    """(codes as numbers, scales) of rows in float16, to which the library converts a weight first."""
    import numpy as np

    single = rows.astype(np.float32)
    scales = scales_of(single)
    with np.errstate(all="ignore"):
        # torch divides a number by a tensor as its reciprocal times the number.
        codes = np.rint(single * (np.float32(1) / scales * np.float32(127))[:, None])
    codes[scales == 0] = 0
    return codes + np.float32(0), scales  # integers have no -0


def eight_bits_decoded(codes: Singles, scales: Singles) -> Singles:
    """(code · scale) · f32(1 / 127), each rounded to float32."""
    import numpy as np

    return np.asarray((codes * scales[:, None]) * np.float32(INT8_STEP), np.float32)


def doubly(scales: Singles) -> Singles:
    """Scales as they come back when they are quantized too, by `doubly_coded` with the library's own map."""
    return doubly_coded(scales, dynamic_map())[3]


def doubly_coded(scales: Singles, table: Singles) -> tuple[NDArray[np.uint8], Singles, np.float32, Singles]:
    """Scales quantized too, in blocks of 256 around their mean.

    The nearest number of the table is taken, as on CUDA; on the CPU the library takes it from a table of 2^16 steps,
    and where two are almost equally near it may be the other one. The mean is that of the exact sum; the library sums
    in float32, in an order that depends on the processor.

    Args:
        table: 256 numbers, rising.

    Returns: (code of each scale, scale of each block, mean, each scale as it is decoded).
    """
    import numpy as np

    offset = np.float32(math.fsum(scales.tolist()) / len(scales))
    padded = np.zeros(-(-len(scales) // NESTED_BLOCK) * NESTED_BLOCK, np.float32)
    padded[: len(scales)] = scales - offset
    blocks = padded.reshape(-1, NESTED_BLOCK)
    outer = scales_of(blocks)
    with np.errstate(all="ignore"):
        normed = np.where(outer[:, None] == 0, 0, blocks * (np.float32(1) / outer[:, None]))
    codes = np.searchsorted((table[:-1] + table[1:]) / np.float32(2), normed).astype(np.uint8)
    decoded = np.asarray((table[codes] * outer[:, None]).reshape(-1)[: len(scales)] + offset, np.float32)
    return codes.reshape(-1)[: len(scales)], outer, offset, decoded


@cache
def dynamic_map() -> Singles:
    """The 256 numbers by which the library quantizes scales: seven powers of ten, each in twice as many steps.

    Source: `create_dynamic_map`; torch.linspace in float32, whose terms are fused multiply-adds, rounded once.
    """
    import numpy as np

    found = [np.array([0.0, 1.0], np.float32)]
    start, stop = np.float32(0.1), np.float32(1)
    for power in range(7):
        steps = 1 << power
        step = float((stop - start) / np.float32(steps))
        place = np.arange(steps + 1)
        low, high = float(start) + step * place, float(stop) - step * (steps - place)
        edges = np.where(place < (steps + 1) // 2, low, high).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (power - 6))
        found += [means, -means]
    return np.sort(np.concatenate(found)).astype(np.float32)
