"""Which weights of a base bitsandbytes quantizes on loading, and their values afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from loraformat.arithmetic import row_squares
from loraformat.containers.quantized.as_trained import quantizer as arithmetic
from loraformat.containers.quantized.as_trained.quantizer import Quantizer
from loraformat.containers.quantized.as_trained.reference import decoded_rows
from loraformat.containers.quantized.decoding import of_scheme
from loraformat.containers.quantized.parts import Held, matrix_of, part_rows
from loraformat.diagnostics import show
from loraformat.errors import NonFiniteValue, UnsupportedUpdate, UsageError
from loraformat.matching import CONV1D, is_embedding, is_head, quantization_of
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, Quantized, QuantizedWeight
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

    _Float = TypeVar("_Float", bound=np.floating[Any])

SCHEME = "as trained"
_DTYPES = (DType.BF16, DType.F16, DType.F32)
# Matrices of other modules than linear layers: positions, relative distances; routers, which transformers 5 keeps as
# parameters.
_OTHERS = ("wpe", "relative_attention_bias", "gate", "router")
# Kept in float32 by transformers 5.23.0, `_keep_in_fp32_modules` of models/t5 and its relatives.
_WIDE = {"t5": ("wo",), "mt5": ("wo",), "umt5": ("wo",), "longt5": ("wo",)}
_ROWS = 64  # whose differences are squared at a time
_SCALES = 1 << 20  # weights whose scales are made at a time


@dataclass(frozen=True, slots=True)
class _Layout:
    """What all quantized weights of a base share.

    Attributes:
        quantizer: the settings.
        held: scales of a weight that are quantized too.
        errors: weight → Σ (W - decoded W)² of each of its rows that was decoded so far, else NaN.
    """

    quantizer: Quantizer
    held: Held = field(default_factory=Held)
    errors: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def as_trained(base: Checkpoint, quantizer: Quantizer) -> Checkpoint:
    """A dense base with the weights that its linear layers had in training. Nothing is read.

    Raises:
        UsageError (LF021): the base is stored in codes, or has no linear layer.
        UnsupportedUpdate (LF013): layers are stored transposed; or nothing says whether experts are quantized.
    """
    if base.quantized is not None or quantization_of(base) is not None:
        text = "--as-trained needs a base in 16 or 32 bits, but this base is already quantized"
        raise UsageError(text, where=base.uri, hint="use --dequantize")
    if base.config.get("model_type") in CONV1D:
        text = f"layers of {base.config['model_type']} are stored transposed, which --as-trained cannot quantize"
        raise UnsupportedUpdate(text, where=base.uri)
    layout = _Layout(quantizer)
    found = {
        name: QuantizedWeight(name, base.tensors[name].shape, base.tensors[name].dtype, (name,), layout)
        for name in _linear_layers(base, quantizer)
    }
    if not found:
        raise UsageError("the base has no linear layer that bitsandbytes would quantize", where=base.uri)
    quantized = Quantized(SCHEME, base, found, str(quantizer))
    return of_scheme(replace(base, quantized=quantized))


def _linear_layers(base: Checkpoint, quantizer: Quantizer) -> Iterator[str]:
    """The weights of modules that transformers replaces by those of bitsandbytes.

    Source: transformers 5.23.0, integrations/bitsandbytes.py `replace_with_bnb_linear`, quantizers/base.py
    `get_keys_to_not_convert`, quantizers/quantizers_utils.py `should_convert_module`.
    """
    skipped = (*quantizer.skip, *_WIDE.get(str(base.config.get("model_type")), ()))
    for name, stored in base.tensors.items():
        module, _, last = name.rpartition(".")
        if last != "weight" or len(stored.shape) != 2 or stored.dtype not in _DTYPES or stored.strides is not None:
            continue
        own = module.rpartition(".")[2]
        in_layer = any(part.isdigit() for part in module.split("."))
        if is_embedding(name) or "embed" in own or own in _OTHERS:
            continue
        if is_head(name) and not in_layer and not quantizer.skip:
            continue
        if any(module == one or module.startswith(f"{one}.") or module.endswith(one) for one in skipped):
            continue
        if "experts" in module.split(".") and not quantizer.experts:
            if quantizer.skip and "experts" in quantizer.skip:
                continue
            raise UnsupportedUpdate(
                f"{show(module, 200)}: the version of transformers decides whether experts are quantized on loading",
                where=base.uri,
                hint="add ,experts (as transformers 4 did) or ,skip=experts,skip=lm_head (as transformers 5 does)",
            )
        yield name


def error_of(base: Checkpoint, name: str) -> float | None:
    """‖W - decoded W‖ of a weight all of whose rows were decoded; else None."""
    import numpy as np

    assert base.quantized is not None
    layout = base.quantized.weights[name].layout
    assert isinstance(layout, _Layout)
    squares = layout.errors.get(name)
    if squares is None or np.isnan(squares).any():
        return None
    return math.sqrt(math.fsum(squares.tolist()))


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """None: no base is of this scheme by itself."""
    del stored
    return {}


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32]:
    """See `QuantizedScheme.rows`."""
    import numpy as np

    layout, (height, width) = weight.layout, matrix_of(weight.shape)
    assert isinstance(layout, _Layout)
    if layout.quantizer.kind == "int8":
        before = part_rows(stored, weight.name, start, stop)
        with np.errstate(over="ignore"):
            halves = _finite(before.astype(np.float16), weight.name)
        after = arithmetic.eight_bits_decoded(*arithmetic.eight_bits(halves))
    else:
        size = layout.quantizer.block
        first, last = start * width // size * size, min(height * width, -(-stop * width // size) * size)
        flat = _finite(_flat(stored, weight, first, last), weight.name)
        scales = layout.held.get((weight.name, 0), lambda: _doubly(stored, weight)) if layout.quantizer.double else None
        cut = slice(start * width - first, stop * width - first)
        before = flat[cut].reshape(stop - start, width)
        after = _four_bits(flat, layout.quantizer, scales, first // size)[cut].reshape(stop - start, width)
    squares = layout.errors.setdefault(weight.name, np.full(height, np.nan))
    for low in range(0, stop - start, _ROWS):
        difference = before[low : low + _ROWS].astype(np.float64) - after[low : low + _ROWS]
        squares[start + low : start + low + len(difference)] = row_squares(difference)
    return after


def _four_bits(
    flat: NDArray[np.float32], quantizer: Quantizer, scales: NDArray[np.float32] | None, first: int
) -> NDArray[np.float32]:
    """Weights from the beginning of a block on, quantized and decoded.

    Args:
        scales: of all blocks of the weight, by which codes are multiplied; None for those that they are divided by.
        first: number of the first block.
    """
    import numpy as np

    size, found = quantizer.block, np.empty(len(flat), np.float32)
    whole = len(flat) // size * size
    for low, high in ((0, whole), (whole, len(flat))):
        if low < high:
            blocks = flat[low:high].reshape(-1, min(size, high - low))
            own = arithmetic.scales_of(blocks)
            places, book = arithmetic.four_bits(blocks, own, quantizer.kind, is_cut=low == whole)
            at = first + low // size
            used = own if scales is None else scales[at : at + len(own)]
            found[low:high] = (book[places] * used[:, None]).reshape(-1)
    return found


def _doubly(stored: Checkpoint, weight: QuantizedWeight) -> NDArray[np.float32]:
    """The scales of all blocks of a weight, quantized and decoded."""
    import numpy as np

    layout, count = weight.layout, math.prod(weight.shape)
    assert isinstance(layout, _Layout)
    size, found = layout.quantizer.block, []
    for first in range(0, count, _SCALES):
        flat = _finite(_flat(stored, weight, first, min(count, first + _SCALES)), weight.name)
        whole = len(flat) // size * size
        found.append(arithmetic.scales_of(flat[:whole].reshape(-1, size)))
        if whole < len(flat):
            found.append(arithmetic.scales_of(flat[None, whole:]))
    return arithmetic.doubly(np.concatenate(found))


def _flat(stored: Checkpoint, weight: QuantizedWeight, first: int, last: int) -> NDArray[np.float32]:
    """Weights `first:last` in row-major order."""
    import numpy as np

    width = matrix_of(weight.shape)[1]
    low = first // width
    values = part_rows(stored, weight.name, low, -(-last // width)).reshape(-1)
    return np.asarray(values[first - low * width : last - low * width], np.float32)


def _finite(values: NDArray[_Float], name: str) -> NDArray[_Float]:
    """Raises: NonFiniteValue (LF402): one is not, which would spoil its block, or too large for float16."""
    import numpy as np

    if not np.isfinite(values).all():
        raise NonFiniteValue("a value is NaN or infinite, or too large for the quantizer", where=name)
    return values


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`."""
    layout = weight.layout
    assert isinstance(layout, _Layout)
    return decoded_rows(stored, weight, str(layout.quantizer), (start, stop), layout.held)


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """All: the whole model was quantized."""
    del touched
    return weights


def described(files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]) -> Mapping[str, Json | None]:
    """Nothing changes: no file calls the base quantized."""
    del files, dense, kept
    return {}
