"""Second opinions: updates made dense in float64, and merges computed from them, by other formulas than ours."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from loraformat.model.updates import (
    BiasFromWeight,
    BlockAffine,
    Dense,
    ElementwiseScale,
    FRoD,
    Hadamard,
    Kronecker,
    LowRank,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    Update,
    WeightNetwork,
)


def dense(update: Update) -> Tensor:
    """What an additive update adds, in float64, in the shape of its weight (Linear orientation)."""
    match update:
        case LowRank():
            up, down = update.up.torch().double(), update.down.torch().double()
            if update.is_stack:
                return update.scale * torch.einsum("eor,eri->eoi", up, down)
            return (update.scale * torch.einsum("or,ri->oi", up, down.reshape(down.shape[0], -1))).reshape(update.shape)
        case Hadamard():
            first = torch.einsum("or,ri->oi", update.up1.torch().double(), update.down1.torch().double())
            second = torch.einsum("or,ri->oi", update.up2.torch().double(), update.down2.torch().double())
            return update.scale * first * second
        case Kronecker():
            left, right = (_chain(factors) for factors in (update.left, update.right))
            return update.scale * torch.kron(left, right)
        case Dense():
            return update.scale * update.delta.torch().double()
        case _:
            raise TypeError(type(update))


def merged(
    weight: Tensor, updates: list[Update], *, transposed: bool = False, others: dict[str, Tensor] | None = None
) -> Tensor:
    """The weight with all updates applied in order, in float64, not rounded. For one DoRA update at the most.

    Args: others: base weights that `BiasFromWeight` names, in Linear orientation.
    """
    value = weight.double()
    for update in updates:
        if isinstance(update, Replace):
            value = update.value.torch().double()
        elif isinstance(update, Rows):
            rows = max(value.shape[0], max(update.indices) + 1)
            grown = torch.zeros(rows, value.shape[1], dtype=torch.float64)
            grown[: value.shape[0]] = value
            grown[list(update.indices)] = update.values.torch().double()
            value = grown
    origin = value
    for update in updates:
        if isinstance(update, (Replace, Rows)):
            continue
        if isinstance(update, (Scaled, Rotated, Multiplied, ElementwiseScale, BlockAffine)):
            is_sum = isinstance(update, ElementwiseScale) or (isinstance(update, Scaled) and update.is_sum)
            of = origin if is_sum else value
            changed = _factored(of.T, update).T if transposed else _factored(of, update)
            value = value + changed - of if of is origin else changed
            continue
        if isinstance(update, (WeightNetwork, FRoD, BiasFromWeight)):
            change = _of_base(origin.T if transposed else origin, update, others or {})
            value = value + (change.T if transposed else change)
            continue
        delta = dense(update)
        if transposed:
            delta = delta.T
        if isinstance(update, LowRank) and update.magnitude is not None:
            value = _dora(value, origin, delta, update, transposed=transposed)
        else:
            value = value + delta
    return value


def _of_base(value: Tensor, update: WeightNetwork | FRoD | BiasFromWeight, others: dict[str, Tensor]) -> Tensor:
    """What is added to the base's values: column by column, or from an explicit inverse."""
    if isinstance(update, BiasFromWeight):
        return torch.einsum("oi,i->o", others[update.weight].double(), update.vector.torch().double())
    if isinstance(update, WeightNetwork):
        up, down = update.up.torch().double(), update.down.torch().double()
        columns = [up @ _through(down @ column, update) for column in value.T]
        return update.scale * torch.stack(columns, dim=1)
    basis, core = update.basis.torch().double(), update.core.torch().double()
    coded = value @ torch.linalg.inv(basis).T
    unit = (coded / coded.norm(dim=0)).float().to(update.basis.torch().dtype).double()
    return unit @ core - value


def _through(hidden: Tensor, update: WeightNetwork) -> Tensor:
    if update.activation is None:
        return hidden
    assert update.activation == "tanh"
    hidden = hidden.tanh()
    given = [hidden]
    for encoder in update.encoders:
        given.append((encoder.torch().double() @ given[-1]).tanh())
    hidden = given[-1]
    for number, decoder in enumerate(update.decoders):
        hidden = (decoder.torch().double() @ hidden).tanh() + given[len(update.decoders) - 1 - number]
    return hidden


