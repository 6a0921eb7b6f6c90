"""The interface of a quantization scheme, and the table of all schemes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from loraformat.arithmetic.codes import CodedRows
from loraformat.containers.gguf import scheme as gguf
from loraformat.errors import FormatError
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

    Singles: TypeAlias = NDArray[np.float32]


class QuantizedScheme(Protocol):
    """A module of `containers/quantized`, or any object with these functions.

    `stored` is always the base as its files store it: config.json and the files beside it, headers, the metadata of
    each file, `weights[name].raw(start, stop)` for rows of a tensor and `store.read_into` for any other bytes.
    """

    def detect(self, stored: Checkpoint) -> bool:
        """Whether a base is of this scheme, by its config and its tensors."""

    def weights(self, stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
        """The quantized weights, by name. Small tensors that tell shapes may be read.

        Raises: FormatError (LF012): a part is missing or has the wrong shape; config and tensors contradict each other.
        """

    def rows(self, stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Singles | CodedRows:
        """(stop - start, columns): what the library of the scheme computes, before its last rounding; or its codes.

        Rows `start:stop` of the weight seen as a matrix: its columns are the last axis, or one where that is all.
        """

    def reference(self, stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
        """The same values in float64, by code that shares nothing with `rows`: `--verify` compares with them."""

    def together(self, touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
        """Those of `weights` that must be dense where `touched` are: runtimes load some modules as one."""

    def described(
        self, files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]
    ) -> Mapping[str, Json | None]:
        """What config.json and the other files about the quantization must say of an output.

        Args:
            files: config.json, where there is one, and the files beside it, by name.
            dense: names of quantized weights that the output has as dense ones.
            kept: names of those that it has in codes; where there are none, nothing may call it quantized.

        Returns: the files that change: name → all that it says; None where the output must not have it.
        """


# Of tensors that hold codes, and the ends of names of tensors that scale them.
_CODES = (DType.U8, DType.I8, DType.I32, DType.F8_E4M3, DType.F8_E5M2)
_SCALES = (".absmax", ".SCB", ".weight_scale", ".weight_scale_inv", ".qscale_weight")


@dataclass(frozen=True, slots=True)
class Module:
    """A scheme in a module beside this one, which is imported when a base says that it is of that scheme.

    Attributes:
        name: of the module.
        methods: values of `quant_method` that mean it.
    """

    name: str
    methods: tuple[str, ...]

    def detect(self, stored: Checkpoint) -> bool:
        """See `QuantizedScheme.detect`: the settings name the method, and not all tensors are plain numbers.

        Settings that a tool left behind in a dense checkpoint mean nothing.
        """
        from loraformat.containers.quantized.settings import settings_of

        settings = settings_of(stored)
        if settings is None or settings.method not in self.methods:
            return False
        return any(tensor.dtype in _CODES or name.endswith(_SCALES) for name, tensor in stored.tensors.items())

    def weights(self, stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
        """See `QuantizedScheme.weights`. Raises: FormatError (LF012): there is none."""
        found = self._module.weights(stored)
        if not found:
            text = f"the settings say {self.methods[0]}, but no weight is stored that way"
            raise FormatError(text, where=stored.uri)
        return found

    def rows(self, stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Singles | CodedRows:
        """See `QuantizedScheme.rows`."""
        return self._module.rows(stored, weight, start, stop)

    def reference(self, stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
        """See `QuantizedScheme.reference`."""
        return self._module.reference(stored, weight, start, stop)

    def together(self, touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
        """See `QuantizedScheme.together`."""
        return self._module.together(touched, weights)

    def described(
        self, files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]
    ) -> Mapping[str, Json | None]:
        """See `QuantizedScheme.described`."""
        return self._module.described(files, dense, kept)

    @property
    def _module(self) -> QuantizedScheme:
        return cast("QuantizedScheme", import_module(f"{__package__}.{self.name}"))


# Name → scheme; a scheme is a module beside this one and its line here.
SCHEMES: dict[str, QuantizedScheme] = {
    "bitsandbytes": Module("bitsandbytes", ("bitsandbytes",)),
    "FP8": Module("block_fp8", ("fp8",)),
    "MXFP4": Module("mxfp4", ("mxfp4",)),
    "compressed-tensors": Module("compressed_tensors", ("compressed-tensors",)),
    "GPTQ": Module("gptq", ("gptq",)),
    "AWQ": Module("awq", ("awq",)),
    "ModelOpt": Module("modelopt", ("modelopt",)),
    "GGUF": gguf,
    # No base is of it by itself: see `as_trained`.
    "as trained": Module("as_trained", ()),
}
