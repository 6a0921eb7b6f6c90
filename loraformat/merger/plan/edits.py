"""From updates that landed to edits of stored tensors, ties included. Pure, but for comparing two tied tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loraformat.diagnostics import counted
from loraformat.errors import MergeError, ShapeMismatch, UnmatchedUpdate, UnsupportedUpdate
from loraformat.matching import WHOLE, Matching, RowMap, Tie, match, quantization_of, quantized_weights
from loraformat.merger.plan.data import Edit, Operand, Term
from loraformat.merger.plan.supported import check_part, check_strength
from loraformat.merger.plan.untie import (
    Same,
    check_may_untie,
    check_resized,
    check_tie_is_known,
    check_untied,
    grown_biases,
    own_terms,
    verified_tie,
)
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.tensors import has_equal_values
from loraformat.model.updates import LowRank, Replace, Rows, Update, kind_of

_UNQUANTIZED = "merge into the 16-bit checkpoint that it was made from"


@dataclass(frozen=True, slots=True)
class Edits:
    """All that changes in the weights of a base.

    Attributes:
        edits: output tensor → its edit; a tensor that the base does not have is new (an untied head).
        untied: names of ties that are broken, the input embedding first; none of them shares its bytes any more.
        resized: tables whose number of rows changes: tensor → (old, new).
    """

    edits: Mapping[str, Edit]
    untied: tuple[tuple[str, ...], ...] = ()
    resized: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def edits_of(
    base: Checkpoint, adapters: Sequence[Adapter], strengths: Sequence[float] = (), same: Same | None = None
) -> Edits:
    """Which tensors of `base` change, and by which terms.

    Args:
        strengths: one for each adapter; 1 for all where there are none.
        same: see `verified_tie`.

    Raises:
        UnmatchedUpdate (LF301): an update lands on no tensor; the nearest names are in the message.
        ShapeMismatch (LF302): an update does not fit its tensor.
        UnsupportedUpdate (LF013): the tensor is of a dtype that a merge cannot round to; an update cannot be applied at
            a strength other than 1, or to the part of a tensor that it would land on.
        MergeError (LF801): two adapters replace the same tensor.
    """
    matchings = [_landed(adapter, base, number) for number, adapter in enumerate(adapters)]
    terms = _terms(adapters, matchings, strengths or [1.0] * len(adapters), base)
    for tensor, found in terms.items():
        _one_replacement(tensor, found, adapters)
    edits: dict[str, Edit] = {}
    untied: list[tuple[str, ...]] = []
    ties = {tie.names: tie for matching in matchings for tie in matching.ties}
    for each in _joined(tuple(ties.values())):
        if not any(terms.get(name) for name in each.names):
            continue
        tie = verified_tie(each, base, same)
        members = {name: terms.pop(name, []) for name in tie.names}
        if any(members.values()):
            shared = _shared_terms(members, adapters)
            if shared is None:
                check_may_untie(base, tie)
                untied.append(tie.names)
            for edit in _tied_edits(tie, members, shared, base, adapters):
                edits[edit.tensor] = edit
    for name, own in terms.items():
        check_tie_is_known(name, [_update(term, adapters) for term in own], base)
        edits[name] = edit_of(name, name, own, base, adapters)
    resized = {
        name: (base.tensors[edit.source].shape[0], edit.shape[0])
        for name, edit in edits.items()
        if edit.shape != base.tensors[edit.source].shape and not _is_new_head(name, base)
    }
    check_resized(base, resized)
    check_untied(edits, untied)
    edits |= {edit.tensor: edit for edit in grown_biases(base, resized)}
    return Edits(dict(sorted(edits.items())), tuple(untied), resized)


def _is_new_head(name: str, base: Checkpoint) -> bool:
    return base.task is not None and name in base.task.head


def _terms(
    adapters: Sequence[Adapter], matchings: Sequence[Matching], strengths: Sequence[float], base: Checkpoint
) -> dict[str, list[Term]]:
    """Output tensor → its terms, in the order of the adapters."""
    terms: dict[str, list[Term]] = {}
    for number, (adapter, matching) in enumerate(zip(adapters, matchings, strict=True)):
        for weight, updates in adapter.updates.items():
            for index, update in enumerate(updates):
                check_strength(weight, update, strengths[number])
                for landing in matching.landings.get(weight, ()):  # none for a bias that the base lacks
                    check_part(weight, update, landing)
                    operand = _operand(update, matching, base)
                    term = Term(number, weight, index, landing.transposed, landing.part, strengths[number], operand)
                    terms.setdefault(landing.tensor, []).append(term)
    return terms


def _operand(update: Update, matching: Matching, base: Checkpoint) -> Operand | None:
    """The tensor that an update is computed from beside its own.

    Raises:
        UnmatchedUpdate (LF301): the base has no such weight.
        UnsupportedUpdate (LF013): it is stored in parts.
        ShapeMismatch (LF302): it does not fit.
    """
    named = kind_of(update).operand
    if named is None:
        return None
    weight, shape = named(update)
    landings = matching.landings.get(weight, ())
    if not landings:
        raise UnmatchedUpdate(
            f"{weight}: a bias is computed from this weight, but the base does not have it", where="merge"
        )
    landing, *others = landings
    if others or landing.part != WHOLE or landing.tensor not in base.tensors:
        text = f"{weight}: a bias is computed from this weight, but the base stores it in parts, first {landing.tensor}"
        raise UnsupportedUpdate(text, where="merge")
    stored = base.tensors[landing.tensor].shape
    if (shape[::-1] if landing.transposed else shape) != stored:
        raise ShapeMismatch(f"{weight}: the update is {shape}, but the base weight is {stored}", where="merge")
    return Operand(landing.tensor, landing.transposed)


def _tied_edits(
    tie: Tie,
    members: Mapping[str, list[Term]],
    shared: list[Term] | None,
    base: Checkpoint,
    adapters: Sequence[Adapter],
) -> Iterator[Edit]:
    """Edits of the names of one table: the same for all that are stored (`shared`), or each name its own."""
    for name in members:
        is_stored = name in base.tensors
        if shared is not None:
            if is_stored:
                yield edit_of(name, name, shared, base, adapters)
            continue
        own = own_terms(name, members, lambda term: _update(term, adapters))
        if own or not is_stored:
            yield edit_of(name, name if is_stored else tie.stored, own, base, adapters)


def _landed(adapter: Adapter, base: Checkpoint, number: int) -> Matching:
    found = match(adapter, base)
    where = "merge" if number == 0 else f"merge: adapter {number + 1}"
    _refuse_quantized(adapter, base, where)
    if found.unmatched:
        first, near = next(iter(found.unmatched.items()))
        known = f"; nearest in the base: {', '.join(near)}" if near else "; the base has no name like it"
        raise UnmatchedUpdate(
            f"no base weight matches {len(found.unmatched)} of {counted(len(adapter.updates), 'update')}, "
            f"first {first}{known}",
            where=where,
            hint="is this the base that the adapter was trained on?",
        )
    if found.misfits:
        bad = found.misfits[0]
        raise ShapeMismatch(
            f"{bad.weight}: the update is {bad.update_shape}, but the base weight is {bad.stored_shape}"
            + (f", and {len(found.misfits) - 1} more do not fit" if len(found.misfits) > 1 else ""),
            where=where,
            hint="is this the base that the adapter was trained on?",
        )
    return found


def _refuse_quantized(adapter: Adapter, base: Checkpoint, where: str) -> None:
    """Raises: UnsupportedUpdate (LF013): an update is for a weight that the base stores in codes; names the scheme."""
    quantization = quantization_of(base)
    names = sorted(quantized_weights(base, adapter.updates))
    if quantization is not None and names:
        text = (
            f"the base is quantized ({quantization.scheme}, says {quantization.where}): {len(names)} of "
            f"{counted(len(adapter.updates), 'update', 'is')} for quantized weights, first {names[0]}"
        )
        raise UnsupportedUpdate(text, where=where, hint=_UNQUANTIZED)


def _joined(ties: Sequence[Tie]) -> Sequence[Tie]:
    """Ties of several adapters' matchings about the same table, as one."""
    by_table: dict[str, Tie] = {}
    for tie in ties:
        known = by_table.get(tie.stored)
        names = tie.names if known is None else (*known.names, *(n for n in tie.names if n not in known.names))
        by_table[tie.stored] = Tie(names, tie.stored)
    return tuple(by_table.values())


