"""Encoders, which quantize a weight window by window, and the schemes that have one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from loraformat.diagnostics import show
from loraformat.errors import UnsupportedUpdate
from loraformat.model.checkpoint import Checkpoint, Quantized, QuantizedWeight
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Singles: TypeAlias = NDArray[np.float32]

# Scheme → the module beside this one that puts its weights into codes.
_MODULES = {"bitsandbytes": "bitsandbytes", "FP8": "block_fp8"}
RECODED = "bitsandbytes (NF4, FP4, INT8) and block FP8"
"""The schemes whose codes follow from the weights alone, for messages; others are calibrated with data."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that a weight in codes is written as: its name, dtype and shape."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


class Encoder(Protocol):
    """Puts one weight into codes, in windows of rows from first to last; holds the scales of those that it saw.

    Rows are those of the weight seen as a matrix whose columns are its last axis. Values are float32, all finite.

    Attributes:
        parts: the tensors that are written; the codes first. Other tensors of the weight stay as they are.
        unit: a window begins at a multiple of so many rows, and only the last may be shorter than another multiple.
        needs_scales: whether the values of all windows must be seen by `scan` before the first is encoded.
    """

    parts: tuple[Part, ...]
    unit: int
    needs_scales: bool

    def scan(self, values: Singles, start: int) -> None:
        """See the rows from `start` on, (k, columns), before any of them is encoded."""

    def encode(self, values: Singles, start: int) -> tuple[bytes, Singles]:
        """(bytes of the codes of these rows, (k, columns) what they are decoded to with their scales)."""

    def rest(self) -> Mapping[str, bytes]:
        """The bytes of all parts but the codes, by name, when all rows are encoded."""


class _Recoding(Protocol):
    def encoder(self, stored: Checkpoint, weight: QuantizedWeight) -> Encoder | None: ...


def encoder_of(quantized: Quantized, name: str) -> Encoder:
    """What puts a weight into the codes of its base again. Small tensors that say how may be read.

    Raises: UnsupportedUpdate (LF013): none does.
    """
    weight, module = quantized.weights[name], _MODULES.get(quantized.scheme)
    found = None
    if module is not None:
        scheme = cast("_Recoding", import_module(f"{__package__}.{module}"))
        found = scheme.encoder(quantized.stored, weight)
    if found is None:
        text = (
            f"{show(name, 200)} ({quantized.scheme}) cannot be quantized again without calibration data: only "
            f"{RECODED} can"
        )
        hint = "use --dequantize (all weights dense) or --keep-quantized (only those that change)"
        raise UnsupportedUpdate(text, where="merge", hint=hint)
    return found
