"""The decoded weights of a quantized base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from loraformat.arithmetic import convert
from loraformat.arithmetic.codes import CodedRows
from loraformat.containers.quantized.parts import matrix_of
from loraformat.containers.quantized.scheme import SCHEMES, QuantizedScheme
from loraformat.diagnostics import show
from loraformat.errors import FormatError, InvalidJson
from loraformat.model.checkpoint import BaseWeight, Checkpoint, Quantized, QuantizedWeight, StoredTensor
from loraformat.model.tensors import DType, Span, bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

    Singles = NDArray[np.float32]
    _Float = TypeVar("_Float", bound=np.floating[Any])

# Of the values that a scheme decodes.
_DTYPE = DType.F32


def decoded(stored: Checkpoint) -> Checkpoint:
    """The base by its weights where a scheme of the table stores it; else as it is.

    Raises: FormatError (LF012): the tensors are not those of the scheme; says that the base is quantized, and how.
    """
    found = next((name for name, scheme in SCHEMES.items() if scheme.detect(stored)), None)
    if found is None:
        return stored
    try:
        weights = SCHEMES[found].weights(stored)
        _check_parts(stored, weights)
        _check_others(stored, weights, found)
    except (FormatError, InvalidJson) as error:
        text = f"the base is quantized ({found}) and cannot be dequantized: {error.message}"
        raise FormatError(text, where=error.location, hint=error.hint) from error
    return of_scheme(replace(stored, quantized=Quantized(found, stored, weights)))


def of_scheme(base: Checkpoint) -> Checkpoint:
    """A base by the weights that `base.quantized` says, decoded by its scheme; else as it is stored."""
    assert base.quantized is not None
    weights = _DecodedWeights(base, SCHEMES[base.quantized.scheme])
    return replace(laid_out(base, base.quantized.weights.keys()), weights=weights)


def laid_out(base: Checkpoint, dense: AbstractSet[str]) -> Checkpoint:
    """The headers of a quantized base with some of its quantized weights dense, and the parts of all others.

    A part is left out where no other weight needs it. Values of `weights` stay those that they are.
    """
    assert base.quantized is not None
    stored, weights = base.quantized.stored, base.quantized.weights
    kept = {part for name, weight in weights.items() if name not in dense for part in weight.parts}
    left_out = {part for name in dense for part in weights[name].parts} - kept
    homes: dict[str, list[str]] = {}
    for name in weights:
        if name in dense:
            homes.setdefault(weights[name].parts[0], []).append(name)
    files = {
        file.name: replace(
            file,
            names=tuple(
                new for name in file.names for new in (*homes.get(name, ()), *(() if name in left_out else (name,)))
            ),
        )
        for file in stored.files.values()
    }
    headers = {name: _header(stored, weights[name]) for name in dense}
    tensors = {
        name: headers[name] if name in headers else stored.tensors[name]
        for file in files.values()
        for name in file.names
        if name in headers or name in stored.tensors
    }
    return replace(base, files=files, tensors=tensors)


def reference_rows(quantized: Quantized, tensor: StoredTensor, start: int, stop: int) -> Floats:
    """Rows of a quantized weight in float64, by the reference of its scheme; the weight may be seen as a matrix."""
    weight = quantized.weights[tensor.encoded]
    read = partial(SCHEMES[quantized.scheme].reference, quantized.stored, weight)
    return _rows_of(read, weight.shape, tensor.shape, start, stop)


class _DecodedWeights(Mapping[str, BaseWeight]):
    """Name → weight; each is made when it is asked for."""

    def __init__(self, base: Checkpoint, scheme: QuantizedScheme) -> None:
        assert base.quantized is not None
        self._stored, self._weights, self._scheme = base.quantized.stored, base.quantized.weights, scheme
        parts = {part for weight in self._weights.values() for part in weight.parts}
        self._others = {name: None for name in self._stored.weights if name not in parts}

    def __getitem__(self, name: str) -> BaseWeight:
        if name in self._weights:
            weight = self._weights[name]
            return _weight_of(self._stored, weight, self._scheme, weight.shape)
        if name in self._others:
            return self._stored.weights[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._weights
        yield from self._others

    def __len__(self) -> int:
        return len(self._weights) + len(self._others)


def _weight_of(
    stored: Checkpoint, weight: QuantizedWeight, scheme: QuantizedScheme, shape: tuple[int, ...]
) -> BaseWeight:
    """A quantized weight, seen in `shape`; nothing is read."""
    rows = partial(scheme.rows, stored, weight)
    decode = partial(_rows_of, lambda start, stop: _numbers(rows(start, stop)), weight.shape, shape)

    def round_into(start: int, stop: int, buffer: memoryview, dtype: DType) -> bool:
        height = matrix_of(weight.shape)[0] // max(1, shape[0] if shape else 1)
        found = rows(start * height, stop * height)
        if isinstance(found, CodedRows):
            return found.round_into(buffer, dtype)
        return convert(bytes_of(found, _DTYPE), _DTYPE, buffer, dtype)

    def read_into(start: int, stop: int, buffer: memoryview) -> None:
        import numpy as np

        np.frombuffer(buffer, "<f4")[:] = decode(start, stop).reshape(-1)

    def as_matrix(row_axes: int) -> BaseWeight:
        rows = math.prod(weight.shape[:row_axes])
        return _weight_of(stored, weight, scheme, (rows, *weight.shape[row_axes:]))

    return BaseWeight(
        name=weight.name,
        parts=tuple(stored.tensors[part] for part in weight.parts),
        shape=shape,
        dtype=_DTYPE,
        read=decode,
        read_into=read_into,
        as_matrix=as_matrix,
        round_into=round_into,
    )


def _numbers(rows: Singles | CodedRows) -> Singles:
    return rows.numbers() if isinstance(rows, CodedRows) else rows


def _rows_of(
    read: Callable[[int, int], NDArray[_Float]], shape: tuple[int, ...], seen_as: tuple[int, ...], start: int, stop: int
) -> NDArray[_Float]:
    """Rows of a weight of `shape` whose leading axes are seen as one; `read` gives rows of its matrix."""
    import numpy as np

    height = matrix_of(shape)[0] // max(1, seen_as[0] if seen_as else 1)
    rows = read(start * height, stop * height)
    return np.ascontiguousarray(rows).reshape(stop - start, *seen_as[1:])


def _header(stored: Checkpoint, weight: QuantizedWeight) -> StoredTensor:
    file = stored.tensors[weight.parts[0]].file
    span = Span(stored.files[file].data_start, 0)
    return StoredTensor(file, _DTYPE, weight.shape, span, encoded=weight.name)


def _check_parts(stored: Checkpoint, weights: Mapping[str, QuantizedWeight]) -> None:
    """Refuse a weight whose name stands in the files as another tensor, or a part that does not stand there."""
    parts = {part for weight in weights.values() for part in weight.parts}
    for name, weight in weights.items():
        if not math.prod(weight.shape):
            text = f"{show(name, 200)}: a quantized weight is empty, its shape is {list(weight.shape)}"
            raise FormatError(text, where=stored.uri)
        missing = next((part for part in weight.parts if part not in stored.tensors), None)
        if missing is not None:
            raise FormatError(f"{show(name, 200)}: {show(missing, 200)} is missing", where=stored.uri)
        if name in stored.tensors and name not in parts:
            raise FormatError(
                f"{show(name, 200)} is stored twice, dense and quantized", where=stored.tensors[name].file
            )


def _check_others(stored: Checkpoint, weights: Mapping[str, QuantizedWeight], scheme: str) -> None:
    """Refuse codes and scales that no weight of the scheme is stored in: they would pass for dense weights."""
    from loraformat.matching import code_owner

    parts = {part for weight in weights.values() for part in weight.parts}
    for name, tensor in stored.tensors.items():
        owner = None if name in parts else code_owner(stored, name)
        if owner is not None:
            text = f"{show(name, 200)} ({owner or tensor.dtype.safetensors}) belongs to no weight in {scheme}"
            hint = "the base's settings and tensors use different schemes, or part of a weight is missing"
            raise FormatError(text, where=tensor.file, hint=hint)
