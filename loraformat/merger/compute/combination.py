"""Changes of one tensor by several adapters, combined value by value: TIES, DARE, and both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.errors import UnsupportedUpdate
from loraformat.merger.compute.kinds.steps import Addition, Step
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Arithmetic, Edit, Term
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Replace, Rows, Update

if TYPE_CHECKING:
    from loraformat.algebra.elementwise import Lines, Sparsity
    from loraformat.model.floats import Floats

METHODS = ("ties", "dare", "dare-ties")


def sparsity_of(edit: Edit, inputs: Inputs, arithmetic: Arithmetic) -> Sparsity | None:
    """How the terms of an edit are combined; None where they are applied one after the other.

    That is so for vectors, whose sum is right, and for values that one adapter alone saved.

    Raises: UnsupportedUpdate (LF013): a term depends on the base, or values of several
        adapters replace each other.
    """
    if not arithmetic.method or not edit.terms:
        return None
    updates = [inputs.update(term) for term in edit.terms]
    if all(map(_is_sum, updates)):
        if len(edit.shape) < 2:
            return None
        from loraformat.algebra.elementwise import Sparsity

        return Sparsity(
            method=arithmetic.method, density=arithmetic.density, sign=arithmetic.sign, seed=arithmetic.seed
        )
    if len({term.adapter for term in edit.terms}) == 1 and all(isinstance(one, (Replace, Rows)) for one in updates):
        return None
    text = "updates that depend on the base or replace its values cannot be combined with others"
    hint = "leave --method out, or leave this module out with pick"
    raise UnsupportedUpdate(f"{text} by {arithmetic.method}", where=edit.terms[0].weight, hint=hint)


def _is_sum(update: Update) -> bool:
    is_additive = isinstance(update, (LowRank, Hadamard, Kronecker, Dense))
    return is_additive and not (isinstance(update, LowRank) and update.magnitude is not None)


def combination(edit: Edit, sparsity: Sparsity, prepare: Callable[[Term], Step]) -> tuple[Addition, ...]:
    """One step for all rows, or one for the rows of each weight where several weights make one tensor.

    Args:
        prepare: makes a term ready.
    """
    groups: dict[tuple[int, int | None], list[Term]] = {}
    for term in edit.terms:
        groups.setdefault((term.part.at, term.part.expert), []).append(term)
    return tuple(_one(terms, edit, sparsity, prepare) for terms in groups.values())


def _one(terms: Sequence[Term], edit: Edit, sparsity: Sparsity, prepare: Callable[[Term], Step]) -> Addition:
    """The combination of the changes of the same rows, by adapters that count with their strengths."""
    from loraformat.algebra.elementwise import combined

    changes: dict[int, list[Addition]] = {}
    strengths: dict[int, float] = {}
    for term in terms:
        step = prepare(replace(term, strength=1.0))
        assert isinstance(step, Addition)
        changes.setdefault(term.adapter, []).append(step)
        strengths[term.adapter] = term.strength
    span = next(iter(changes.values()))[0].span
    rows = edit.matrix[0] if span is None else span[1] - span[0]
    sources = [_lines(several, rows, edit.matrix[1]) for several in changes.values()]
    found = combined(sources, list(strengths.values()), sparsity, label_of(terms[0]))
    return Addition(found.rows, span=span)


def label_of(term: Term) -> str:
    """By which the random numbers of a weight are drawn: its name, its expert, its first row of several pieces."""
    expert = "" if term.part.expert is None else f":{term.part.expert}"
    first = "" if not term.part.rows or not term.part.rows[0] else f"@{term.part.rows[0]}"
    return f"{term.weight}{expert}{first}"


def _lines(several: Sequence[Addition], rows: int, cols: int) -> Lines:
    from loraformat.algebra.elementwise import Lines

    def read(start: int, stop: int) -> Floats:
        total = several[0].delta(start, stop)
        for other in several[1:]:
            total = total + other.delta(start, stop)
        return total

    return Lines(read, (rows, cols))
