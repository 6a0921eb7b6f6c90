"""Findings about a plan before it is executed, from names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from loraformat import arithmetic
from loraformat.diagnostics import Finding, FindingLocation, counted
from loraformat.matching import TIE_KEYS, is_class_known, is_embedding, is_vocabulary, tie_claim
from loraformat.merger.plan.data import Edit, MergePlan, Term
from loraformat.merger.plan.findings import (
    adapter_of_base_left_out,
    head_tied_by_transformers_4,
    left_out,
    loop_not_compiled,
    stored_transposed,
    task_head_written,
    unlike_peft,
    vanishing_strength,
    whole_matrices,
)
from loraformat.merger.plan.planner import ADAPTER_CONFIG
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.updates import Update, kind_of
from loraformat.naming import scales_if_tied

_LEAST_STRENGTH = 1e-6
_EXPERT = re.compile(r"\.experts\.\d+\.")


def findings_of(plan: MergePlan, base: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """Everything that a user should know about a plan.

    Args:
        base: as it is written, its layers repeated where the adapters want that.
    """
    base_uri = FindingLocation(subject=plan.base)
    files = [name for name in plan.left_out if name != ADAPTER_CONFIG]
    if files:
        yield left_out(base_uri, files)
    if ADAPTER_CONFIG in plan.left_out:
        yield adapter_of_base_left_out(base_uri, ADAPTER_CONFIG)
    transposed = sorted({edit.tensor for edit in plan.edits if any(term.transposed for term in edit.terms)})
    if transposed and not is_class_known(base.config):
        yield stored_transposed(base_uri, transposed)
    if base.task is not None:
        yield task_head_written(base_uri, base.task.name, base.task.head, base.task.dropped)
    for source in plan.adapters:
        if abs(source.strength) < _LEAST_STRENGTH:
            yield vanishing_strength(FindingLocation(subject=source.uri), source.strength)
    head = next((edit.tensor for edit in plan.edits if _is_head(edit.tensor)), None)
    if head is not None and scales_if_tied(base.config) and tie_claim(base.config) is not False:
        yield head_tied_by_transformers_4(FindingLocation(subject=plan.base), head)
    if base.layers:
        layers = counted(len(base.layers), "separate layer", "is")
        text = f"{layers} written; PEFT would add up the updates of all copies of a layer"
        yield unlike_peft(base_uri, text)
    yield from _unlike_peft(plan, adapters)
    sizes = [nbytes for edit in plan.edits if (nbytes := _whole_nbytes(edit, adapters))]
    if sizes:
        yield whole_matrices(base_uri, len(sizes), max(sizes))
    yield from _slow(plan, base_uri)


def _slow(plan: MergePlan, base: FindingLocation) -> Iterator[Finding]:
    if arithmetic.loop() == "numpy" and any(edit.terms for edit in plan.edits):
        yield loop_not_compiled(base)


def _unlike_peft(plan: MergePlan, adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """What PEFT merges otherwise beside repeated layers.

    Source: peft 0.21.2, tuners/lora/model.py; utils/transformers_weight_conversion.py.
    """
    is_untied = any(path[-1] in TIE_KEYS for path, _ in plan.config_patch)
    added = [e.tensor for e in plan.edits if is_embedding(e.source) and any(_adds(t, adapters) for t in e.terms)]
    if is_untied and added:
        yield unlike_peft(added[0], "embedding and head are untied; PEFT would add the update of one of them to both")
    for source, adapter in zip(plan.adapters, adapters, strict=True):
        experts = [weight for weight in adapter.updates if _EXPERT.search(weight)]
        if experts and adapter.config.raw.get("use_rslora") is True:
            text = f"{len(experts)} updates of single experts keep their scale; PEFT's conversion for transformers 5 "
            yield unlike_peft(
                FindingLocation(subject=source.uri), text + "multiplies those of gate and up projections by √2"
            )


def _is_head(tensor: str) -> bool:
    return is_vocabulary(tensor) and not is_embedding(tensor)


def _adds(term: Term, adapters: Sequence[Adapter]) -> bool:
    return not kind_of(_update(term, adapters)).overwrites


def _whole_nbytes(edit: Edit, adapters: Sequence[Adapter]) -> int:
    """Bytes in float32 of the largest matrix that must be there as a whole: of the weight, or of a basis of it."""
    updates = [_update(term, adapters) for term in edit.terms]
    return 4 * max([whole(each, *edit.matrix) for each in updates if (whole := kind_of(each).whole)], default=0)


def _update(term: Term, adapters: Sequence[Adapter]) -> Update:
    return adapters[term.adapter].updates[term.weight][term.index]
