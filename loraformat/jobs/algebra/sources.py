"""The source adapters of the verbs on factors; refuses updates that factors do not fully describe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat import rules
from loraformat.algebra.factors import Matrix, Product, is_additive, matrices_of
from loraformat.diagnostics import Finding, FindingLocation
from loraformat.errors import NonFiniteValue, UnsupportedUpdate
from loraformat.io import Opened
from loraformat.jobs.inputs.subject import open_subject, require_real
from loraformat.model.adapter import Adapter
from loraformat.model.assumptions import Assumptions
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.updates import Dense, LowRank, Replace, Rows, SubtractedInit, Update, kind_of, rank_of

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """An opened adapter.

    Attributes:
        weight: by which its updates are multiplied.
        findings: what its reader and the quick rules found, none of which forbids its use.
    """

    opened: Opened
    weight: float
    findings: tuple[Finding, ...]

    @property
    def adapter(self) -> Adapter:
        """The adapter in the names that it was trained in."""
        return self.opened.adapter.origin or self.opened.adapter


def open_source(
    uri: str,
    weight: float = 1.0,
    *,
    base: Checkpoint | None = None,
    assumptions: Assumptions,
    format: str | None = None,  # noqa: A002
    force: bool = False,
) -> OpenedSource:
    """An adapter that may be used. Raises: AdapterRefused (LF800), and as `open_subject`."""
    opened, found = open_subject(uri, base=base, assumptions=assumptions, format=format)
    require_real(opened.adapter, uri)
    return OpenedSource(opened, weight, rules.refuse(found, uri, force=force))


def require_additive(adapter: Adapter, uri: str, verb: str) -> None:
    """Raises: UnsupportedUpdate (LF013): an update that its factors alone do not give."""
    for weight, chain in adapter.updates.items():
        for update in chain:
            reason = _reason(update)
            if reason:
                text, hint = reason
                place = FindingLocation(subject=uri, tensor=weight)
                raise UnsupportedUpdate(f"{text}; {verb} cannot use it", where=place, hint=hint)


def _reason(update: Update) -> tuple[str, str] | None:
    """Why an update is not a matrix that is added, and what to do; None where it is, or stays as it is."""
    if isinstance(update, LowRank) and update.magnitude is not None:
        text = "the update is DoRA, whose magnitude normalizes W + ΔW, so what it adds depends on the base"
        return text, "merge it into its base"
    if isinstance(update, SubtractedInit):
        text = f"the factors belong to a base from which {update.recipe} was subtracted, and no base is given"
        return text, "convert it to plain LoRA with PEFT: save_pretrained(path_initial_model_for_weight_conversion=…)"
    if isinstance(update, (Replace, Rows)) or is_additive(update):
        return None
    return f"an update of the kind {kind_of(update).name} depends on the base", "merge it into its base"


def sums_of(chain: tuple[Update, ...]) -> tuple[Update, ...]:
    """The updates of a weight that add a matrix; not those of a vector, which have no rank."""
    return tuple(update for update in chain if is_additive(update) and len(update.shape) > 1)


def vectors_of(chain: tuple[Update, ...]) -> tuple[Dense, ...]:
    """The updates of a bias."""
    return tuple(update for update in chain if isinstance(update, Dense) and len(update.shape) < 2)


def values_of(chain: tuple[Update, ...]) -> tuple[Replace | Rows, ...]:
    """The updates that set values."""
    return tuple(update for update in chain if isinstance(update, (Replace, Rows)))


def ranks_before(updates: tuple[Update, ...]) -> int:
    """The rank that updates of one weight have together, as stored."""
    return sum(rank_of(update) or min(update.shape[-2:]) for update in updates)


def matrices(updates: tuple[Update, ...], where: str) -> list[Matrix]:
    """The sum of updates of one weight: one matrix, or one for each expert of a stack.

    Raises: NonFiniteValue (LF402). UnsupportedUpdate (LF013): they are not of one shape.
    """
    every = [[finite(matrix, where) for matrix in matrices_of(update)] for update in updates]
    if len({tuple(matrix.shape for matrix in found) for found in every}) != 1:
        raise UnsupportedUpdate("the updates have different shapes", where=where)
    return [added(list(terms)) for terms in zip(*every, strict=True)]


def added(terms: list[Matrix]) -> Matrix:
    """The sum: factors side by side, dense where any term is."""
    import numpy as np

    if len(terms) == 1:
        return terms[0]
    products = [term for term in terms if isinstance(term, Product)]
    if len(products) < len(terms):
        return sum((_dense(term) for term in terms[1:]), _dense(terms[0]))
    lefts, rights = [term.left for term in products], [term.right for term in products]
    return Product(np.concatenate(lefts, axis=1), np.concatenate(rights))


def multiplied(matrix: Matrix, factor: float) -> Matrix:
    """A matrix times a number."""
    return Product(matrix.left * factor, matrix.right) if isinstance(matrix, Product) else matrix * factor


def _dense(matrix: Matrix) -> Floats:
    return matrix.left @ matrix.right if isinstance(matrix, Product) else matrix


def finite(matrix: Matrix, where: str) -> Matrix:
    """The matrix. Raises: NonFiniteValue (LF402)."""
    import numpy as np

    parts = (matrix.left, matrix.right) if isinstance(matrix, Product) else (matrix,)
    if not all(np.isfinite(part).all() for part in parts):
        raise NonFiniteValue("the update holds NaN or infinity", where=where, hint="the training run may have diverged")
    sizes = [float(np.abs(part).max(initial=0.0)) * math.sqrt(part.size) for part in parts]
    if math.prod(sizes) > _LARGEST:
        raise NonFiniteValue(
            "the update is too large for float64", where=where, hint="the training run may have diverged"
        )
    return matrix


_LARGEST = 1e300  # a bound of ‖ΔW‖, so that no product or rotation of it overflows


def nbytes_of(adapter: Adapter) -> int:
    """Bytes of all tensors of an adapter."""
    from loraformat.model.summary import summarize

    return summarize(adapter).nbytes


def forms_of(updates: tuple[Update, ...]) -> Iterator[LowRank]:
    """The low-rank updates among several, which say what their weight is: a convolution, an embedding, experts."""
    return (update for update in updates if isinstance(update, LowRank))
