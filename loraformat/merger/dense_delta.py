"""What an adapter adds to one weight, dense: ΔW = W' - W in the orientation of the weight as the model has it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

from loraformat.arithmetic import multiply
from loraformat.diagnostics import did_you_mean, show
from loraformat.errors import NonFiniteValue, ShapeMismatch, UnmatchedUpdate, UsageError, require_one_of
from loraformat.matching import WHOLE, RowMap, match
from loraformat.merger.compute.kinds.steps import not_finite, stated_scale
from loraformat.merger.compute.windows import Resources
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Edit, Term
from loraformat.merger.plan.edits import edit_of, edits_of
from loraformat.merger.plan.layer_replication import as_written
from loraformat.merger.preview import Preview, height_of
from loraformat.model.adapter import Adapter, AdapterConfig, module_of
from loraformat.model.checkpoint import BaseWeight, Checkpoint, StoredTensor
from loraformat.model.floats import float64_of
from loraformat.model.tensors import LazyTensor, Span
from loraformat.model.updates import (
    BiasFromWeight,
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    SubtractedInit,
    Update,
    kind_of,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_Sum: TypeAlias = Union[LowRank, Hadamard, Kronecker, Dense]


def delta(
    adapter: Adapter,
    weight: str,
    base: Checkpoint | NDArray[Any] | None = None,
    *,
    dtype: str = "float32",
) -> NDArray[np.float32] | NDArray[np.float64]:
    """The dense ΔW of one weight, in the shape that the weight has in the model; the same as `Adapter.delta`.

    >>> import loraformat
    >>> adapter = loraformat.load_adapter("fixtures/good/peft/tiny-llama")
    >>> loraformat.delta(adapter, "model.layers.0.self_attn.v_proj.weight", dtype="float64").dtype
    dtype('float64')

    Raises: see `Adapter.delta`.
    """
    require_one_of(dtype, ("float32", "float64"), "dtype")
    given: object = adapter
    if not isinstance(given, Adapter):
        raise UsageError(
            f"expected an Adapter, found {type(given).__name__}", where="adapter", hint="load_adapter(PATH)"
        )
    name: object = weight
    if not isinstance(name, str):
        raise UsageError(f"expected the name of a weight, found {type(name).__name__}", where="weight")
    chain = adapter.updates.get(weight)
    if chain is None:
        hint = did_you_mean(weight, adapter.updates)
        raise UsageError(f"the adapter has no update for {show(weight, 200)}", where="weight", hint=hint.strip())
    import numpy as np

    found = _dense(adapter, weight, chain, base)
    with np.errstate(over="ignore"):
        rounded: NDArray[np.float32] | NDArray[np.float64] = found.astype(dtype)
    if np.isfinite(found).all() and not np.isfinite(rounded).all():
        raise NonFiniteValue(f"the update overflows {dtype}", where=weight, hint='use dtype="float64"')
    return rounded


def _dense(adapter: Adapter, weight: str, chain: tuple[Update, ...], base: Checkpoint | NDArray[Any] | None) -> Floats:
    import numpy as np

    sums = [update for update in chain if _is_sum(update)]
    if len(sums) == len(chain):
        total = _sum_of(sums[0], weight)
        for update in sums[1:]:
            total = total + _sum_of(update, weight)
        return total.reshape(_shape_in(adapter, weight, sums, base) or total.shape)
    if isinstance(base, Checkpoint):
        written, edits = _edits(_Same(adapter), _Same(base))
        return _difference(adapter, weight, written, edits)
    if base is None:
        needing = [kind for kind in map(kind_of, chain) if kind.needs_base]
        if needing or 0 in chain[0].shape:  # an axis that only the base tells
            kind = needing[0] if needing else kind_of(chain[0])
            text = f"{weight}: an update of kind {kind.name} depends on the base"
            raise UsageError(text, where="delta", hint="pass base=open_checkpoint(PATH), or the values of the weight")
        base = np.zeros(chain[0].shape)
    return _of_values(adapter, weight, chain, base)


def _is_sum(update: Update) -> TypeGuard[_Sum]:
    """Whether what is added does not depend on the base, and is computed here by itself."""
    return isinstance(update, (LowRank, Hadamard, Kronecker, Dense)) and not kind_of(update).needs_base


def _sum_of(update: _Sum, weight: str) -> Floats:
    """What is added, in the shape of the update.

    Raises: MergeError (LF206): the scale is unknown. NonFiniteValue (LF402): the update holds NaN or infinity.
        ShapeMismatch (LF302): its factors are not a product.
    """
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):
        match update:
            case LowRank():
                unscaled = _product(update.up, update.down, weight).reshape(update.shape)
            case Hadamard():
                first, second = (update.up1, update.down1), (update.up2, update.down2)
                unscaled = _product(*first, weight) * _product(*second, weight)
            case Kronecker():
                left, right = _chain(update.left, weight), _chain(update.right, weight)
                unscaled = np.asarray(np.kron(left, right), np.float64)
            case Dense():
                unscaled = float64_of(update.delta)
        found: Floats = unscaled * stated_scale(update.scale, weight)
    if not np.isfinite(found).all():
        raise not_finite(weight)
    return found


def _chain(factors: tuple[LazyTensor, ...], weight: str) -> Floats:
    return _product(*factors, weight) if len(factors) == 2 else _matrix(factors[0])


def _product(up: LazyTensor, down: LazyTensor, weight: str) -> Floats:
    """(rows, rank) @ (rank, cols), or a stack of them."""
    is_stack = len(up.shape) == len(down.shape) == 3 and up.shape[0] == down.shape[0]
    left, right = (float64_of(factor) if is_stack else _matrix(factor) for factor in (up, down))
    if left.shape[-1] != right.shape[-2]:
        raise ShapeMismatch(f"factors of shapes {up.shape} and {down.shape} cannot be multiplied", where=weight)
    return multiply(left, right)


def _matrix(factor: LazyTensor) -> Floats:
    """All values with trailing axes flattened (a convolution's kernel)."""
    values = float64_of(factor)
    return values.reshape(values.shape[0], -1) if values.ndim else values.reshape(1, 1)


def _shape_in(
    adapter: Adapter, weight: str, sums: Sequence[_Sum], base: Checkpoint | NDArray[Any] | None
) -> tuple[int, ...]:
    """The shape of the weight where the base tells what the update does not: the kernel of a convolution; else ()."""
    if base is None:
        return ()
    if not isinstance(base, Checkpoint):
        shape = _array(base).shape
        expected = sums[0].shape
        if shape != expected and (not shape or (shape[0], math.prod(shape[1:])) != expected):
            raise ShapeMismatch(f"the update is {expected}, but the values are {shape}", where=weight)
        return shape
    _, edits = _edits(_Same(adapter), _Same(base))
    shapes = [edit.shape for edit in edits if any(term.weight == weight for term in edit.terms)]
    is_open = any(isinstance(update, (Hadamard, Kronecker)) for update in sums)
    return shapes[0] if is_open and shapes and len(shapes[0]) > 2 else ()


class _Same:
    """An adapter or a base as a key of a cache: itself, not its contents."""

    def __init__(self, value: Adapter | Checkpoint) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


@lru_cache(maxsize=1)  # one weight after the other is asked for
def _edits(adapter: _Same, base: _Same) -> tuple[Checkpoint, tuple[Edit, ...]]:
    """The base as it would be written, and all that a merge would change in it."""
    assert isinstance(adapter.value, Adapter)
    assert isinstance(base.value, Checkpoint)
    written = as_written(base.value, [adapter.value])
    return written, tuple(edits_of(written, [adapter.value]).edits.values())


def _difference(adapter: Adapter, weight: str, base: Checkpoint, edits: Sequence[Edit]) -> Floats:
    """W' - W, put together from the stored tensors that hold the weight.

    Raises: UnmatchedUpdate (LF301): none does: a bias that the base lacks.
    """
    import numpy as np

    inputs = Inputs(base=base, adapters=[adapter])
    pieces: dict[RowMap, tuple[Edit, Floats]] = {}
    is_transposed = False
    for edit in edits:
        terms = tuple(term for term in edit.terms if term.weight == weight)
        fresh = {term.part for term in terms} - set(pieces)
        if not fresh:
            continue
        is_transposed = terms[0].transposed
        changed = _changed(replace(edit, terms=terms), inputs)
        pieces |= {part: (edit, changed[part.at : part.at + height_of(edit, part)]) for part in fresh}
    if not pieces:
        raise UnmatchedUpdate("the base has no such weight", where=weight)
    if WHOLE in pieces:
        edit, values = pieces[WHOLE]
        found = values.reshape(edit.shape)
    else:
        found = _joined(pieces)
    return np.ascontiguousarray(found.swapaxes(-1, -2)) if is_transposed and found.ndim > 1 else found


def _joined(pieces: Mapping[RowMap, tuple[Edit, Floats]]) -> Floats:
    """Runs of rows in their order; where there are experts, those of each, stacked."""
    import numpy as np

    matrices: dict[int, list[Floats]] = {}
    for part, (edit, values) in sorted(pieces.items(), key=lambda item: (item[0].expert or 0, item[0].rows or (0, 0))):
        matrices.setdefault(part.expert or 0, []).append(values.reshape(-1, *edit.shape[edit.row_axes :]))
    experts = [np.concatenate(runs) for runs in matrices.values()]
    return np.stack(experts) if any(part.expert is not None for part in pieces) else experts[0]


def _changed(edit: Edit, inputs: Inputs) -> Floats:
    """(rows, cols) of W' - W of a stored tensor, in float64."""
    import numpy as np

    preview = Preview((), tuple(inputs.update(term) for term in edit.terms), edit, inputs)
    opened, found = preview.open(), np.empty(preview.matrix)
    for start, stop in preview.windows(Resources()):
        rows = opened.base(start, stop)
        found[start:stop] = opened.merged(rows, start) - rows
    return found


def _of_values(adapter: Adapter, weight: str, chain: tuple[Update, ...], base: NDArray[Any]) -> Floats:
    """W' - W for values of W in the orientation of the model.

    Raises: UsageError (LF021): the update is computed from another weight too. ShapeMismatch (LF302): it does not fit.
    """
    if any(isinstance(update, BiasFromWeight) for update in chain):
        text = f"{weight}: the update is computed from another weight of the base"
        raise UsageError(text, where="delta", hint="pass base=open_checkpoint(PATH)")
    values = _array(base)
    # OLoRA's part is that of the matrix as it is stored.
    is_turned = any(isinstance(update, SubtractedInit) for update in chain) and bool(
        adapter.config.claims_transposed(module_of(weight))
    )
    known = _checkpoint_of(weight, LazyTensor.of(values.T.copy() if is_turned else values))
    one = Adapter(config=AdapterConfig(fan_in_fan_out=is_turned), updates={weight: chain})
    matching = match(one, known)
    (landing,) = matching.landings[weight]
    if matching.misfits or landing.transposed != is_turned:
        shape = chain[0].shape
        raise ShapeMismatch(f"the update is {shape}, but the values are {values.shape}", where=weight)
    terms = [Term(0, weight, index, is_turned) for index in range(len(chain))]
    return _difference(one, weight, known, [edit_of(weight, weight, terms, known, [one])])


def _array(base: NDArray[Any]) -> Floats:
    """Values of the caller as float64 in memory of their own."""
    import numpy as np

    given: object = base
    if isinstance(given, (str, os.PathLike)) or not hasattr(given, "__array__"):
        text = f"expected a Checkpoint or an array, found {type(given).__name__}"
        raise UsageError(text, where="base", hint="open one with open_checkpoint(PATH)")
    if hasattr(given, "detach"):  # a tensor of torch, which numpy takes without its gradient and in its own dtypes
        given = given.detach().double().cpu()
    values = np.asarray(given)
    if values.dtype.kind not in "fiu":
        raise UsageError(f"expected real numbers, found {values.dtype}", where="base")
    found = np.array(values, np.float64)
    if not np.isfinite(found).all():
        raise NonFiniteValue("the values hold NaN or infinity", where="base")
    return found


def _checkpoint_of(name: str, values: LazyTensor) -> Checkpoint:
    """A base in memory, of one weight."""
    stored = StoredTensor("", values.dtype, values.shape, Span(0, values.nbytes))
    return Checkpoint("values", {}, {name: stored}, weights={name: _weight_of(name, values, stored)})


def _weight_of(name: str, values: LazyTensor, stored: StoredTensor) -> BaseWeight:
    def as_matrix(row_axes: int) -> BaseWeight:
        shape = values.shape
        rows = (math.prod(shape[:row_axes]), *shape[row_axes:])
        return _weight_of(name, values.reshape(*rows), replace(stored, shape=rows)) if shape else weight

    weight = BaseWeight(
        name=name,
        parts=(stored,),
        shape=values.shape,
        dtype=values.dtype,
        read=values.read,
        read_into=None,
        as_matrix=as_matrix,
    )
    return weight
