"""The stored tensors of a quantized weight: found, checked, and read as a whole, by rows, by columns or as bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from loraformat.diagnostics import show
from loraformat.errors import FormatError, NonFiniteValue
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, StoredTensor
from loraformat.model.tensors import DType, numbers_of

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

_MOST_STRIP_NBYTES = 16 << 20
_MOST_HELD_NBYTES = 40 << 20
_DTYPE_KEYS = ("dtype", "torch_dtype")


def part(stored: Checkpoint, name: str, of: str) -> StoredTensor:
    """A tensor that a weight needs. Raises: FormatError (LF012): it is missing, or cannot be read by rows."""
    found = stored.tensors.get(name)
    if found is None:
        raise FormatError(f"{show(of, 200)}: {show(name, 200)} is missing", where=stored.uri)
    if found.strides is not None:
        raise FormatError(f"{show(name, 200)} is stored as a view of another tensor", where=found.file)
    return found


def require_shape(name: str, tensor: StoredTensor, expected: tuple[int, ...], *dtypes: DType, reason: str = "") -> None:
    """Refuse a part of another shape, or of a dtype that is not among those given.

    Args:
        reason: the setting that the shape is expected by: "group_size 128".

    Raises: FormatError (LF012).
    """
    if tensor.shape != expected:
        text = f"{show(name, 200)} has the shape {list(tensor.shape)}, expected {list(expected)}"
        text = f"{text} by {reason}" if reason else text
        raise FormatError(text, where=tensor.file)
    if dtypes and tensor.dtype not in dtypes:
        wanted = " or ".join(dtype.safetensors for dtype in dtypes)
        raise FormatError(f"{show(name, 200)} is {tensor.dtype.safetensors}, expected {wanted}", where=tensor.file)


def whole(stored: Checkpoint, name: str) -> NDArray[Any]:
    """All values of a part; bfloat16 and float8 as float32."""
    return part_rows(stored, name, 0, stored.weights[name].rows).reshape(stored.tensors[name].shape)


def part_rows(stored: Checkpoint, name: str, start: int, stop: int) -> NDArray[Any]:
    """Rows `start:stop` of a part; bfloat16 and float8 as float32."""
    weight = stored.weights[name]
    return numbers_of(weight.raw(start, stop), weight.dtype).reshape(stop - start, *weight.shape[1:])


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a weight seen as a matrix whose columns are the last axis; a vector has one column."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def raw_rows(stored: Checkpoint, name: str, start: int, stop: int) -> NDArray[np.uint8]:
    """(stop - start, bytes of a row): rows of a part seen as a matrix with the columns of its last axis."""
    import numpy as np

    weight = stored.weights[name]
    matrix = weight if len(weight.shape) < 3 else weight.as_matrix(len(weight.shape) - 1)
    return np.frombuffer(matrix.raw(start, stop), np.uint8).reshape(stop - start, matrix.row_nbytes)


class Held:
    """Parts of files that several windows need, in memory as long as they are among the last few.

    Threads that want the same wait for one of them to read it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._parts: dict[tuple[str, int], _Part] = {}

    def get(self, key: tuple[str, int], read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What `read` gives, once as long as it is held; not to be written to."""
        with self._lock:
            found = self._parts.pop(key, None) or _Part()
            self._parts[key] = found
            while len(self._parts) > 1 and sum(one.nbytes for one in self._parts.values()) > _MOST_HELD_NBYTES:
                del self._parts[next(iter(self._parts))]
        return found.get(read)

    def columns(self, stored: Checkpoint, name: str, start: int, stop: int) -> NDArray[Any]:
        """(rows, stop - start), row-major: columns of a matrix that is stored transposed.

        A window takes a few hundred bytes of each row of the file, which takes longer than to decode them: strips of
        more columns are read and held.
        """
        import numpy as np

        (height, width), dtype = stored.tensors[name].shape, stored.tensors[name].dtype
        wide = max(1, _MOST_STRIP_NBYTES // max(1, height * dtype.itemsize))
        found = []
        for number in range(start // wide, -(-stop // wide)):
            low, high = number * wide, min(width, (number + 1) * wide)
            strip = self.get((name, number), partial(_columns, stored, name, low, high))
            found.append(strip[:, max(start, low) - low : min(stop, high) - low])
        return np.concatenate(found, axis=1) if found else np.zeros((height, 0), dtype.numpy)


class _Part:
    """An array that is read once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._values: NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        """Of what is held."""
        return 0 if self._values is None else self._values.nbytes

    def get(self, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What `read` gives the first time."""
        with self._lock:
            if self._values is None:
                self._values = read()
            return self._values


def _columns(stored: Checkpoint, name: str, start: int, stop: int) -> NDArray[Any]:
    """(rows, stop - start): columns of a matrix, a read for each of its rows; bfloat16 as float32."""
    import numpy as np

    tensor = stored.tensors[name]
    height, width = tensor.shape
    itemsize = tensor.dtype.itemsize
    if (start, stop) == (0, width):
        return whole(stored, name)
    buffer = bytearray(height * (stop - start) * itemsize)
    view, nbytes = memoryview(buffer), (stop - start) * itemsize
    for row in range(height if nbytes else 0):
        offset = tensor.span.offset + (row * width + start) * itemsize
        stored.store.read_into(tensor.file, offset, view[row * nbytes : (row + 1) * nbytes])
    return np.asarray(numbers_of(buffer, tensor.dtype).reshape(height, stop - start))


def span_of_bytes(stored: Checkpoint, name: str, start: int, stop: int) -> NDArray[np.uint8]:
    """Bytes `start:stop` of a part, whatever its dtype."""
    import numpy as np

    buffer = bytearray(stop - start)
    if buffer:
        tensor = stored.tensors[name]
        assert stop <= math.prod(tensor.shape) * tensor.dtype.itemsize
        stored.store.read_into(tensor.file, tensor.span.offset + start, memoryview(buffer))
    return np.frombuffer(buffer, np.uint8)


def modules_with(stored: Checkpoint, suffix: str) -> Iterator[str]:
    """The paths of modules that have a tensor with this ending: ".qweight"."""
    return (name.removesuffix(suffix) for name in stored.tensors if name.endswith(suffix))


def dtype_of(stored: Checkpoint, default: DType = DType.BF16) -> DType:
    """The dtype that the config states for the model, or that of a nested config of its text model."""
    text = stored.config.get("text_config")
    levels = [stored.config, *([text] if isinstance(text, dict) else [])]
    for level in levels:
        for key in _DTYPE_KEYS:
            found = level.get(key)
            if isinstance(found, str):
                dtype = DType.by_torch_name(found.removeprefix("torch."))
                if dtype is not None and dtype.is_floating:
                    return dtype
    return default


def whole_number(settings: Json, key: str, where: str, *allowed: int) -> int:
    """An integer setting, one of those allowed where any are given. Raises: FormatError (LF012)."""
    value = settings.get(key) if isinstance(settings, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or (allowed and value not in allowed):
        wanted = f"one of {', '.join(map(str, allowed))}" if allowed else "an integer"
        raise FormatError(f"{key}: expected {wanted}, found {show(str(value), 80)}", where=where)
    return value


def finite_scales(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Scales as they are. Raises: NonFiniteValue (LF402): one is NaN or infinite, which spoils all that it scales."""
    import numpy as np

    if not np.isfinite(values).all():
        raise NonFiniteValue("a scale is NaN or infinite", where=name)
    return values
