"""An adapter in the names of transformers as one in llama.cpp's: names, order of rows, stacks of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraformat.diagnostics import Finding, in_weights
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats.kit.losses import folded_scale, padded_ranks
from loraformat.formats.kit.normalize import folding_error, multiplied, padded
from loraformat.model.adapter import Adapter
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank, Replace, Rows, Update, kind_of
from loraformat.naming import LlamaCppModel, source_row
from loraformat.naming.llama_cpp import Place

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_HEADS_UNKNOWN = "the number of heads of q and k is unknown"
_HINT = "pass the base with --base: its config.json or GGUF file has it"


@dataclass(frozen=True, slots=True)
class Translated:
    """An adapter in llama.cpp's names.

    Attributes:
        unplaced: weights that llama.cpp has no tensor for; they keep their names.
        changes: what stacking experts of different rank or scale changed.
    """

    adapter: Adapter
    unplaced: tuple[str, ...]
    changes: tuple[Finding, ...]


def translated(adapter: Adapter, model: LlamaCppModel, experts: int | None = None) -> Translated:
    """The adapter as it lands on the tensors of a GGUF base.

    Args:
        experts: how many a stack has; None for the highest number that is updated.

    Raises:
        ConfigError (LF103): rows stand in another order, and the number of heads is not known or does not divide them.
        UnsupportedUpdate (LF013): an update whose rows cannot be put in another order, or of an expert that is no
            low-rank update.
    """
    updates: dict[str, tuple[Update, ...]] = {}
    stacks: dict[str, dict[int, LowRank]] = {}
    unplaced: list[str] = []
    for weight, chain in adapter.updates.items():
        names = model.stacks(weight)
        if names:
            for name, part in zip(names, _parts(weight, chain, len(names), model, adapter), strict=True):
                _check_free(weight, name, updates)
                updates[name] = (part,)
            continue
        place = _place(weight, model)
        if place is None:
            unplaced.append(weight)
            updates[weight] = chain
        elif place.expert is not None:
            stacks.setdefault(place.tensor, {})[place.expert] = _expert(weight, chain)
        else:
            _check_free(weight, place.tensor, updates)
            updates[place.tensor] = tuple(_turned(weight, update, place) for update in chain)
    changes: list[Finding] = []
    for tensor, members in stacks.items():
        _check_free(tensor, tensor, updates)
        updates[tensor] = (_stacked(members, max(experts or 0, *(number + 1 for number in members))),)
        changes += _stack_changes(tensor, members)
    declared = _renamed({} if stacks else adapter.config.declared_ranks, model)
    config = replace(adapter.config, declared_ranks=declared)
    found = replace(adapter, updates=dict(sorted(updates.items())), config=config, origin=adapter)
    return Translated(found, tuple(unplaced), tuple(changes))


def _parts(
    weight: str, chain: tuple[Update, ...], count: int, model: LlamaCppModel, adapter: Adapter
) -> Iterator[LowRank]:
    """The stacks (experts, out, in) of a parameter in which transformers has gate and up below each other.

    PEFT before 0.19 took every such parameter for (experts, in, out): its factors stand crosswise.
    """
    (update, *others) = chain
    if others or not isinstance(update, LowRank) or not update.is_stack or update.magnitude is not None:
        raise UnsupportedUpdate(
            "an update of stacked experts that is not purely low-rank",
            where=in_weights(weight),
            hint="merge the adapter into its base, and convert the merged model",
        )
    outs, ins = update.up.shape[1], update.down.shape[2]
    straight, crossed = (ins, outs) if count == 2 else (outs, ins)
    if model.width is not None and model.width not in (straight, crossed):
        raise ConfigError(
            f"experts of {outs} x {ins}, but the model has hidden size {model.width}", where=in_weights(weight)
        )
    is_crossed = bool(adapter.config.transposes_square_experts) and outs == ins
    if is_crossed or (model.width is not None and straight != model.width):
        update = LowRank(_crosswise(update.down), _crosswise(update.up), update.scale)
    height = update.up.shape[1] // count
    if update.up.shape[1] % count:
        raise ConfigError(f"{update.up.shape[1]} rows are not those of gate and up", where=in_weights(weight))
    for number in range(count):
        yield replace(update, up=_rows_of_each(update.up, number * height, (number + 1) * height))


def _crosswise(stack: LazyTensor) -> LazyTensor:
    """Each matrix of a stack transposed."""
    experts, rows, cols = stack.shape
    return LazyTensor((experts, cols, rows), stack.dtype, lambda start, stop: stack.read(start, stop).swapaxes(1, 2))


def _rows_of_each(stack: LazyTensor, first: int, last: int) -> LazyTensor:
    """Some rows of each matrix of a stack."""
    experts, _, cols = stack.shape
    return LazyTensor(
        (experts, last - first, cols), stack.dtype, lambda start, stop: stack.read(start, stop)[:, first:last]
    )


def _place(weight: str, model: LlamaCppModel) -> Place | None:
    try:
        return model.place(weight)
    except LookupError:
        raise ConfigError(_HEADS_UNKNOWN, where=in_weights(weight), hint=_HINT) from None


def _renamed(ranks: Mapping[str, int], model: LlamaCppModel) -> dict[str, int]:
    places = {weight: None if model.stacks(weight) else _place(weight, model) for weight in ranks}
    return {weight if (place := places[weight]) is None else place.tensor: rank for weight, rank in ranks.items()}


def _check_free(weight: str, tensor: str, updates: Mapping[str, object]) -> None:
    if tensor in updates:
        raise ConfigError(f"two weights of the adapter map to {tensor} in llama.cpp", where=in_weights(weight))


def _turned(weight: str, update: Update, place: Place) -> Update:
    """The update with its rows in llama.cpp's order."""
    heads = place.heads
    if not heads:
        return update
    if isinstance(update, LowRank) and not update.kernel and len(update.up.shape) == 2:
        magnitude = update.magnitude
        if magnitude is not None and magnitude.axis == 1:
            magnitude = replace(magnitude, vector=in_order_of_halves(weight, magnitude.vector, heads))
        return replace(update, up=in_order_of_halves(weight, update.up, heads), magnitude=magnitude)
    if isinstance(update, Dense):
        return replace(update, delta=in_order_of_halves(weight, update.delta, heads))
    if isinstance(update, Replace):
        return replace(update, value=in_order_of_halves(weight, update.value, heads))
    kind = "trained rows" if isinstance(update, Rows) else f"an update of the kind {kind_of(update).name}"
    raise UnsupportedUpdate(
        f"{kind} of a weight whose rows llama.cpp reorders",
        where=in_weights(weight),
        hint="merge the adapter into its base, and convert the merged model",
    )


