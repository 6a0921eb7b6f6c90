"""Tensors that are described but not loaded: dtype, shape, and functions that read the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from loraformat.extras import import_torch

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    # Numbers of a tensor as numpy holds them: bfloat16 and float8, which it lacks, as float32 of the same values.
    Values: TypeAlias = NDArray[Any]


class DType(Enum):
    """Element types, by their safetensors names.

    Source: safetensors 0.8.0, `Dtype` (tensor.rs); sub-byte types are left out.
    """

    F64 = ("F64", "float64", 8)
    F32 = ("F32", "float32", 4)
    F16 = ("F16", "float16", 2)
    BF16 = ("BF16", "bfloat16", 2)
    F8_E4M3 = ("F8_E4M3", "float8_e4m3fn", 1)
    F8_E5M2 = ("F8_E5M2", "float8_e5m2", 1)
    F8_E8M0 = ("F8_E8M0", "float8_e8m0fnu", 1)
    C64 = ("C64", "complex64", 8)
    I64 = ("I64", "int64", 8)
    I32 = ("I32", "int32", 4)
    I16 = ("I16", "int16", 2)
    I8 = ("I8", "int8", 1)
    U64 = ("U64", "uint64", 8)
    U32 = ("U32", "uint32", 4)
    U16 = ("U16", "uint16", 2)
    U8 = ("U8", "uint8", 1)
    BOOL = ("BOOL", "bool", 1)

    def __init__(self, safetensors: str, torch_name: str, itemsize: int) -> None:
        self.safetensors, self.torch_name, self.itemsize = safetensors, torch_name, itemsize

    @property
    def is_floating(self) -> bool:
        """Whether values are real floating-point numbers of at least 16 bits."""
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype of arrays that hold its values: float32 for bfloat16 and float8, which numpy lacks."""
        import numpy as np

        found: np.dtype[Any] = np.dtype(_NUMPY_CODES.get(self, "<f4")).newbyteorder("=")
        return found

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype. Raises: MissingExtra (LF029): PyTorch is not installed."""
        found = getattr(import_torch("a torch dtype"), self.torch_name)
        assert found is not None
        return cast("torch.dtype", found)

    @classmethod
    def by_torch_name(cls, name: str) -> DType | None:
        """The dtype called `name` in torch ("float32", without `torch.`), or None."""
        return next((dtype for dtype in cls if dtype.torch_name == name), None)


_BLOCK_NBYTES = 4 << 20  # of what is compared at a time


# Of spans and entries there are as many as a file has tensors, which may be hundreds of thousands: tuples cost half.
class Span(NamedTuple):
    """A run of bytes of one file."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first byte after the run."""
        return self.offset + self.nbytes


class Entry(NamedTuple):
    """A tensor that stands row-major and without gaps in a file."""

    dtype: DType
    shape: tuple[int, ...]
    span: Span