def _update(term: Term, adapters: Sequence[Adapter]) -> Update:
    return adapters[term.adapter].updates[term.weight][term.index]


def _one_replacement(tensor: str, terms: Sequence[Term], adapters: Sequence[Adapter]) -> None:
    replacing = {t.adapter for t in terms if isinstance(_update(t, adapters), Replace)}
    if len(replacing) > 1:
        numbers = ", ".join(str(n + 1) for n in sorted(replacing))
        raise MergeError(f"{tensor}: adapters {numbers} each replace the whole tensor", where="merge")


def _shared_terms(members: Mapping[str, list[Term]], adapters: Sequence[Adapter]) -> list[Term] | None:
    """The terms that apply to the one table, or None where the names must go separate ways.

    A table stays shared where every update of it follows the tie, and all names that are updated get the same values.
    """
    updated = [terms for terms in members.values() if terms]
    for term in (term for terms in updated for term in terms):
        update = _update(term, adapters)
        if not isinstance(update, (Replace, Rows)) or not update.follows_tie:
            return None
    first, *others = updated
    if all(_same(first, other, adapters) for other in others):
        return first
    return None


def _same(one: Sequence[Term], other: Sequence[Term], adapters: Sequence[Adapter]) -> bool:
    if len(one) != len(other):
        return False
    for left, right in zip((_update(t, adapters) for t in one), (_update(t, adapters) for t in other), strict=True):
        if isinstance(left, Replace) and isinstance(right, Replace):
            if not has_equal_values(left.value, right.value):
                return False
        elif isinstance(left, Rows) and isinstance(right, Rows):
            if left.indices != right.indices or not has_equal_values(left.values, right.values):
                return False
        else:
            return False
    return True


