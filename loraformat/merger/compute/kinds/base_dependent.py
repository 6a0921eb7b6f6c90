"""Updates that are computed from values of the base, made ready for a merge: of whole matrices, or window by window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.arithmetic import TILE, column_squares, multiply, orthonormal, solved
from loraformat.errors import MergeError, NonFiniteValue, ShapeMismatch
from loraformat.merger.compute.kinds.activations import CURVES
from loraformat.merger.compute.kinds.placement import Placement, Windows
from loraformat.merger.compute.kinds.steps import Multiplication, Step, finite
from loraformat.merger.compute.kinds.sums import dense, low_rank
from loraformat.model.tensors import LazyTensor, rounded
from loraformat.model.updates import BiasFromWeight, Dense, FRoD, LowRank, SubtractedInit, Update, WeightNetwork

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

# Singular values that differ by less, relative to the greatest, have no order that two machines agree on (float32).
_LEAST_GAP = 2.0**-23
_LEAST_LENGTH = 1e-12
_LEAST_SINGULAR = 1e-6


def part_of_base(update: SubtractedInit, stored: Floats, *, transposed: bool, where: str) -> LowRank:
    """What an initialization took off a base matrix, as the low-rank update that takes it off again.

    Args:
        stored: the un-merged matrix as it is stored.
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
    import numpy as np

    rank = update.rank
    if rank > min(stored.shape):
        raise ShapeMismatch(f"rank {rank} is larger than a {stored.shape} matrix allows", where=where)
    _check_finite(stored, where)
    if update.recipe == "olora":
        if update.scale is None:
            raise MergeError(
                "the scale is unknown because no alpha was stated", where=where, hint="pass it with --alpha A"
            )
        left, factor = orthonormal(stored[:, :rank]), -update.scale
        right = multiply(left.T, stored)
    else:
        left, values, right = np.linalg.svd(stored, full_matrices=False)
        border = rank if update.recipe == "pissa" else len(values) - rank
        _check_border(values, border, where)
        kept = slice(None, border) if update.recipe == "pissa" else slice(border, None)
        left, right, factor = left[:, kept] * values[kept], right[kept], -1.0
    if transposed:
        left, right = right.T, left.T
    return LowRank(LazyTensor.of(left), LazyTensor.of(right), factor)


def _check_border(values: Floats, border: int, where: str) -> None:
    """Refuse a border between equal singular values: which of their vectors lie on which side is nobody's choice."""
    if not 0 < border < len(values):
        return
    least = float(values[0]) * _LEAST_GAP
    if float(values[border]) > least and float(values[border - 1] - values[border]) <= least:
        raise MergeError(
            f"singular values {border} and {border + 1} of the base weight are equal in float32, so the part that the "
            "adapter replaces is ambiguous",
            where=where,
        )


def network_of_weight(update: WeightNetwork, windows: Windows, *, transposed: bool, where: str) -> LowRank:
    """What the network of an update makes of the base's matrix, as a low-rank update.

    Args: windows: of the un-merged matrix; transposed, where: see `part_of_base`.
    Raises: NonFiniteValue (LF402): a factor or the matrix holds NaN or infinity.
    """
    import numpy as np

    down = _double(update.down, where)
    found: Floats | None = None
    parts: list[Floats] = []
    for start, values in _checked(windows, where):
        if transposed:
            parts.append(multiply(down, values.T))
        else:
            part = multiply(down[:, start : start + len(values)], values)
            found = part if found is None else found + part
    if parts:
        found = np.concatenate(parts, axis=1)
    assert found is not None
    return LowRank(update.up, LazyTensor.of(_through(update, found, where)), update.scale)


def _through(update: WeightNetwork, values: Floats, where: str) -> Floats:
    """What f makes of (rank, in) values: see WeightNetwork."""
    if update.activation is None:
        return values
    activation = CURVES[update.activation]
    hidden, given = activation(values), []
    for encoder in update.encoders:
        given.append(hidden)
        hidden = activation(multiply(_double(encoder, where), hidden))
    for decoder in update.decoders:
        hidden = activation(multiply(_double(decoder, where), hidden)) + given.pop()
    return hidden


def bias_change(update: BiasFromWeight, windows: Windows, *, transposed: bool, where: str) -> Dense:
    """W c as a dense update of the bias. Arguments as for `network_of_weight`; the windows are those of W."""
    import numpy as np

    vector = _double(update.vector, where).reshape(-1)
    total = np.zeros(update.length)
    for start, values in _checked(windows, where):
        if transposed:
            total += multiply(vector[None, start : start + len(values)], values)[0]
        else:
            total[start : start + len(values)] = multiply(values, vector[:, None])[:, 0]
    return Dense(LazyTensor.of(total))


def in_shared_basis(update: FRoD, windows: Windows, *, transposed: bool, rows: int, where: str) -> Multiplication:
    """U core, from rows of W; on transposed storage all rows stand together.

    Args:
        rows: of the stored tensor.
        windows, transposed, where: as for `network_of_weight`.
    """
    import numpy as np

    basis, core = (_double(factor, where) for factor in (update.basis, update.core))
    inverse = _inverse(basis)
    squares = np.zeros(len(basis))
    for _, values in _together(windows, where) if transposed else _checked(windows, where):
        outputs = values.T if transposed else values
        for low in range(0, len(outputs), TILE):
            squares += column_squares(multiply(outputs[low : low + TILE], inverse))
    lengths = np.sqrt(squares)
    scales = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > _LEAST_LENGTH)
    narrow = update.basis.dtype

    def transform(values: Floats, _start: int, _stop: int) -> Floats:
        outputs = values.T if transposed else values
        unit = rounded((multiply(outputs, inverse) * scales).astype(np.float32), narrow).astype(np.float64)
        result = multiply(unit, core)
        return result.T if transposed else result

    return Multiplication(transform, rows if transposed else 1, is_sum=True)


def _subtracted_init(update: SubtractedInit, place: Placement) -> Step:
    found = part_of_base(update, place.base().whole(), transposed=place.transposed, where=place.where)
    return low_rank(found, place)


def _weight_network(update: WeightNetwork, place: Placement) -> Step:
    found = network_of_weight(update, place.base().windows(), transposed=place.transposed, where=place.where)
    return low_rank(found, place)


def _frod(update: FRoD, place: Placement) -> Step:
    windows, rows = place.base().windows(), place.shape[0]
    return in_shared_basis(update, windows, transposed=place.transposed, rows=rows, where=place.where)


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


def _inverse(basis: Floats) -> Floats:
    """The transpose of the inverse, or of the pseudo-inverse where there is none."""
    import numpy as np

    inverse: Floats = solved(basis.T[None], np.eye(len(basis))[None])[0]
    return inverse if np.isfinite(inverse).all() else np.asarray(np.linalg.pinv(basis, rcond=_LEAST_SINGULAR).T)


def _together(windows: Windows, where: str) -> Windows:
    """All rows as one window."""
    import numpy as np

    yield 0, np.concatenate([rows for _, rows in _checked(windows, where)])


def _checked(windows: Windows, where: str) -> Windows:
    """The windows, all of whose values are finite."""
    for start, rows in windows:
        _check_finite(rows, where)
        yield start, rows


def _check_finite(values: Floats, where: str) -> None:
    """Refuse values of the base of which one would spoil all that is computed from them."""
    import numpy as np

    if not np.isfinite(values).all():
        text = "the update is computed from the base weight, which holds NaN or infinity"
        raise NonFiniteValue(text, where=where)


def _double(factor: LazyTensor, where: str) -> Floats:
    return finite(factor.load(), where)