def row_blocks(shape: tuple[int, ...], itemsize: int, most_nbytes: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of runs of whole rows of at most `most_nbytes`, each at least one row long.

    A tensor of shape () counts as one row, as for `LazyTensor.read`.
    """
    rows = shape[0] if shape else 1
    step = max(1, most_nbytes // max(1, math.prod(shape[1:]) * itemsize))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor whose shape and dtype are known, and whose values are read when `load()` or `torch()` is called.

    >>> import loraformat
    >>> adapter = loraformat.load_adapter("fixtures/good/peft/tiny-llama")
    >>> tensor = adapter.updates["model.layers.0.self_attn.q_proj.weight"][0].down
    >>> tensor.shape, tensor.dtype.safetensors, tensor.load().shape
    ((2, 8), 'F32', (2, 8))

    Attributes:
        shape: may be `()`.
        dtype: of what `read` returns.
        read: `read(start, stop)` gives rows `start:stop` of the first axis as an array of `dtype.numpy` whose values
            `dtype` can hold, contiguous or not; a tensor of shape `()` is read as `read(0, 1)` and comes back with
            shape `()`.
        raw: `raw(start, stop)` gives the bytes of the same rows, row-major and little-endian; None where values are
            computed or do not stand so.

    Law 5: making one reads nothing; `.T`, `.rows`, `.reshape`, `.to` give new lazies. Closures never cross processes.
    """

    shape: tuple[int, ...]
    dtype: DType
    read: Callable[[int, int], Values]
    raw: Callable[[int, int], bytearray] | None = None

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the values take."""
        return self.numel * self.dtype.itemsize

    def load(self) -> Values:
        """All values, as a numpy array of `shape` in memory of its own.

        The array has the dtype of the tensor where numpy has it; bfloat16 and float8 values are float32, exactly.
        """
        import numpy as np

        return np.array(self.read(0, self.shape[0] if self.shape else 1), order="C")

    def torch(self) -> Tensor:
        """All values, as a torch tensor of `shape` and `dtype`.

        Raises: MissingExtra (LF029): PyTorch is not installed.
        """
        torch = import_torch("a torch tensor")
        if not self.numel:
            return cast("Tensor", torch.empty(self.shape, dtype=self.dtype.torch))
        # By way of bytes, so that what a NaN carries stays.
        rows = self.shape[0] if self.shape else 1
        data = bytes_of(self.load(), self.dtype) if self.raw is None else self.raw(0, rows)
        return cast("Tensor", torch.frombuffer(data, dtype=torch.uint8).view(self.dtype.torch).reshape(self.shape))

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows `start:stop` of the first axis."""
        read, raw = self.read, self.raw
        return LazyTensor(
            (stop - start, *self.shape[1:]),
            self.dtype,
            lambda a, b: read(start + a, start + b),
            None if raw is None else lambda a, b: raw(start + a, start + b),
        )

    @property
    def T(self) -> LazyTensor:  # noqa: N802 - the name that numpy and torch use
        """The transpose of a matrix. Its rows are columns here, so any of its rows costs a whole load."""
        rows, columns = self.shape
        whole = self.load
        return LazyTensor((columns, rows), self.dtype, lambda a, b: whole().T[a:b])

    def reshape(self, *shape: int) -> LazyTensor:
        """The same elements in row-major order under another shape of equal size."""
        if math.prod(shape) != self.numel:
            raise ValueError(f"cannot reshape {self.shape} to {shape}")
        if shape[:1] == self.shape[:1] and shape:
            read = self.read
            return LazyTensor(shape, self.dtype, lambda a, b: read(a, b).reshape(b - a, *shape[1:]), self.raw)
        values, raw = self.load, self.raw
        rows = self.shape[0] if self.shape else 1
        row_nbytes = math.prod(shape[1:]) * self.dtype.itemsize

        def part(start: int, stop: int) -> Values:
            whole = values().reshape(shape)
            return whole[start:stop] if shape else whole

        def raw_part(start: int, stop: int) -> bytearray:
            assert raw is not None
            return raw(0, rows)[start * row_nbytes : stop * row_nbytes]

        return LazyTensor(shape, self.dtype, part, None if raw is None else raw_part)

    def to(self, dtype: DType) -> LazyTensor:
        """The same values rounded once to the nearest of `dtype`."""
        if dtype is self.dtype:
            return self
        read = self.read
        return LazyTensor(self.shape, dtype, lambda a, b: rounded(read(a, b), dtype))

    @staticmethod
    def of(value: Values | Tensor, dtype: DType | None = None) -> LazyTensor:
        """An array, or a torch tensor, that is in memory already.

        Args:
            dtype: of which all values are, where the dtype of the array does not say it: BF16 for a float32 array.
        """
        array, found = _array_of(value)
        found = dtype or found
        if found is None or array.dtype != found.numpy:
            raise TypeError(f"no DType for {array.dtype}" if found is None else f"{array.dtype} does not hold {found}")
        return LazyTensor(tuple(array.shape), found, lambda a, b: array[a:b] if array.ndim else array)


class Readable(Protocol):
    """What has values by rows: a LazyTensor, a weight of a base."""

    @property
    def shape(self) -> tuple[int, ...]:
        """May be `()`."""

    @property
    def dtype(self) -> DType:
        """Of what is read."""

    @property
    def read(self) -> Callable[[int, int], Values]:
        """See LazyTensor."""


def has_equal_values(one: Readable, other: Readable) -> bool:
    """Whether two tensors have one shape and the same numbers in it; NaN equals nothing. A block is read at a time."""
    if one.shape != other.shape:
        return False
    blocks = row_blocks(one.shape, max(one.dtype.itemsize, other.dtype.itemsize), _BLOCK_NBYTES)
    return all(bool((one.read(start, stop) == other.read(start, stop)).all()) for start, stop in blocks)


# As numpy calls them; little-endian, as every container stores them.
_NUMPY_CODES = {
    DType.F64: "<f8",
    DType.F32: "<f4",
    DType.F16: "<f2",
    DType.C64: "<c8",
    DType.I64: "<i8",
    DType.I32: "<i4",
    DType.I16: "<i2",
    DType.I8: "i1",
    DType.U64: "<u8",
    DType.U32: "<u4",
    DType.U16: "<u2",
    DType.U8: "u1",
    DType.BOOL: "?",
}


_FLOAT8 = (DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0)


def numbers_of(data: bytearray | memoryview, dtype: DType) -> Values:
    """The elements of a run of bytes as one axis; bfloat16 and float8 as float32, exactly.

    Source: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2); OCP Microscaling Formats 1.0 (E8M0).
    """
    import numpy as np

    if dtype in _NUMPY_CODES:
        found = np.frombuffer(data, _NUMPY_CODES[dtype])
        return found.astype(found.dtype.newbyteorder("="), copy=False)
    if dtype is DType.BF16:  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    codes = np.frombuffer(data, np.uint8)
    return {DType.F8_E4M3: _e4m3, DType.F8_E5M2: _e5m2, DType.F8_E8M0: _e8m0}[dtype]()[codes]


def _e4m3() -> NDArray[np.float32]:
    """The numbers of all codes: no infinity, and NaN where all bits but the sign are set."""
    import numpy as np

    codes = np.arange(256)
    exponents, digits = (codes >> 3) & 15, codes & 7
    sizes = np.where(exponents == 0, digits * 2.0**-9, (8 + digits) * 2.0 ** (exponents - 10.0))
    sizes[codes & 127 == 127] = np.nan
    return np.where(codes < 128, sizes, -sizes).astype(np.float32)


def _e5m2() -> NDArray[np.float32]:
    """The numbers of all codes, the upper halves of float16; what a NaN carries stands in its highest bits."""
    import numpy as np

    codes = np.arange(256, dtype=np.uint32)
    found = (codes << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    is_nan = np.isnan(found)
    found.view(np.uint32)[is_nan] = ((codes & 0x80) << 24 | 0x7F80_0000 | (codes & 3) << 21)[is_nan]
    return found


def _e8m0() -> NDArray[np.float32]:
    """The numbers of all codes: powers of two, and NaN for the last."""
    import numpy as np

    sizes = 2.0 ** (np.arange(256) - 127.0)
    sizes[255] = np.nan
    return sizes.astype(np.float32)


def _array_of(value: Values | Tensor) -> tuple[Values, DType | None]:
    """(array, the dtype of its values or None), of an array or of a torch tensor, in whose memory it may lie."""
    import numpy as np

    if not isinstance(value, np.ndarray):
        dtype = DType.by_torch_name(str(value.dtype).removeprefix("torch."))
        wide = value.detach().resolve_conj().resolve_neg().cpu()
        if dtype in _FLOAT8:  # by way of bytes, so that what a NaN carries stays
            codes = wide.contiguous().view(import_torch("a torch tensor").uint8).numpy()
            return numbers_of(_flat_bytes(codes), dtype).reshape(codes.shape), dtype
        return (wide.float() if dtype is DType.BF16 else wide).numpy(), dtype
    value = value.astype(value.dtype.newbyteorder("="), copy=False)
    return value, next((dtype for dtype, code in _NUMPY_CODES.items() if np.dtype(code) == value.dtype), None)


def rounded(values: Values, dtype: DType) -> Values:
    """Real values rounded once to the nearest of `dtype`, ties to even, as an array of `dtype.numpy`.

    Too large a value becomes infinity, or in float8_e4m3fn, which has none, NaN. Complex numbers are
    converted as numpy does.

    >>> import numpy as np
    >>> rounded(np.array([1 + 2**-8 + 2**-40]), DType.BF16)  # by way of float32 this would be 1.0
    array([1.0078125], dtype=float32)
    """
    import numpy as np

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype is DType.BF16:
            bits = np.atleast_1d(_odd(values)).view(np.uint32)
            result = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF)) & np.uint32(0xFFFF0000)
            if (is_nan := np.atleast_1d(np.isnan(values))).any():
                # What a NaN carries stays where bfloat16 has room for it.
                cut = bits & np.uint32(0xFFFF0000)
                quiet = np.where(cut & 0x007F0000, cut, cut | np.uint32(0x00400000))
                result = np.where(is_nan, quiet, result)
            return np.asarray(result.view(np.float32).reshape(values.shape))
        if dtype in _FLOAT8:
            return numbers_of(_flat_bytes(_float8_codes(values, dtype)), dtype).reshape(values.shape)
        return np.asarray(values.astype(dtype.numpy))