def in_order_of_halves(weight: str, tensor: LazyTensor, heads: int, *, inverse: bool = False) -> LazyTensor:
    """Rows of q or k in llama.cpp's order, or with `inverse` from that in transformers' own.

    Raises: ConfigError (LF103): the rows are not those of so many heads.
    """
    rows = tensor.shape[0] if tensor.shape else 0
    if rows % (2 * heads):
        raise ConfigError(f"{rows} rows are not those of {heads} heads", where=in_weights(weight), hint=_HINT)
    order = [source_row(row, heads, rows) for row in range(rows)]
    if inverse:
        back = sorted(range(rows), key=order.__getitem__)
        order = back

    def read(start: int, stop: int) -> Values:
        return tensor.load()[order[start:stop]]

    return LazyTensor(tensor.shape, tensor.dtype, read)


def _expert(weight: str, chain: tuple[Update, ...]) -> LowRank:
    (update, *others) = chain
    if others or not isinstance(update, LowRank) or update.magnitude is not None or len(update.up.shape) != 2:
        kind = "several updates" if others else f"an update of the kind {kind_of(update).name}"
        raise UnsupportedUpdate(
            f"{kind} of a single expert, but llama.cpp stacks all experts of a layer",
            where=in_weights(weight),
            hint="merge the adapter into its base, and convert the merged model",
        )
    return update


def _stacked(members: Mapping[int, LowRank], count: int) -> LowRank:
    """One update (count, rows, cols); experts that have none get factors of zeros."""
    known = list(members.values())
    rank, scale = max(one.rank for one in known), known[0].scale
    shapes = {(one.up.shape[0], one.down.shape[1]) for one in known}
    if len(shapes) > 1:
        raise ConfigError(
            f"experts of one stack have updates of different shapes: {sorted(shapes)[:2]}", where="experts"
        )
    ((rows, cols),) = shapes
    even = {number: padded(_folded(one, scale), rank) for number, one in members.items()}
    ups = {number: one.up for number, one in even.items()}
    downs = {number: one.down for number, one in even.items()}
    return LowRank(_stack(ups, count, (rows, rank)), _stack(downs, count, (rank, cols)), scale)


def _folded(update: LowRank, scale: float | None) -> LowRank:
    if scale is None or update.scale is None or update.scale == scale:
        return update
    return replace(update, up=multiplied(update.up, update.scale / scale), scale=scale)


def _stack(parts: Mapping[int, LazyTensor], count: int, shape: tuple[int, int]) -> LazyTensor:
    dtype = next(iter(parts.values())).dtype

    def read(start: int, stop: int) -> Values:
        import numpy as np

        found = np.zeros((stop - start, *shape), dtype.numpy)
        for number in range(start, stop):
            if number in parts:
                found[number - start] = parts[number].load()
        return found

    return LazyTensor((count, *shape), dtype, read)


def _stack_changes(tensor: str, members: Mapping[int, LowRank]) -> list[Finding]:
    known = list(members.values())
    scale, rank = known[0].scale, max(one.rank for one in known)
    other = [one for one in known if one.scale not in (None, scale)]
    found = []
    if other and scale is not None:
        found.append(folded_scale("", [tensor], max(folding_error(one, scale) for one in other)))
    if any(one.rank != rank for one in known):
        found.append(padded_ranks("", [tensor], rank))
    return found