def edit_of(name: str, source: str, terms: Sequence[Term], base: Checkpoint, adapters: Sequence[Adapter]) -> Edit:
    """The edit that terms make of the base tensor `source`, called `name` in the output.

    Raises: UnsupportedUpdate (LF013), ShapeMismatch (LF302): see `edits_of`.
    """
    stored = base.tensors[source]
    if not stored.dtype.is_floating:
        text = (
            f"{source}: cannot merge into a weight of dtype {stored.dtype.safetensors}, which does not hold "
            "real numbers"
        )
        raise UnsupportedUpdate(text, where="merge", hint=_UNQUANTIZED)
    shape = stored.shape
    is_stack = False
    for term in terms:
        update = _update(term, adapters)
        is_stack = is_stack or (len(shape) == 3 and isinstance(update, LowRank) and not update.kernel)
        if isinstance(update, Replace):
            shape = update.shape
        elif isinstance(update, Rows):
            shape = (_rows_after(name, shape[0], update), *shape[1:])
    row_axes = 2 if is_stack else 1
    return Edit(
        name, source, stored.dtype.safetensors, shape, _for_each_expert(terms, adapters, shape, row_axes), row_axes
    )


def _for_each_expert(
    terms: Sequence[Term], adapters: Sequence[Adapter], shape: tuple[int, ...], row_axes: int
) -> tuple[Term, ...]:
    """The terms, with one for each expert where a stacked update meets a tensor that stores the whole stack."""
    found: list[Term] = []
    for term in terms:
        update = _update(term, adapters)
        if row_axes == 2 and isinstance(update, LowRank) and update.is_stack and term.part.expert is None:
            found += [replace(term, part=RowMap(expert=e, at=e * shape[1])) for e in range(update.up.shape[0])]
        else:
            found.append(term)
    return tuple(found)


def _rows_after(name: str, rows: int, update: Rows) -> int:
    added = sorted(index for index in update.indices if index >= rows)
    if added != list(range(rows, rows + len(added))):
        raise ShapeMismatch(
            f"{name}: the adapter has row {added[0]}, but the table has {rows} rows and those in between are missing",
            where="merge",
        )
    return rows + len(added)