def bytes_of(values: Values, dtype: DType) -> memoryview:
    """Values of a dtype, row-major and little-endian, as they stand in a file; without a copy where they stand so.

    Args:
        values: an array of `dtype.numpy`; what `dtype` cannot hold is rounded as by `rounded`.
    """
    import numpy as np

    assert values.dtype == dtype.numpy, f"{values.dtype} for {dtype}"
    if dtype is DType.BF16:
        bits = values.view(np.uint32) if values.flags.c_contiguous else np.ascontiguousarray(values).view(np.uint32)
        if (bits & 0xFFFF).any():
            bits = np.ascontiguousarray(rounded(values, dtype)).view(np.uint32)
        return _flat_bytes((bits >> 16).astype("<u2"))
    if dtype in _FLOAT8:
        return _flat_bytes(_float8_codes(values, dtype))
    return _flat_bytes(values.astype(values.dtype.newbyteorder("<"), copy=False))


def _flat_bytes(values: Values) -> memoryview:
    import numpy as np

    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _odd(values: Values) -> NDArray[np.float32]:
    """As float32, towards zero, with the last bit set where that is not exact.

    What has 24 bits so rounds to 8 bits as the wider value does; through the nearest float32 it would be rounded twice
    (Boldo and Melquiond, Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd, 2008).
    """
    import numpy as np

    if np.issubdtype(values.dtype, np.integer):
        values = _double_of(values)
    if values.dtype != np.float64:
        return np.array(values, np.float32, order="C")
    near = np.array(values, np.float32, order="C")
    back, bits = near.astype(np.float64), near.view(np.uint32)
    bits -= (np.abs(back) > np.abs(values)).astype(np.uint32)
    bits |= ((back != values) & ~np.isnan(values)).astype(np.uint32)
    return near


