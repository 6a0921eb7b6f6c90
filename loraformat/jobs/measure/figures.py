"""Metrics of every update of an adapter: norms, spectra, and both relative to the base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.engine import open_engine
from loraformat.model.adapter import Adapter, module_of
from loraformat.model.results.weight_figures import MOST_VALUES, WeightRecord, weight_records
from loraformat.model.summary import layer_of
from loraformat.model.updates import Update, kind_of

if TYPE_CHECKING:
    from loraformat.algebra import Spectrum
    from loraformat.jobs.measure.changes import Change, Changes

_SORTED_DOWN = ("norm", "relative_norm", "spectral_norm", "effective_rank", "stable_rank", "parameters")
SORT_KEYS = ("weight", *_SORTED_DOWN, "retained_bf16")


def figures_of(
    adapter: Adapter, changes: Changes | None = None, *, norms: bool = True, spectrum: bool = False, jobs: int = 1
) -> tuple[WeightRecord, ...]:
    """A record of each update, with norms and spectra.

    Args:
        changes: of the base by the same adapter, where there is one.
        norms: whether to read the factors at all.
        spectrum: singular values and ranks too.
        jobs: threads, each with a weight of its own.
    """
    records = _with_blocks(adapter, weight_records(adapter))
    if not norms:
        return records
    updates = [update for _, chain in sorted(adapter.updates.items()) for update in chain]
    known = {} if changes is None else changes.weights

    def measured(pair: tuple[WeightRecord, Update]) -> WeightRecord:
        record, update = pair
        is_only = len(adapter.updates[record.weight]) == 1
        return _measured(record, update, known.get(record.weight), is_only, spectrum)

    return _with_outliers(list(open_engine(jobs).map(measured, zip(records, updates, strict=True))))


def _with_blocks(adapter: Adapter, records: tuple[WeightRecord, ...]) -> tuple[WeightRecord, ...]:
    """The records with the blocks of an image or video model; those of another as they are."""
    pipeline = adapter.config.pipeline
    if pipeline is None:
        return records
    from loraformat.naming.families import DIFFUSERS, ORIGINAL, block_of, families

    def block(weight: str) -> str:
        component = pipeline.component_of(weight)
        naming = ORIGINAL if pipeline.is_original and component == pipeline.bare else DIFFUSERS
        module = module_of(weight.removeprefix(pipeline.head_of(component)))
        return block_of(component, module, families().get(pipeline.family), naming)

    return tuple(replace(record, block=block(record.weight)) for record in records)


def sorted_by(records: Sequence[WeightRecord], key: str) -> tuple[WeightRecord, ...]:
    """The records by one of SORT_KEYS: names ascending, what survives rounding ascending, other figures descending.

    Records without the figure come last.
    """
    if key == "weight":
        return tuple(records)
    sign = -1 if key in _SORTED_DOWN else 1
    with_key = [(getattr(record, key), record) for record in records]
    ordered = sorted(with_key, key=lambda pair: (pair[0] is None, sign * (pair[0] or 0)))
    return tuple(record for _, record in ordered)


def layer_norms(records: Iterable[WeightRecord]) -> dict[int, float]:
    """Layer → root of the sum of squared norms of its weights, ascending."""
    by_layer: dict[int, list[float | None]] = {}
    for record in records:
        layer = layer_of(record.weight)
        if layer is not None:
            by_layer.setdefault(layer, []).append(record.norm)
    totals = {layer: root_of_squares(found) for layer, found in sorted(by_layer.items())}
    return {layer: total for layer, total in totals.items() if total is not None}


def root_of_squares(norms: Iterable[float | None]) -> float | None:
    """√Σ n² of the norms that are known; None for none."""
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if known else None


def _measured(
    record: WeightRecord, update: Update, change: Change | None, is_only: bool, with_spectrum: bool
) -> WeightRecord:
    from loraformat.algebra import frobenius, is_additive, norm_and_spectrum

    figures: tuple[float | None, Spectrum | None]
    # The change of the base is the update's own only where no other update of the weight has a part in it.
    if change is not None and is_only and (kind_of(update).needs_base or not is_additive(update)):
        figures = math.sqrt(change.update), change.spectrum
    else:
        figures = norm_and_spectrum(update) if with_spectrum else (frobenius(update), None)
    found = _with_spectrum(replace(record, norm=figures[0]), figures[1])
    if change is None:
        return found
    return replace(
        found,
        base_norm=math.sqrt(change.base),
        relative_norm=change.relative,
        retained_bf16=change.retained(0),
        retained_fp16=change.retained(1),
    )


def _with_spectrum(record: WeightRecord, found: Spectrum | None) -> WeightRecord:
    if found is None:
        return record
    return replace(
        record,
        spectral_norm=found.spectral_norm,
        stable_rank=found.stable_rank,
        effective_rank=found.effective_rank,
        rank_90=found.rank_holding(0.9),
        singular_values=found.values[:MOST_VALUES],
    )


def _with_outliers(records: Sequence[WeightRecord]) -> tuple[WeightRecord, ...]:
    from loraformat.algebra.outliers import outliers

    found = outliers((number, (each.module, each.shape), each.norm) for number, each in enumerate(records))
    return tuple(replace(record, is_outlier=number in found) for number, record in enumerate(records))
