"""A toy quantization scheme: int8 codes and a float32 scale for each group of columns.

`M.weight` is stored as `M.qweight` I8 (out, in), `M.scales` F32 (out, groups) and, for a runtime, `M.input_scale`.
A stack of experts `P` is stored as `P.qweight` and `P.scales`. Codes may be called `M.weight` instead. config.json has
`{"quant_method": "toy", "group_size": n, "modules_to_not_convert": [...]}`; quant_config.json lists those modules too.
A weight is `float32(code * scale)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loraformat.errors import FormatError
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight
from loraformat.model.tensors import DType


class Toy:
    def __init__(self, codes: str = "qweight") -> None:
        self.codes = codes

    def detect(self, stored: Checkpoint) -> bool:
        settings: Any = stored.config.get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == "toy"

    def weights(self, stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
        settings: Any = stored.config["quantization_config"]
        dtype = DType.by_torch_name(str(stored.config.get("torch_dtype", "bfloat16"))) or DType.BF16
        found = {}
        for codes, tensor in stored.tensors.items():
            module, _, last = codes.rpartition(".")
            if last != self.codes or tensor.dtype is not DType.I8:
                continue
            scales = stored.tensors.get(f"{module}.scales")
            groups = -(-tensor.shape[-1] // settings["group_size"])
            if scales is None or scales.shape != (*tensor.shape[:-1], groups):
                raise FormatError(f"{module}.scales: expected a scale for each group", where=tensor.file)
            parts = [codes, f"{module}.scales"]
            if f"{module}.input_scale" in stored.tensors:
                parts.append(f"{module}.input_scale")
            name = module if len(tensor.shape) == 3 else f"{module}.weight"
            found[name] = QuantizedWeight(name, tensor.shape, dtype, tuple(parts), settings["group_size"])
        return found

    def rows(self, stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Any:
        codes, scales = self._parts(stored, weight, start, stop)
        return codes.astype(np.float32) * scales

    def reference(self, stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Any:
        codes, scales = self._parts(stored, weight, start, stop)
        return (codes.astype(np.float64) * scales.astype(np.float64)).astype(np.float32).astype(np.float64)

    def together(self, touched: Any, weights: Any) -> Any:
        return touched & weights

    def described(
        self, files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]
    ) -> Mapping[str, Json | None]:
        changed: dict[str, Json | None] = {}
        modules: list[Json] = [name.removesuffix(".weight") for name in dense]
        config: Any = dict(files["config.json"])  # type: ignore[arg-type]
        if not kept:
            del config["quantization_config"]
            return {"config.json": config, **{name: None for name in files if name != "config.json"}}
        settings = config["quantization_config"]
        listed = [*settings.get("modules_to_not_convert", []), *modules]
        changed["config.json"] = {**config, "quantization_config": {**settings, "modules_to_not_convert": listed}}
        for name in files:
            if name != "config.json":
                changed[name] = {"modules_to_not_convert": listed}
        return changed

    def _parts(self, stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> tuple[Any, Any]:
        width = weight.shape[-1]
        axes = len(weight.shape) - 1
        codes, scales = (stored.weights[part].as_matrix(axes).raw(start, stop) for part in weight.parts[:2])
        grid = np.frombuffer(scales, "<f4").reshape(stop - start, -(-width // weight.layout))  # type: ignore[operator]
        each = np.repeat(grid, weight.layout, axis=-1)[:, :width]  # type: ignore[call-overload]
        return np.frombuffer(codes, np.int8).reshape(stop - start, width), each


class Transposed(Toy):
    """The traits of GPTQ and bitsandbytes together.

    Two 4-bit codes a byte along the input axis, stored transposed as `M.qweight` U8 (in / 2, out); `M.scales` F16
    (groups, out); `M.g_idx` I32 (in), the group of each input column in any order; `M.quant_state`, JSON in a tensor of
    bytes, tells the shape. A weight is `float32((code - 8) * scale)`.
    """

    def weights(self, stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
        found = {}
        for name in stored.tensors:
            module, _, last = name.rpartition(".")
            if last == "quant_state":
                state = json.loads(stored.weights[name].raw(0, stored.weights[name].rows))
                parts = tuple(f"{module}.{part}" for part in ("qweight", "scales", "g_idx", "quant_state"))
                weight = f"{module}.weight"
                found[weight] = QuantizedWeight(weight, tuple(state["shape"]), DType.F16, parts)
        return found

    def rows(self, stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Any:
        """Columns of the codes, read as strips of their rows."""
        out, inputs = weight.shape
        codes = np.empty((inputs, stop - start), np.uint8)
        tensor = stored.tensors[weight.parts[0]]
        for row in range(inputs // 2):
            strip = bytearray(stop - start)
            stored.store.read_into(tensor.file, tensor.span.offset + row * out + start, strip)
            codes[2 * row] = np.frombuffer(strip, np.uint8) & 15
            codes[2 * row + 1] = np.frombuffer(strip, np.uint8) >> 4
        scales, groups = self._whole(stored, weight.parts[1], "<f2"), self._whole(stored, weight.parts[2], "<i4")
        values = (codes.astype(np.float32) - 8) * scales.astype(np.float32)[groups, start:stop]
        return values.T

    def reference(self, stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Any:
        packed = self._whole(stored, weight.parts[0], "u1").astype(np.int64)
        codes = np.stack([packed % 16, packed // 16], 1).reshape(-1, packed.shape[1]).T[start:stop]
        scales, groups = self._whole(stored, weight.parts[1], "<f2"), self._whole(stored, weight.parts[2], "<i4")
        return (codes - 8.0) * scales.astype(np.float64).T[start:stop][:, groups]

    def _whole(self, stored: Checkpoint, name: str, code: str) -> Any:
        weight = stored.weights[name]
        return np.frombuffer(weight.raw(0, weight.rows), code).reshape(weight.shape)