def _factored(value: Tensor, update: Scaled | Rotated | Multiplied | ElementwiseScale | BlockAffine) -> Tensor:
    """The whole factor as one dense matrix, (out, out) on the left or (in, in) on the right."""
    flat = value.reshape(value.shape[0], -1)
    if isinstance(update, BlockAffine):
        bands = []
        for block, band in zip(update.blocks.torch().double(), flat.split(update.size), strict=True):
            whole = torch.block_diag(*[block] * (flat.shape[1] // update.size))
            bands.append(band + band @ whole + block.repeat(1, flat.shape[1] // update.size))
        return torch.cat(bands)
    if isinstance(update, Scaled):
        rows = torch.ones(value.shape[0]).double() if update.rows is None else update.rows.torch().double()
        kernel = flat.shape[1] // (value.shape[1] if value.ndim > 1 else 1)
        cols = None if update.cols is None else torch.kron(update.cols.torch().double(), torch.ones(kernel).double())
        flat = torch.diag(rows) @ flat
        return (flat if cols is None else flat @ torch.diag(cols)).reshape(value.shape)
    if isinstance(update, ElementwiseScale):
        return value * (1 + torch.einsum("or,ri->oi", update.up.torch().double(), update.down.torch().double()))
    if isinstance(update, Multiplied):
        factor = torch.eye(flat.shape[1]).double() + update.up.torch().double() @ update.down.torch().double()
        return (flat @ factor).reshape(value.shape)
    blocks = list(update.blocks.torch().double())
    length = flat.shape[0] if update.side == "left" else flat.shape[1]
    factor = torch.block_diag(*(blocks * (length // update.size) if update.is_shared else blocks))
    if update.order is not None:
        place = torch.eye(length).double()[list(update.order)]
        factor = place.T @ factor @ place
    return (factor @ flat if update.side == "left" else flat @ factor).reshape(value.shape)


def _dora(value: Tensor, origin: Tensor, delta: Tensor, update: LowRank, *, transposed: bool) -> Tensor:
    turned = (origin + delta).T if transposed else origin + delta
    flat = turned.reshape(turned.shape[0], -1)
    vector = update.magnitude.vector.torch().double().flatten()
    norms = flat.pow(2).sum(dim=1 if update.magnitude.axis == 1 else 0).sqrt()
    factor = (vector / norms).reshape(-1, 1) if update.magnitude.axis == 1 else (vector / norms).reshape(1, -1)
    running = (value + delta).T if transposed else value + delta
    result = (running.reshape(flat.shape) * factor).reshape(running.shape)
    return result.T if transposed else result


def _chain(factors: tuple) -> Tensor:
    values = [factor.torch().double() for factor in factors]
    return values[0] if len(values) == 1 else values[0] @ values[1]


# Values next to the middle between two 16-bit floats, at the ends of their ranges, and none at all.
HARD = [
    *(1 + 2.0**-8 + sign * 2.0**-k for k in (20, 24, 25, 40, 52) for sign in (1, -1)),
    *(1 + 2.0**-11 + sign * 2.0**-k for k in (24, 25, 40, 52) for sign in (1, -1)),
    *(3 * 2.0**-9, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65519.99999999999, 65520.0, 3.3895e38, 3.4e38, 3.5e38, 1e300),
    *(2.0**-24, 2.0**-25, 2.0**-25 + 2.0**-60, 2.0**-133, 2.0**-134, 2.0**-134 + 2.0**-180, 1e-310, 0.0),
    *(float("inf"), float("nan")),
]


def rounded_exactly(value: float, dtype: torch.dtype) -> float:
    """The value of `dtype` nearest to `value`, ties to even, by comparing fractions."""
    if value != value or value in (float("inf"), float("-inf")):
        return value
    info = torch.finfo(dtype)
    digits, lowest = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}[dtype]
    if value == 0:
        return value
    exponent = max(torch.frexp(torch.tensor(abs(value), dtype=torch.float64))[1].item() - digits, lowest)
    steps = Fraction(abs(value)) / Fraction(2) ** exponent
    whole, rest = divmod(steps, 1)
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)
    result = Fraction(whole) * Fraction(2) ** exponent
    size = float("inf") if result > Fraction(info.max) else float(result)
    return size if value > 0 else -size
