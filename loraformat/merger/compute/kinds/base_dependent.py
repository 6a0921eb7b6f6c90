"""Updates that are computed from values of the base, made ready for a merge: of whole matrices, or window by window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.errors import MergeError, NonFiniteValue, ShapeMismatch
from loraformat.merger.compute.kinds.placement import Placement, Windows
from loraformat.merger.compute.kinds.steps import Multiplication, Step, finite
from loraformat.merger.compute.kinds.sums import dense, low_rank
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import BiasFromWeight, Dense, FRoD, LowRank, SubtractedInit, Update, WeightNetwork

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Singular values that differ by less, relative to the greatest, have no order that two machines agree on (float32).
_LEAST_GAP = 2.0**-23
_LEAST_LENGTH = 1e-12
_LEAST_SINGULAR = 1e-6


def part_of_base(update: SubtractedInit, stored: Tensor, *, transposed: bool, where: str) -> LowRank:
    """What an initialisation took off a base matrix, as the low-rank update that takes it off again.

    Args:
        stored: the un-merged matrix as it is stored, float32 or float64.
        transposed: whether that is (in, out).
        where: for messages.

    Raises:
        MergeError (LF206): "olora" and the scale is unknown. (LF801): the part is not determined, since singular
            values at its border are equal.
        ShapeMismatch (LF302): the matrix has fewer singular values than the rank.
        NonFiniteValue (LF402): the matrix holds NaN or infinity.

    Source: peft 0.21.2, tuners/lora/layer.py `pissa_init`, `olora_init`; tuners/lora/variants.py `KasaLinearVariant`;
    tuners/osf/utils.py `decompose_weight_matrix`.
    """
    import torch

    rank = update.rank
    if rank > min(stored.shape):
        raise ShapeMismatch(f"rank {rank} is above those of a {tuple(stored.shape)} matrix", where=where)
    _check_finite(stored, where)
    if update.recipe == "olora":
        if update.scale is None:
            raise MergeError("the scale is unknown: nobody stated alpha", where=where, hint="give it with --alpha A")
        left, right = torch.linalg.qr(stored)
        left, right, factor = left[:, :rank], right[:rank], -update.scale
    else:
        left, values, right = torch.linalg.svd(stored, full_matrices=False)
        border = rank if update.recipe == "pissa" else len(values) - rank
        _check_border(values, border, where)
        kept = slice(None, border) if update.recipe == "pissa" else slice(border, None)
        left, right, factor = left[:, kept] * values[kept], right[kept], -1.0
    if transposed:
        left, right = right.T, left.T
    return LowRank(LazyTensor.of(left.contiguous()), LazyTensor.of(right.contiguous()), factor)


def _check_border(values: Tensor, border: int, where: str) -> None:
    """Refuse a border between equal singular values: which of their vectors lie on which side is nobody's choice."""
    if not 0 < border < len(values):
        return
    least = float(values[0]) * _LEAST_GAP
    if float(values[border]) > least and float(values[border - 1] - values[border]) <= least:
        raise MergeError(
            f"singular values {border} and {border + 1} of the base weight are equal in float32, so the part that the "
            "adapter replaces is not determined",
            where=where,
        )


def network_of_weight(update: WeightNetwork, windows: Windows, *, transposed: bool, where: str) -> LowRank:
    """What the network of an update makes of the base's matrix, as a low-rank update.

    Args: windows: of the un-merged matrix; transposed, where: see `part_of_base`.
    Raises: NonFiniteValue (LF402): a factor or the matrix holds NaN or infinity.
    """
    import torch

    down = _double(update.down, where)
    found: Tensor | None = None
    parts: list[Tensor] = []
    for start, values in _doubles(windows, where):
        if transposed:
            parts.append(down @ values.T)
        else:
            part = down[:, start : start + len(values)] @ values
            found = part if found is None else found.add_(part)
    if parts:
        found = torch.cat(parts, dim=1)
    assert found is not None
    return LowRank(update.up, LazyTensor.of(_through(update, found, where)), update.scale)


def _through(update: WeightNetwork, values: Tensor, where: str) -> Tensor:
    """What f makes of (rank, in) values: see WeightNetwork."""
    if update.activation is None:
        return values
    activation = _activation(update.activation)
    hidden, given = activation(values), []
    for encoder in update.encoders:
        given.append(hidden)
        hidden = activation(_double(encoder, where) @ hidden)
    for decoder in update.decoders:
        hidden = activation(_double(decoder, where) @ hidden) + given.pop()
    return hidden


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """One of ACTIVATIONS. Source: transformers 5.23.0, activations.py."""
    import torch
    from torch.nn import functional

    def curve(values: Tensor) -> Tensor:
        return functional.gelu(values, approximate="tanh")

    known: dict[str, Callable[[Tensor], Tensor]] = {
        **dict.fromkeys(("gelu", "gelu_python"), functional.gelu),
        **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), curve),
        **dict.fromkeys(("silu", "swish"), functional.silu),
        "gelu_10": lambda values: functional.gelu(values).clamp(-10, 10),
        "hardswish": functional.hardswish,
        "laplace": lambda values: (1 + torch.erf((values - 0.707107) / (0.282095 * 2**0.5))) / 2,
        "leaky_relu": functional.leaky_relu,
        "linear": lambda values: values,
        "mish": functional.mish,
        "quick_gelu": lambda values: values * torch.sigmoid(1.702 * values),
        "relu": torch.relu,
        "relu2": lambda values: torch.relu(values).square(),
        "relu6": functional.relu6,
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda values: functional.softplus(values).sqrt(),
        "tanh": torch.tanh,
    }
    return known[name]


