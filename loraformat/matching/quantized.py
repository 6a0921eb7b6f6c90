"""Whether a base is quantized by a scheme that is not decoded, and which of its weights are.

They are named, so that nobody else is blamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from loraformat.diagnostics import FindingLocation, in_file, in_weights
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, StoredTensor
from loraformat.model.tensors import DType
from loraformat.naming import levels_of

# The end of a tensor's name after its module → the scheme that writes it, most telling first.
# Source: transformers 5.23.0 quantizers/; compressed-tensors 0.20.1; bitsandbytes 0.50.2; hqq 0.2.8.
_SIDE_TENSORS = (
    (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes NF4"),
    (".weight.quant_state.bitsandbytes__fp4", "bitsandbytes FP4"),
    (".weight.absmax", "bitsandbytes, 4 bits"),
    (".SCB", "bitsandbytes, 8 bits"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_2", "modelopt NVFP4"),
    (".weight_scale_inv", "block FP8"),
    (".qscale_weight", "FP8"),
    (".qweight", "GPTQ or AWQ"),
    (".W_q", "HQQ"),
    (".weight_scale", "a scheme with weight_scale"),
    ("_blocks", "MXFP4"),
)


_INDICES = (DType.I64, DType.U64, DType.BOOL)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What is known of the scheme of a base.

    Attributes:
        scheme: its name, as the ecosystem has it.
        where: the file, or the first tensor, that says so.
    """

    scheme: str
    where: FindingLocation


def quantization_of(base: Checkpoint) -> Quantization | None:
    """The scheme of a quantized base that is not decoded; None where no tensor can be one of codes."""
    if base.quantized is not None or _is_dense(base):
        return None
    for where, settings in _settings(base):
        scheme = _scheme(settings)
        if scheme is not None:
            return Quantization(scheme, where)
    for suffix, scheme in _SIDE_TENSORS:
        found = next((name for name in base.tensors if name.endswith(suffix) and _is_side(base, name, suffix)), None)
        if found is not None:
            return Quantization(scheme, in_weights(found))
    codes = next((name for name, stored in base.tensors.items() if _is_codes(name, stored)), None)
    return None if codes is None else Quantization("an unnamed method", in_weights(codes))


def left_over(base: Checkpoint) -> Quantization | None:
    """What a base says of a quantization though all of its tensors are dense; None where it says nothing."""
    if base.quantized is None and _is_dense(base):
        for where, settings in _settings(base):
            scheme = _scheme(settings)
            if scheme is not None:
                return Quantization(scheme, where)
    return None


def code_owner(base: Checkpoint, name: str) -> str | None:
    """The scheme that writes tensors of such a name; "" for codes under the name of a weight, None for plain values."""
    for suffix, scheme in _SIDE_TENSORS:
        if name.endswith(suffix) and _is_side(base, name, suffix):
            return scheme
    return "" if _is_codes(name, base.tensors[name]) else None


def _is_dense(base: Checkpoint) -> bool:
    """Whether no tensor can be one of codes. A matrix of integers of any name may be, but for indices of 64 bits."""
    return not any(
        (len(stored.shape) > 1 and not stored.dtype.is_floating and stored.dtype not in _INDICES)
        or code_owner(base, name) is not None
        for name, stored in base.tensors.items()
    )


def quantized_weights(base: Checkpoint, weights: Iterable[str]) -> frozenset[str]:
    """Those of some weights that the base stores in codes, by their own names or by ones with another prefix.

    Side tensors of their modules are there, or their values are not floats. None where the base is not quantized.
    """
    if quantization_of(base) is None:
        return frozenset()
    modules: set[str] = set()
    for name, stored in base.tensors.items():
        suffix = next((suffix for suffix, _ in _SIDE_TENSORS if name.endswith(suffix)), "")
        if suffix and _is_side(base, name, suffix):
            modules.add(name.removesuffix(suffix))
        elif _is_codes(name, stored):
            modules.add(name.removesuffix(".weight"))
    tails = {tail for module in modules for tail in _tails(module)}
    found = set()
    for weight in weights:
        module, own = weight.removesuffix(".weight"), base.tensors.get(weight)
        if module not in modules and own is not None and own.dtype.is_floating:
            continue
        if module in tails or any(tail in modules for tail in _tails(module)):
            found.add(weight)
    return frozenset(found)


def _tails(module: str) -> Iterator[str]:
    """A module path and its ends of at least two parts: `model.layers.0.q_proj`, `layers.0.q_proj`, `0.q_proj`."""
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(max(1, len(parts) - 1)))


def _is_codes(name: str, stored: StoredTensor) -> bool:
    return name.endswith(".weight") and len(stored.shape) > 1 and not stored.dtype.is_floating


def _is_side(base: Checkpoint, name: str, suffix: str) -> bool:
    """A tensor whose name ends in `_blocks` is one of codes only where scales stand beside it."""
    return suffix != "_blocks" or f"{name.removesuffix(suffix)}_scales" in base.tensors


def _settings(base: Checkpoint) -> Iterator[tuple[FindingLocation, Mapping[str, Json]]]:
    for path, level in levels_of(base.config):
        for key in ("quantization_config", "compression_config"):
            found = level.get(key)
            if isinstance(found, dict):
                yield in_file("config.json", *path, key), found
    for name, value in base.quantization_files.items():
        if isinstance(value, dict):
            inner = value.get("quantization")
            yield in_file(name), inner if isinstance(inner, dict) else value


def _scheme(settings: Mapping[str, Json]) -> str | None:
    method = settings.get("quant_method")
    name = method if isinstance(method, str) and method else None
    algorithm = settings.get("quant_algo")
    if isinstance(algorithm, str) and algorithm:
        return f"{name or 'modelopt'} {algorithm}"
    details = [key.removeprefix("load_in_") for key in ("load_in_4bit", "load_in_8bit") if settings.get(key) is True]
    if details:
        return f"{name or 'bitsandbytes'} {details[0]}"
    if name is None and "w_bit" in settings:
        name = "awq"
    if name is None and "bits" in settings and "group_size" in settings:
        name = "gptq"
    bits = settings.get("bits", settings.get("w_bit"))
    if name is None:
        return "an unnamed method" if settings and not _is_off(settings) else None
    return f"{name} {bits} bits" if isinstance(bits, int) else name


def _is_off(settings: Mapping[str, Json]) -> bool:
    """ModelOpt writes a config without an algorithm for a model that is not quantized."""
    return "quant_algo" in settings and settings["quant_algo"] is None
