"""The element types of GGUF: how many elements a block has, how many bytes, and whether it is a plain number.

Source: gguf 0.19.0, constants.py `GGMLQuantizationType`, `GGML_QUANT_SIZES`, `GGUFValueType`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from loraformat.model.tensors import DType


@dataclass(frozen=True, slots=True)
class ElementType:
    """How elements of a tensor are stored.

    Attributes:
        code: in the file.
        name: "F16", "Q4_K".
        elements: of a block; a row has whole blocks.
        nbytes: of a block.
        dtype: of plain numbers; None for block types.
    """

    code: int
    name: str
    elements: int
    nbytes: int
    dtype: DType | None = None

    def row_nbytes(self, columns: int) -> int:
        """Bytes of a row of whole blocks."""
        return columns // self.elements * self.nbytes

    def nbytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor, whose last axis is a row; of shape () it has one element."""
        return math.prod(shape) // self.elements * self.nbytes


def _plain(code: int, dtype: DType) -> ElementType:
    return ElementType(code, dtype.safetensors, 1, dtype.itemsize, dtype)


_TYPES = (
    _plain(0, DType.F32),
    _plain(1, DType.F16),
    ElementType(2, "Q4_0", 32, 18),
    ElementType(3, "Q4_1", 32, 20),
    ElementType(6, "Q5_0", 32, 22),
    ElementType(7, "Q5_1", 32, 24),
    ElementType(8, "Q8_0", 32, 34),
    ElementType(9, "Q8_1", 32, 40),
    ElementType(10, "Q2_K", 256, 84),
    ElementType(11, "Q3_K", 256, 110),
    ElementType(12, "Q4_K", 256, 144),
    ElementType(13, "Q5_K", 256, 176),
    ElementType(14, "Q6_K", 256, 210),
    ElementType(15, "Q8_K", 256, 292),
    ElementType(16, "IQ2_XXS", 256, 66),
    ElementType(17, "IQ2_XS", 256, 74),
    ElementType(18, "IQ3_XXS", 256, 98),
    ElementType(19, "IQ1_S", 256, 50),
    ElementType(20, "IQ4_NL", 32, 18),
    ElementType(21, "IQ3_S", 256, 110),
    ElementType(22, "IQ2_S", 256, 82),
    ElementType(23, "IQ4_XS", 256, 136),
    _plain(24, DType.I8),
    _plain(25, DType.I16),
    _plain(26, DType.I32),
    _plain(27, DType.I64),
    _plain(28, DType.F64),
    ElementType(29, "IQ1_M", 256, 56),
    _plain(30, DType.BF16),
    ElementType(34, "TQ1_0", 256, 54),
    ElementType(35, "TQ2_0", 256, 66),
    ElementType(39, "MXFP4", 32, 17),
    ElementType(40, "NVFP4", 64, 36),
    ElementType(41, "Q1_0", 128, 18),
)
BY_CODE = {one.code: one for one in _TYPES}
BY_NAME = {one.name: one for one in _TYPES}
BY_DTYPE = {one.dtype: one for one in _TYPES if one.dtype is not None}


@dataclass(frozen=True, slots=True)
class ValueType:
    """How a setting of the header is stored; `layout` is None for strings and arrays."""

    code: int
    name: str
    layout: struct.Struct | None = None


_VALUE_TYPES = (
    ValueType(0, "UINT8", struct.Struct("<B")),
    ValueType(1, "INT8", struct.Struct("<b")),
    ValueType(2, "UINT16", struct.Struct("<H")),
    ValueType(3, "INT16", struct.Struct("<h")),
    ValueType(4, "UINT32", struct.Struct("<I")),
    ValueType(5, "INT32", struct.Struct("<i")),
    ValueType(6, "FLOAT32", struct.Struct("<f")),
    ValueType(7, "BOOL", struct.Struct("<B")),
    ValueType(8, "STRING"),
    ValueType(9, "ARRAY"),
    ValueType(10, "UINT64", struct.Struct("<Q")),
    ValueType(11, "INT64", struct.Struct("<q")),
    ValueType(12, "FLOAT64", struct.Struct("<d")),
)
VALUE_BY_CODE = {one.code: one for one in _VALUE_TYPES}
VALUE_BY_NAME = {one.name: one for one in _VALUE_TYPES}