def _double_of(values: Values) -> NDArray[np.float64]:
    """As float64; the lowest 12 bits of integers with more than its 53 become one bit, so that they round once."""
    import numpy as np

    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        low = values.dtype.type(0xFFF)
        odd = (values & ~low) | ((values & low) != 0) * values.dtype.type(0x800)
        is_small = values < 1 << 53
        if values.dtype.kind == "i":
            is_small &= values > -(1 << 53)
        values = np.where(is_small, values, odd)
    return values.astype(np.float64)


def _float8_codes(values: Values, dtype: DType) -> NDArray[np.uint8]:
    """The codes of the nearest values; ties to even codes."""
    import numpy as np

    carried = _carried_by_nan(values)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = _double_of(values)
        sizes = numbers_of(bytearray(range(128 if dtype is not DType.F8_E8M0 else 256)), dtype).astype(np.float64)
    last = int(np.flatnonzero(np.isfinite(sizes))[-1])
    # One step past the largest value: what lies beyond the middle to it overflows.
    ladder = np.append(sizes[: last + 1], 2 * sizes[last] - sizes[last - 1] if dtype is not DType.F8_E8M0 else 2.0**128)
    magnitude = np.abs(values)
    above = np.clip(np.searchsorted(ladder, magnitude), 1, last + 1)
    low, high = magnitude - ladder[above - 1], ladder[above] - magnitude
    is_up = (high < low) | (high == low) & (above % 2 == 0)
    codes = (above - 1 + is_up).astype(np.uint8)
    if dtype is DType.F8_E8M0:
        return np.asarray(np.where(np.isfinite(values), codes, np.uint8(255)))
    nan = np.where(carried, 0x7C | carried, 127) if dtype is DType.F8_E5M2 else 127
    codes = np.where(np.isnan(values), nan, codes).astype(np.uint8)
    return np.asarray(codes | np.where(np.signbit(values), np.uint8(128), np.uint8(0)))


def _carried_by_nan(values: Values) -> NDArray[np.uint8]:
    """The two highest bits of each significand; zero where the dtype is not float32 or float64."""
    import numpy as np

    if values.dtype not in (np.float32, np.float64):
        return np.zeros(values.shape, np.uint8)
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").reshape(values.shape)
    return np.asarray((bits >> (21 if values.dtype == np.float32 else 50)) & 3, np.uint8)
