"""inspect: what is in an adapter, from its headers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loraformat import rules
from loraformat.diagnostics import Finding
from loraformat.errors import UnsupportedUpdate
from loraformat.jobs.subject import Assumptions, open_base, open_subject, with_alpha
from loraformat.matching import match
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results import InspectResult, weight_records
from loraformat.model.summary import layer_of, summarize
from loraformat.model.tensors import DType
from loraformat.model.updates import Replace, Rows, tensors_of
from loraformat.report import Report


def inspect(
    adapter: str,
    *,
    base: str | None = None,
    norms: bool = False,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    format: str | None = None,  # noqa: A002
) -> Report:
    """Format, ranks, scales, targets, parameters of the adapter at a path; no tensor value is read without `norms`.

    Args:
        adapter: folder or file.
        base: folder or file of the base; gives the share of parameters, adapter / (base + adapter).
        norms: add ‖s·BA‖_F of each weight, in float64 from the factors.
        alpha: for files that do not state it.
        assumptions: what else the files do not say.
        format: name of a format, to skip detection.

    Raises:
        StorageError, ContainerError, FormatError: the adapter cannot be read at all.
        AdapterRefused (LF800): it has no updates. UnsupportedUpdate (LF013): its values are complex numbers.
    """
    checkpoint = open_base(base)
    opened, findings = open_subject(adapter, base=checkpoint, assumptions=with_alpha(alpha, assumptions), format=format)
    _require_updates(opened.adapter, findings, adapter)
    summary = summarize(opened.adapter)
    if checkpoint is not None and summary.new_rows is None:
        summary = replace(summary, new_rows=_new_rows(opened.adapter, checkpoint))
    found = _norms(opened.adapter) if norms else {}
    share = None
    if checkpoint is not None and summary.parameters:
        share = summary.parameters / (checkpoint.parameters + summary.parameters)
    return Report(
        job="inspect",
        subject=adapter,
        format=opened.format.NAME,
        because=opened.because,
        summary=summary,
        data=InspectResult(
            weights=weight_records(opened.adapter, found),
            layer_norms=_layer_norms(found),
            total_norm=_root_of_squares(norm for chain in found.values() for norm in chain) if norms else None,
            share=share,
        ),
        findings=findings,
    )


def _require_updates(adapter: Adapter, findings: Sequence[Finding], uri: str) -> None:
    """There is something to show, and it is made of real numbers."""
    if not adapter.updates:
        rules.refuse([finding for finding in findings if finding.code == "LF213"], uri)
    for weight, chain in adapter.updates.items():
        for update in chain:
            role = next((role for role, tensor in tensors_of(update) if tensor.dtype is DType.C64), None)
            if role is not None:
                raise UnsupportedUpdate(f"{role} holds complex numbers; they are not read", where=f"{uri}: {weight}")


def _new_rows(adapter: Adapter, base: Checkpoint) -> int | None:
    """Rows that the adapter's embedding tables have beyond the base's; None where no table replaces one of the base."""
    if adapter.config.vocab_size is None:
        return None
    for weight, (landing, *_) in match(adapter, base).landings.items():
        rows = [update.shape[0] for update in adapter.updates[weight] if isinstance(update, (Replace, Rows))]
        if rows and max(rows) == adapter.config.vocab_size and landing.is_stored:
            return max(0, max(rows) - base.tensors[landing.tensor].shape[0])
    return None


def _norms(adapter: Adapter) -> dict[str, tuple[float | None, ...]]:
    from loraformat.algebra import frobenius

    return {weight: tuple(frobenius(update) for update in chain) for weight, chain in adapter.updates.items()}


def _layer_norms(norms: Mapping[str, tuple[float | None, ...]]) -> dict[int, float]:
    by_layer: dict[int, list[float | None]] = {}
    for weight, chain in norms.items():
        layer = layer_of(weight)
        if layer is not None:
            by_layer.setdefault(layer, []).extend(chain)
    totals = {layer: _root_of_squares(found) for layer, found in sorted(by_layer.items())}
    return {layer: total for layer, total in totals.items() if total is not None}


def _root_of_squares(norms: Iterable[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.sqrt(math.fsum(norm * norm for norm in known)) if known else None