def bias_change(update: BiasFromWeight, windows: Windows, *, transposed: bool, where: str) -> Dense:
    """W c as a dense update of the bias. Arguments as for `network_of_weight`; the windows are those of W."""
    import torch

    vector = _double(update.vector, where).flatten()
    total = torch.zeros(update.length, dtype=torch.float64)
    for start, values in _doubles(windows, where):
        if transposed:
            total += vector[start : start + len(values)] @ values
        else:
            total[start : start + len(values)] = values @ vector
    return Dense(LazyTensor.of(total))


def in_shared_basis(
    update: FRoD, windows: Windows, *, transposed: bool, rows: int, dtype: torch.dtype, where: str
) -> Multiplication:
    """U core, from rows of W; on transposed storage all rows stand together. It is computed in float64.

    Args:
        rows: of the stored tensor.
        dtype: of the values that come in and out.
        windows, transposed, where: as for `network_of_weight`.
    """
    import torch

    basis, core = (_double(factor, where) for factor in (update.basis, update.core))
    coded = _inverse(basis)
    squares = torch.zeros(len(basis), dtype=torch.float64)
    if transposed:
        for _, values in _together(windows, where):
            squares = coded(values.T).square().sum(dim=0)
    else:
        for _, values in _doubles(windows, where):
            squares += coded(values).square().sum(dim=0)
    lengths = squares.sqrt()
    scales = torch.where(lengths > _LEAST_LENGTH, 1 / lengths, torch.zeros(()))
    narrow = update.basis.dtype.torch

    def transform(values: Tensor, _start: int, _stop: int) -> Tensor:
        outputs = values.T if transposed else values
        unit = (coded(outputs.to(torch.float64)) * scales).to(torch.float32).to(narrow).to(torch.float64)
        result = unit @ core
        return (result.T if transposed else result).to(dtype)

    return Multiplication(transform, rows if transposed else 1, is_sum=True)


def _subtracted_init(update: SubtractedInit, place: Placement) -> Step:
    found = part_of_base(update, place.base().whole(), transposed=place.transposed, where=place.where)
    return low_rank(found, place)


def _weight_network(update: WeightNetwork, place: Placement) -> Step:
    found = network_of_weight(update, place.base().windows(), transposed=place.transposed, where=place.where)
    return low_rank(found, place)


def _frod(update: FRoD, place: Placement) -> Step:
    windows, rows = place.base().windows(), place.shape[0]
    return in_shared_basis(
        update, windows, transposed=place.transposed, rows=rows, dtype=place.dtype, where=place.where
    )


def _bias_from_weight(update: BiasFromWeight, place: Placement) -> Step:
    windows, transposed = place.base().operand()
    return dense(bias_change(update, windows, transposed=transposed, where=place.where), place)


# How each of these kinds is made ready, by its class.
BASE_DEPENDENT: Mapping[type[Update], Callable[[Any, Placement], Step]] = {
    SubtractedInit: _subtracted_init,
    WeightNetwork: _weight_network,
    FRoD: _frod,
    BiasFromWeight: _bias_from_weight,
}


def _inverse(basis: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that gives values @ basis⁻ᵀ, with the pseudo-inverse where there is no inverse."""
    import torch

    factors, pivots, info = torch.linalg.lu_factor_ex(basis)
    if not int(info):
        return lambda values: torch.linalg.lu_solve(factors, pivots, values.T).T
    inverse = torch.linalg.pinv(basis, rtol=_LEAST_SINGULAR).T
    return lambda values: values @ inverse


def _together(windows: Windows, where: str) -> Windows:
    """All rows as one window, in float64."""
    import torch

    yield 0, torch.cat([rows for _, rows in _doubles(windows, where)])


def _doubles(windows: Windows, where: str) -> Windows:
    """The windows in float64."""
    import torch

    for start, rows in windows:
        _check_finite(rows, where)
        yield start, rows.to(torch.float64)


def _check_finite(values: Tensor, where: str) -> None:
    """Refuse values of the base of which one would spoil all that is computed from them."""
    if not bool(values.isfinite().all()):
        text = "the base weight holds NaN or infinity, and the update is computed from all of its values"
        raise NonFiniteValue(text, where=where)


def _double(factor: LazyTensor, where: str) -> Tensor:
    import torch

    return finite(factor.torch().to(torch.float64), where)
