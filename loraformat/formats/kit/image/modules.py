"""The tensors of one module combined into updates: LoRA and its variants, LoHa, LoKr, dense deltas.

Source: sd-scripts 48d368fa, networks/lora.py; lycoris_lora 4.1.3, lycoris/modules and functional; ComfyUI 0.26.1,
comfy/lora.py and comfy/weight_adapter.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping

from loraformat.diagnostics import in_weights
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats.kit import factors
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.image.names import RawModule
from loraformat.formats.kit.scaling import MAX_RANK, Scaling, agreed, option_of, scale_of
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Magnitude, Replace, Update

WEIGHT, BIAS = "weight", "bias"
Parts = Mapping[str, LazyTensor]
Chains = dict[str, tuple[Update, ...]]

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOW_RANK = ("down", "up", "mid", "up_bias")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class Incomplete(Exception):
    """Tensors of a module that do not make an update; the text says why."""


def chains_of(module: RawModule, stated: Callable[[RawModule, int], float | None], hints: Hints) -> Chains:
    """Parameter of the module ("weight", "bias") → its updates.

    Args:
        stated: the scale that the file's header gives the module of a rank, or None.

    Raises:
        Incomplete: a tensor is missing, does not fit, or nobody knows what to do with it.
        UnsupportedUpdate (LF013): an algorithm that is not a sum of matrices.
        ConfigError (LF103): alpha is not a finite number, or another one in the header.
    """
    parts = module.parts
    foreign = next((role.partition(":")[2] for role in parts if role.startswith("foreign:")), None)
    if foreign is not None:
        raise UnsupportedUpdate(f"updates of {foreign} are not supported", where=in_weights(module.name))
    weight: list[Update] = []
    bias: list[Update] = []
    if "reshape_weight" in parts:
        raise UnsupportedUpdate("weights that grow (reshape_weight) are not supported", where=in_weights(module.name))
    if "set_weight" in parts:
        weight.append(Replace(parts["set_weight"]))
    product = _product(module, _Scale(module, stated, hints))
    if product is not None:
        weight.append(product)
    if "up_bias" in parts:
        if not isinstance(product, LowRank):
            raise Incomplete("a bias of lora_B without lora_A and lora_B")
        bias.append(Dense(parts["up_bias"], product.scale))
    if "diff" in parts:
        weight.append(Dense(parts["diff"]))
    if "diff_b" in parts:
        bias.append(Dense(parts["diff_b"]))
    if not weight and not bias:
        raise Incomplete(f"{', '.join(sorted(parts))} without other tensors of the module")
    return {name: tuple(chain) for name, chain in ((WEIGHT, weight), (BIAS, bias)) if chain}


class _Scale:
    """The scale of a module: its alpha, what the header says, or what the caller says; without any of them it is 1."""

    def __init__(self, module: RawModule, stated: Callable[[RawModule, int], float | None], hints: Hints) -> None:
        self._module, self._stated, self._hints = module, stated, hints

    def _alpha(self) -> float | None:
        """Raises: ConfigError (LF103): alpha is not one finite number other than 0."""
        tensor = self._module.parts.get("alpha")
        if tensor is None:
            return None
        where = in_weights(self._module.names["alpha"])
        if tensor.numel != 1:
            raise ConfigError(f"alpha: expected one number, found a tensor {tensor.shape}", where=where)
        value = _number_of(tensor)
        if not math.isfinite(value):
            raise ConfigError(f"alpha: expected a finite number, found {value}", where=where)
        if value == 0:
            # sd-scripts 48d368fa, networks/lora.py: `alpha = self.lora_dim if alpha is None or alpha == 0`.
            hint = "write the alpha used in training into the file"
            raise ConfigError(
                "alpha is 0, which sd-scripts replaces by the rank and other programs take as no update",
                where=where,
                hint=hint,
            )
        return value

    def of(self, rank: int) -> float:
        """The factor for a rank. Raises: ConfigError (LF103), AssumptionContradicted (LF024): two differ."""
        if not 1 <= rank <= MAX_RANK:
            raise Incomplete(f"rank {rank}")
        where = in_weights(self._module.name)
        alpha, stated = self._alpha(), self._stated(self._module, rank)
        own = None if alpha is None else alpha / rank
        if own is not None and stated is not None and not math.isclose(own, stated, rel_tol=4e-3):
            # alpha is stored in the dtype of the file: bfloat16 rounds by 2⁻⁸
            raise ConfigError(
                f"alpha {alpha:g} gives a scale of {own:g}, but lora_adapter_metadata states {stated:g}", where=where
            )
        if own is None and stated is not None:
            hinted = self._hints.scale if self._hints.alpha is None else self._hints.alpha / rank
            return agreed(stated, hinted, "a scale of", where, option=option_of(self._hints)) or stated
        found = scale_of(alpha, rank, Scaling(), self._hints, where)
        return 1.0 if found is None else found


_CODES = {
    DType.F64: "<d",
    DType.F32: "<f",
    DType.F16: "<e",
    DType.I64: "<q",
    DType.I32: "<i",
    DType.I16: "<h",
    DType.I8: "<b",
    DType.U64: "<Q",
    DType.U32: "<I",
    DType.U16: "<H",
    DType.U8: "<B",
}


def _number_of(tensor: LazyTensor) -> float:
    """The one value of a tensor; by its bytes, since headers are read without numpy."""
    rows = tensor.shape[0] if tensor.shape else 1
    if tensor.raw is not None and tensor.dtype is DType.BF16:  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + bytes(tensor.raw(0, rows)))[0])
    if tensor.raw is not None and tensor.dtype in _CODES:
        return float(struct.unpack(_CODES[tensor.dtype], bytes(tensor.raw(0, rows)))[0])
    return float(tensor.load().reshape(()))


def _product(module: RawModule, scale: _Scale) -> LowRank | Hadamard | Kronecker | None:
    parts = module.parts
    kinds = {
        "LoRA": any(role in parts for role in _LOW_RANK),
        "LoHa": any(role.startswith("hada_") for role in parts),
        "LoKr": any(role in parts for role in _LOKR),
    }
    there = [kind for kind, is_there in kinds.items() if is_there]
    if len(there) > 1:
        raise Incomplete(f"tensors of {' and of '.join(there)}")
    if not there:
        if "dora_scale" in parts or "magnitude" in parts:
            raise Incomplete("a DoRA magnitude without factors")
        return None
    if there != ["LoRA"] and ("dora_scale" in parts or "magnitude" in parts):
        raise UnsupportedUpdate(f"DoRA of {there[0]} is not supported", where=in_weights(module.name))
    return _BUILDERS[there[0]](parts, scale)


def _low_rank(parts: Parts, scale: _Scale) -> LowRank:
    missing = [name for name, role in (("lora_down", "down"), ("lora_up", "up")) if role not in parts]
    if missing:
        raise Incomplete(f"{missing[0]} is missing")
    down, up = parts["down"], parts["up"]
    if len(down.shape) < 2 or len(up.shape) < 2 or not down.numel or not up.numel:
        raise Incomplete(f"lora_down {down.shape} and lora_up {up.shape} are not a factor pair")
    if up.shape[1] != (parts["mid"].shape[:1] or (0,))[0] if "mid" in parts else up.shape[1] != down.shape[0]:
        raise Incomplete(f"lora_down {down.shape} does not fit lora_up {up.shape}")
    factor = scale.of(down.shape[0])
    magnitude = _magnitude(parts, up.shape[0])
    if "mid" in parts:
        return _with_core(parts, factor, magnitude)
    found = factors.linear(down, up, factor)
    if len(found.down.shape) != 2 or len(found.up.shape) != 2:
        raise Incomplete(f"lora_down {down.shape} and lora_up {up.shape} fit neither a linear layer nor a convolution")
    return LowRank(found.up, found.down, factor, magnitude, found.kernel)


def _with_core(parts: Parts, scale: float, magnitude: Magnitude | None) -> LowRank:
    """CP decomposition of a convolution: down (rank, in, 1, 1), mid (rank, rank, *kernel), up (out, rank, 1, 1)."""
    down, mid, up = parts["down"], parts["mid"], parts["up"]
    ends_are_points = all(size == 1 for size in (*down.shape[2:], *up.shape[2:]))
    if len(mid.shape) not in (3, 4, 5) or not ends_are_points or mid.shape[1] != down.shape[0]:
        raise Incomplete(f"lora_mid {mid.shape} does not fit lora_down {down.shape} and lora_up {up.shape}")
    core = factors.folded_core(mid, down.reshape(*down.shape[:2]))
    return LowRank(up.reshape(*up.shape[:2]), core, scale, magnitude, mid.shape[2:])


def _magnitude(parts: Parts, rows: int) -> Magnitude | None:
    """DoRA's vector; by its shape one value for each output, or one for each input.

    (out, 1 …) and (out,) are one for each output, (1, in …) one for each input; PEFT has (1, out, …) for a convolution.
    """
    vector = parts.get("magnitude", parts.get("dora_scale"))
    if vector is None:
        return None
    if "dora_scale" in parts and "magnitude" in parts:
        raise Incomplete("two DoRA magnitudes")
    shape, count = vector.shape, vector.numel
    large = [size for size in shape if size != 1]
    if not count or len(large) > 1:
        raise Incomplete(f"a DoRA magnitude {shape} with more than one long axis")
    is_by_input = (
        "dora_scale" in parts and len(shape) > 1 and shape[0] == 1 and shape != (rows,) + (1,) * len(shape[1:])
    )
    if not is_by_input and count != rows:
        raise Incomplete(f"a DoRA magnitude {shape} for {rows} outputs")
    return Magnitude(vector.reshape(count), 0 if is_by_input else 1)


def _hadamard(parts: Parts, scale: _Scale) -> Hadamard:
    missing = [role for role in _HADA if role not in parts]
    if missing:
        raise Incomplete(f"{missing[0]} is missing")
    sides = [_hada_side(parts, number) for number in (1, 2)]
    (up1, down1), (up2, down2) = sides
    found = Hadamard(up1, down1, up2, down2, scale.of(parts["hada_w1_b"].shape[0] if parts["hada_w1_b"].shape else 0))
    if not found.is_even:
        raise Incomplete("the factors of LoHa do not fit each other")
    return found


def _hada_side(parts: Parts, number: int) -> tuple[LazyTensor, LazyTensor]:
    a, b, core = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"], parts.get(f"hada_t{number}")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise Incomplete(f"hada_w{number}_a {a.shape} and hada_w{number}_b {b.shape} are not matrices")
    if core is None:
        return a, b
    if len(core.shape) not in (3, 4, 5) or core.shape[:2] != (a.shape[0], b.shape[0]):
        raise Incomplete(f"hada_t{number} {core.shape} does not fit its factors")
    return a.T, factors.folded_core(core, b)


def _kronecker(parts: Parts, scale: _Scale) -> Kronecker:
    left, right = _lokr_side(parts, "lokr_w1", None), _lokr_side(parts, "lokr_w2", parts.get("lokr_t2"))
    # lycoris_lora 4.1.3, modules/lokr.py: the scale is alpha / rank of the last factorized side, and 1 where both are
    # whole, whatever alpha says.
    rank = right[1].shape[0] if len(right) == 2 else left[1].shape[0] if len(left) == 2 else None
    found = Kronecker(left, right, 1.0 if rank is None else scale.of(rank))
    if not found.is_even:
        raise Incomplete("the factors of LoKr do not fit each other")
    return found


def _lokr_side(parts: Parts, name: str, core: LazyTensor | None) -> tuple[LazyTensor, ...]:
    whole, a, b = parts.get(name), parts.get(f"{name}_a"), parts.get(f"{name}_b")
    if whole is not None:
        if a is not None or b is not None or core is not None:
            raise Incomplete(f"{name} together with its own factors")
        if len(whole.shape) < 2 or not whole.numel:
            raise Incomplete(f"{name} {whole.shape} is not a matrix")
        return (whole.reshape(whole.shape[0], math.prod(whole.shape[1:])),)
    if a is None or b is None:
        raise Incomplete(f"{name} is missing")
    if len(a.shape) < 2 or len(b.shape) < 2 or not a.numel or not b.numel:
        raise Incomplete(f"{name}_a {a.shape} and {name}_b {b.shape} are not a factor pair")
    if core is None:
        return a.reshape(a.shape[0], math.prod(a.shape[1:])), b.reshape(b.shape[0], math.prod(b.shape[1:]))
    if len(core.shape) not in (3, 4, 5) or core.shape[:2] != (a.shape[0], b.shape[0]) or len(a.shape) != 2:
        raise Incomplete(f"lokr_t2 {core.shape} does not fit its factors")
    return a.T, factors.folded_core(core, b)


_BUILDERS: Mapping[str, Callable[[Parts, _Scale], LowRank | Hadamard | Kronecker]] = {
    "LoRA": _low_rank,
    "LoHa": _hadamard,
    "LoKr": _kronecker,
}
