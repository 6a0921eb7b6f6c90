"""resize: an adapter with other ranks, by the singular values of its updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from loraformat.algebra.decomposition import Decomposition, decomposed
from loraformat.algebra.rank_rules import RankRule
from loraformat.diagnostics import Finding
from loraformat.errors import UsageError
from loraformat.formats.kit.normalize import multiplied
from loraformat.jobs.algebra.factoring import Form, change_of, low_rank_of, together
from loraformat.jobs.algebra.options import OutputOptions, checked, described, dtype_of
from loraformat.jobs.algebra.output import nothing_left, origin_of, target_of, with_updates, write
from loraformat.jobs.algebra.sizes import not_met, ranks_within
from loraformat.jobs.algebra.sources import (
    forms_of,
    matrices,
    nbytes_of,
    open_source,
    ranks_before,
    require_additive,
    sums_of,
    values_of,
    vectors_of,
)
from loraformat.jobs.inputs.subject import open_base
from loraformat.model.adapter import Adapter, module_of
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.results.factor_changes import FactorChange, FactorResult
from loraformat.model.tensors import DType
from loraformat.model.updates import Dense, LowRank, Update
from loraformat.report import Report
from loraformat.storage import Location, Publication, uri_of, uri_or_none


def resize(
    adapter: Location,
    out: Location,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    size: int | None = None,
    max_rank: int | None = None,
    dtype: str = "float32",
    to: str | None = None,
    container: str | None = None,
    base: Location | None = None,
    format: str | None = None,  # noqa: A002
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    dry_run: bool = False,
    strict: bool = False,
    force: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Reduce each update to the smallest rank that the arguments allow, with the smallest possible error.

    >>> import loraformat
    >>> report = loraformat.resize("fixtures/good/peft/rslora", "rank-1", rank=1)
    >>> [each.rank for each in report.data.weights], 0 < report.data.error < 1
    ([1, 1, 1, 1], True)

    QR of the factors and a small singular value decomposition in float64; ΔW is never formed. Additive updates become
    LoRA with scale 1; an update whose rank does not change keeps its factors. Replaced tables and trained rows are
    copied, zero updates are left out.

    Args:
        adapter: folder or file.
        out: folder that does not exist yet.
        rank: how many singular values σ of each update to keep. If several arguments set a rank, the largest wins.
        energy: smallest rank whose Σσ² is this share of ‖ΔW‖².
        error: smallest rank with ‖ΔW − kept‖ ≤ error · ‖ΔW‖.
        sv_ratio: keep singular values of at least σ₁ / sv_ratio.
        sv_cumulative: smallest rank whose Σσ is this share of the total.
        sv_fro: smallest rank whose √Σσ² is this share of ‖ΔW‖.
        size: most bytes of the weight file; cannot be combined with the others.
        max_rank: upper limit on every rank.
        dtype: of the new factors: "float32", "bfloat16" or "float16".
        to: name of the format to write; by default the source's, or PEFT if that format is read-only.
        container: "safetensors" or "torch", if the format allows both.
        base: the base, if names or shapes depend on it.
        format, alpha, assumptions: as for `convert`.
        dry_run: report; write nothing.
        strict: stop if a bound is not met with `max_rank`, or anything would be lost.
        force: downgrade forgivable errors to warnings (`rules.refuse`).
        overwrite: replace an existing folder.
        publication: how an output is uploaded to the Hub.
        announce: called with findings before anything is written.
        progress: called with (bytes done, bytes in all).

    Raises: UsageError (LF021): no argument sets the rank. UnsupportedUpdate (LF013): DoRA, or another update that its
        factors do not fully describe. NonFiniteValue (LF402). AdapterRefused; StorageError, ContainerError,
        FormatError.
    """
    rule = checked(
        RankRule(
            rank=rank,
            energy=energy,
            error=error,
            sv_ratio=sv_ratio,
            sv_cumulative=sv_cumulative,
            sv_fro=sv_fro,
            size=size,
            max_rank=max_rank,
        )
    )
    if not rule.names and rule.max_rank is None:
        raise UsageError("no rank is given", where="resize", hint="pass for example --rank 8 or --error 0.1")
    wanted = dtype_of(dtype)
    checkpoint = open_base(uri_or_none(base))
    known = with_alpha(alpha, assumptions)
    source = open_source(uri_of(adapter), base=checkpoint, assumptions=known, format=format, force=force)
    require_additive(source.adapter, source.opened.uri, "resize")
    options = OutputOptions(
        to=to,
        container=container,
        dry_run=dry_run,
        strict=strict,
        overwrite=overwrite,
        publication=publication,
        announce=announce,
        progress=progress,
    )
    updates, changes = resized(source.adapter, rule, wanted)
    left_out = tuple(sorted(source.adapter.updates.keys() - updates.keys()))
    result = FactorResult(
        method=described(rule),
        target=target_of(options, source).NAME,
        adapters=((source.opened.uri, 1.0),),
        weights=changes,
        kept=tuple(weight for weight, chain in updates.items() if values_of(chain)),
        left_out=left_out,
        dropped=_dropped(changes),
        bytes_before=nbytes_of(source.adapter),
    )
    made = with_updates(source.adapter, updates, is_fresh=True)
    short = tuple(not_met(changes, rule))
    return write(
        made,
        together(result),
        origin_of((source,)),
        uri_of(out),
        job="resize",
        base=checkpoint,
        options=options,
        findings=short,
    )


def resized(
    adapter: Adapter, rule: RankRule, dtype: DType
) -> tuple[dict[str, tuple[Update, ...]], tuple[FactorChange, ...]]:
    """The updates at their new ranks, and a record of each that has one.

    Raises: AdapterRefused: all updates are zero. NonFiniteValue (LF402).
    """
    ranks = _ranks_by_size(adapter, rule, dtype) if rule.size is not None else {}
    updates: dict[str, tuple[Update, ...]] = {}
    changes: list[FactorChange] = []
    fresh: set[str] = set()
    for weight, chain in adapter.updates.items():
        sums = sums_of(chain)
        kept: tuple[Update, ...] = values_of(chain)
        if sums:
            found = [decomposed(matrix, rule.most) for matrix in matrices(sums, weight)]
            rank = ranks[weight] if rule.size is not None else max(rule.least(each) for each in found)
            update, change = _at_rank(weight, sums, found, rank, dtype)
            changes.append(change)
            if update is not None:
                kept = (*kept, update)
                if update not in sums:
                    fresh.add(module_of(weight))
        if kept or vectors_of(chain):
            updates[weight] = (*kept, *vectors_of(chain))
    if not any(each.rank for each in changes) and changes:
        raise nothing_left("resize", len(changes))
    return with_unscaled_biases(updates, fresh), tuple(changes)


def _at_rank(
    weight: str, sums: tuple[Update, ...], found: list[Decomposition], rank: int, dtype: DType
) -> tuple[Update | None, FactorChange]:
    """The update at a rank; itself where that is its own, None at rank 0."""
    before = ranks_before(sums)
    if rank == 0:
        return None, replace(change_of(weight, found, 0, before, [0.0]), rank=0)
    only = sums[0] if len(sums) == 1 else None
    if isinstance(only, LowRank) and rank >= before:
        return only, change_of(weight, found, before, before, [0.0])
    return low_rank_of(weight, found, rank, before, Form.of(forms_of(sums)), dtype)


def with_unscaled_biases(updates: dict[str, tuple[Update, ...]], modules: set[str]) -> dict[str, tuple[Update, ...]]:
    """Biases of lora_B with the scale 1 of the factors beside them: PEFT has one scale for both."""
    return {
        weight: tuple(
            Dense(multiplied(update.delta, update.scale), 1.0)
            if isinstance(update, Dense) and update.scale is not None and module_of(weight) in modules
            else update
            for update in chain
        )
        for weight, chain in updates.items()
    }


def _ranks_by_size(adapter: Adapter, rule: RankRule, dtype: DType) -> dict[str, int]:
    """Ranks for which all tensors of the output take at most `rule.size`."""

    def decompose(sums: tuple[Update, ...], weight: str) -> list[Decomposition]:
        return [decomposed(matrix) for matrix in matrices(sums, weight)]

    steps = {
        weight: partial(decompose, sums, weight)
        for weight, chain in adapter.updates.items()
        if (sums := sums_of(chain))
    }
    others = [each for chain in adapter.updates.values() for each in (*values_of(chain), *vectors_of(chain))]
    return ranks_within(rule, dtype, steps, others)


def _dropped(changes: tuple[FactorChange, ...]) -> float:
    """The share of all squares that stands in updates that were left out."""
    whole = math.fsum(each.norm**2 for each in changes)
    return math.fsum(each.norm**2 for each in changes if not each.rank) / whole if whole else 0.0
