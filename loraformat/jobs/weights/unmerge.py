"""unmerge: removes adapters from a model that they were merged into."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraformat.containers import open_checkpoint
from loraformat.diagnostics import Finding, FindingLocation, counted, listed
from loraformat.engine import open_engine
from loraformat.errors import AdapterRefused, MergeError, UnsupportedUpdate, UsageError, require_one_of
from loraformat.io import Opened
from loraformat.jobs.algebra.sources import require_additive
from loraformat.jobs.inputs.strength import with_strength
from loraformat.jobs.inputs.subject import refuse_exchanged
from loraformat.jobs.merge.distribution import Engine, distribution
from loraformat.jobs.merge.prepare import Options, Prepared, check_place, open_all, planned, write, written_names
from loraformat.jobs.weights.changes import is_unchanged
from loraformat.jobs.weights.proofs import doubt_of
from loraformat.merger import (
    Arithmetic,
    Inputs,
    Likeness,
    MergePlan,
    Preimages,
    Repetition,
    Resources,
    Reversal,
    Trust,
    Written,
    weight_nbytes,
)
from loraformat.merger.write.manifest import adapter_digest, read_manifest
from loraformat.model.adapter import module_of
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.checkpoint import BaseWeight, Checkpoint
from loraformat.model.results.verbs import FileShare, MergedAdapter, UndoneWeight, UnmergeResult
from loraformat.model.updates import Replace, Rows
from loraformat.report import Report
from loraformat.rules import doubts
from loraformat.storage import Location, Publication, uri_of, uri_or_none
from loraformat.storage import listed as all_of

DEFAULT_MEMORY_NBYTES = 64 << 20
# That the model is the result of a merge, and so not the base that the adapters were trained on, is why it is here.
_EXPECTED = ("LF320", "LF321", "LF814", "LF819")
_COPY = Options(None, None, Arithmetic(), None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What both ways of undoing a merge are given.

    Attributes:
        is_share: whether files are written that another run finishes, which compares and counts.
    """

    merged: Checkpoint
    uri: str
    chosen: Sequence[tuple[str, float]]
    known: Assumptions
    options: Options
    limits: Resources
    force: bool
    progress: Callable[[int, int], None] | None
    is_share: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Undone:
    """What is to be written, and what is known of it."""

    prepared: Prepared
    adapters: tuple[MergedAdapter, ...]
    proof: str
    doubt: str = ""
    weights: tuple[UndoneWeight, ...]
    inputs: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def is_exact(self) -> bool:
        """Whether the base's very bytes are proved."""
        if self.proof == "base":
            return True
        return self.proof == "manifest" and not any(each.unknown or each.unlike for each in self.weights)


def unmerge(
    merged: Location,
    adapters: Sequence[Location],
    out: Location,
    *,
    base: Location | None = None,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    container: str | None = None,
    jobs: int = 1,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    verify: str = "sample",
    resume: bool = False,
    engine: Engine = "threads",
    rank: int | None = None,
    world: int | None = None,
    finish: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    force: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Undo a merge: write a merged model without its adapters, and report whether the result is proven.

    >>> import loraformat
    >>> adapters = ["fixtures/minigpt/fact_all"]
    >>> _ = loraformat.merge("fixtures/minigpt/base", adapters, "with-fact", alpha=1.0)
    >>> report = loraformat.unmerge("with-fact", adapters, "without", alpha=1.0, base="fixtures/minigpt/base")
    >>> report.data.proof, report.data.is_exact
    ('base', True)

    W' − Δ is not always W: a merge rounds, and more than one W may give the same W'. With `base` the merge is repeated
    and compared with the model, and the output has the tensors of the base, bit for bit. Without it, the updates are
    subtracted, and the report counts the values that rounding makes ambiguous. If there are none, and the manifest of
    the model and its digests show that these adapters made it, the output is proven to be the base.

    Args:
        merged: the model.
        adapters: folders or files, each with the strength at which it was merged: "adapter=0.7".
        out: folder that does not exist yet.
        base: the model that they were merged into.
        alpha, assumptions, container, jobs, memory_nbytes, verify, resume: as for `merge`.
        engine, rank, world, finish: as for `merge`. Ranks do not compare and count; `finish` does it for all of them.
        dry_run: count and report; write nothing.
        strict: stop if the output is not proven to be the base.
        force: downgrade forgivable errors to warnings; with `base`, ignore other changes in the model.
        overwrite, publication, announce, progress: as for `merge`.

    Raises: UnsupportedUpdate (LF013): without `base`, DoRA, replaced tables and other updates that are not added.
        MergeError (LF801): the model is not the base with these adapters. AdapterRefused: `strict`, and it is not
        proven. Otherwise as for `merge`.
    """
    uri, base_uri = uri_of(merged), uri_or_none(base)
    require_one_of(verify, ("none", "sample", "full"), "verify")
    chosen = [with_strength(adapter) for adapter in all_of(adapters)]
    if not chosen:
        raise UsageError("no adapters given", where="unmerge")
    chosen_by = distribution(engine, rank, world, finish=finish, resume=resume, dry_run=dry_run)
    refuse_exchanged(uri, [each for each, _ in chosen], "unmerge MERGED ADAPTER")
    run = _Run(
        merged=_opened(uri),
        uri=uri,
        chosen=chosen,
        known=with_alpha(alpha, assumptions),
        options=replace(_COPY, container=container),
        limits=Resources(jobs=jobs, memory_nbytes=memory_nbytes),
        force=force,
        progress=progress,
        is_share=chosen_by.share is not None,
    )
    undone = _subtracted(run) if base_uri is None else _replaced(run, _opened(base_uri), base_uri)
    findings = tuple(each for each in undone.findings if base_uri is not None or each.code not in _EXPECTED)
    if announce is not None:
        announce(findings)
    if strict and not run.is_share and not undone.is_exact:
        raise AdapterRefused(
            _not_proved(undone), where=uri, hint="use --base BASE to compare all of it", findings=findings
        )
    if dry_run:
        check_place(undone.prepared.plan, uri_of(out), undone.inputs, overwrite=overwrite)
        return _report(run, undone, findings, "")
    met: list[Finding] = []

    def meet(more: tuple[Finding, ...]) -> None:
        met.extend(more)
        if announce is not None:
            announce(more)

    trust = Trust(verify=verify, resume=resume)
    prepared = undone.prepared
    outcome = write(
        prepared,
        uri_of(out),
        run.limits,
        trust,
        undone.inputs,
        meet,
        overwrite=overwrite,
        progress=progress,
        publication=publication,
        distribution=chosen_by,
    )
    return _report(run, undone, (*findings, *met), uri_of(out), outcome, chosen_by.described(prepared.plan))


def _opened(uri: str) -> Checkpoint:
    found = open_checkpoint(uri)
    if found.components:
        raise UnsupportedUpdate(
            "a pipeline of several models", where=uri, hint="pass the folder of the component that was merged into"
        )
    return found


def _not_proved(undone: _Undone) -> str:
    if undone.doubt:
        return f"cannot prove that the model is what its merge wrote: {undone.doubt}"
    if undone.proof == "none":
        return "nothing proves that only these adapters made the model"
    unknown = sum(each.unknown + each.unlike for each in undone.weights)
    return f"{counted(unknown, 'value')} of {sum(each.values for each in undone.weights)} cannot be known"


def _subtracted(run: _Run) -> _Undone:
    """The model with the updates taken off."""
    proof, chosen = "none", list(run.chosen)
    negated = [(uri, -strength) for uri, strength in chosen]
    opened, sources, findings = open_all(
        run.merged, negated, run.known, run.options, force=run.force, whole=False, expected=_EXPECTED
    )
    for one in opened:
        _require_sum(one)
    manifest = read_manifest(run.merged.store)
    order = _order_of(manifest, opened, [strength for _, strength in chosen])
    if order is not None:
        opened, sources = [opened[at] for at in order], [sources[at] for at in order]
    # With updates of weights in codes the plan is made too, so that they are refused for what they are.
    wanted = run.options if run.merged.quantized is None else replace(run.options, quantized="mixed")
    prepared = planned(run.merged, opened, sources, wanted, (*doubts(run.merged), *findings))
    _refuse_codes(run, [edit.source for edit in prepared.plan.edits if edit.terms])
    names = [edit.tensor for edit in prepared.plan.edits]
    doubt = ""
    if order is not None and manifest is not None:
        doubt = "" if run.is_share else doubt_of(manifest, run.merged, run.uri, names, run.limits.jobs)
        proof = "none" if doubt or run.is_share else "manifest"
    inputs = Inputs(base=prepared.base, adapters=[one.adapter for one in opened])

    def counts() -> Iterator[tuple[str, Preimages]]:
        for edit in () if run.is_share else prepared.plan.edits:
            each = Reversal(edit, inputs)
            places = list(each.windows(run.limits))
            total = Preimages()
            for found in open_engine(run.limits.jobs).map(lambda place, each=each: each.count(*place), places):  # type: ignore[misc]
                total.add(found)
            yield edit.tensor, total

    weights = tuple(
        UndoneWeight(
            weight=name,
            values=one.values,
            unknown=one.unknown,
            unlike=one.unlike,
            bound=one.bound,
            not_finite=one.not_finite,
        )
        for name, one in counts()
    )
    return _Undone(
        prepared=prepared,
        adapters=tuple(_adapter(one, -source.strength) for one, source in zip(opened, sources, strict=True)),
        proof=proof,
        doubt=doubt,
        weights=weights,
        inputs=(run.uri, *(uri for uri, _ in chosen)),
        findings=prepared.findings,
    )


def _refuse_codes(run: _Run, names: Sequence[str]) -> None:
    """Raises: UnsupportedUpdate (LF013): weights that the adapters change are in codes in the merged model."""
    found = sorted(name for name in names if name in run.merged.tensors and run.merged.tensors[name].encoded)
    if not found or run.merged.quantized is None:
        return
    raise UnsupportedUpdate(
        f"the adapters change {counted(len(found), 'quantized weight')} ({run.merged.quantized.scheme}), first "
        f"{found[0]}: they were quantized again after the merge, so the updates cannot be subtracted",
        where=run.uri,
        hint="keep or download the original base instead",
    )


def _require_sum(opened: Opened) -> None:
    """Raises: UnsupportedUpdate (LF013): an update that cannot be taken off again, by name."""
    require_additive(opened.adapter, opened.uri, "unmerge without --base")
    for weight, chain in opened.adapter.updates.items():
        if any(isinstance(update, (Replace, Rows)) for update in chain):
            raise UnsupportedUpdate(
                "the adapter replaces values of this weight, and the merged model no longer has the original ones",
                where=FindingLocation(subject=opened.uri, tensor=weight),
                hint="use --base BASE to restore them",
            )


def _order_of(
    manifest: Mapping[str, Any] | None, opened: Sequence[Opened], strengths: Sequence[float]
) -> list[int] | None:
    """In which order the adapters were merged; None where they are not those of the last merge, all of them.

    A merge into another dtype, by chance, into codes, or by a method other than the sum is not taken back by values.
    """
    if manifest is None or manifest["job"] != "merge" or manifest["base"].keys() - {"files"}:
        return None
    stated = manifest["options"]
    if stated["rounding"] != "nearest" or stated["dtype"] is not None or stated.get("method"):
        return None
    given = [(adapter_digest(one.adapter), strength) for one, strength in zip(opened, strengths, strict=True)]
    merged = [(each["digest"], each["strength"]) for each in manifest["adapters"]]
    if Counter(given) != Counter(merged):
        return None
    left, order = list(range(len(given))), []
    for each in merged:
        at = next(number for number in left if given[number] == each)
        left.remove(at)
        order.append(at)
    return order


def _replaced(run: _Run, base: Checkpoint, uri: str) -> _Undone:
    """The base itself, once it is shown that the model is the base with the adapters."""
    opened, sources, findings = open_all(base, run.chosen, run.known, run.options, force=run.force, whole=False)
    wanted = replace(
        run.options,
        arithmetic=_arithmetic_of(run.merged),
        quantized=None if base.quantized is None else "dense",
    )
    prepared = planned(base, opened, sources, wanted, findings)
    _refuse_codes(run, [edit.tensor for edit in prepared.plan.edits if edit.terms])
    likeness = {} if run.is_share else _likeness(run, prepared, [one.adapter for one in opened])
    far = [name for name, one in likeness.items() if not one.holds]
    others = [] if run.is_share else _others_that_changed(run, base, prepared.plan)
    if (far or others) and not run.force:
        parts = []
        if far:
            worst = max(far, key=lambda name: likeness[name].apart)
            parts.append(
                f"{likeness[worst].unequal} of {likeness[worst].values} values of {worst} differ from those of a "
                "merge by more than rounding" + (f", and so do {len(far) - 1} more weights" if len(far) > 1 else "")
            )
        if others:
            parts.append(f"{counted(len(others), 'tensor')} changed that no adapter changes: {listed(others)}")
        raise MergeError(
            f"the model is not the base with {counted(len(opened), 'adapter')}: {'; '.join(parts)}",
            where=run.uri,
            hint="check base, adapters and strengths; use --force to write the base anyway",
        )
    copied = planned(base, (), (), run.options, ())
    return _Undone(
        prepared=copied,
        adapters=tuple(_adapter(one, source.strength) for one, source in zip(opened, sources, strict=True)),
        proof="none" if far or others or run.is_share else "base",
        weights=tuple(
            UndoneWeight(weight=name, values=one.values, unlike=one.unequal) for name, one in likeness.items()
        ),
        inputs=(run.uri, uri, *(each for each, _ in run.chosen)),
        findings=prepared.findings,
    )


def _arithmetic_of(merged: Checkpoint) -> Arithmetic:
    """How a merge combined its adapters, as its manifest says; the sum where it has none."""
    stated = (read_manifest(merged.store) or {}).get("options", {})
    fields = {
        key: stated[key] for key in ("method", "density", "sign", "seed") if stated.get("method") and key in stated
    }
    return Arithmetic(**fields)


def _likeness(run: _Run, prepared: Prepared, adapters: Sequence[Any]) -> dict[str, Likeness]:
    """How the merged weights compare with those of the model.

    Raises: MergeError (LF801): the model lacks one, or has it in another shape or in codes.
    """
    inputs = Inputs(base=prepared.base, adapters=adapters)
    found: dict[str, Likeness] = {}
    for edit in prepared.plan.edits:
        weight = run.merged.weights.get(edit.tensor)
        if weight is None or weight.shape != edit.shape or not weight.dtype.is_floating:
            state = "is missing" if weight is None else f"is {weight.shape}, but a merge makes it {edit.shape}"
            raise MergeError(f"{edit.tensor} {state}", where=run.uri, hint="is the model the result of this merge?")
        each = Repetition(replace(edit, dtype=weight.dtype.safetensors), inputs, prepared.plan.arithmetic)
        rows = weight.as_matrix(edit.row_axes)

        def compared(place: tuple[int, int], each: Repetition = each, rows: BaseWeight = rows) -> Likeness:
            return each.compare(*place, _matrix(rows, *place))

        total = Likeness()
        for one in open_engine(run.limits.jobs).map(compared, list(each.windows(run.limits))):
            total.add(one)
        found[edit.tensor] = total
    return found


def _matrix(rows: BaseWeight, start: int, stop: int) -> Any:  # noqa: ANN401 - an array
    import numpy as np

    return rows.read(start, stop).astype(np.float64).reshape(stop - start, -1)


def _others_that_changed(run: _Run, base: Checkpoint, plan: MergePlan) -> list[str]:
    """Tensors that no adapter changes and that are not those of the base.

    A tied table that shares its bytes with a computed one is the other's values under a second name.
    """
    edited = {edit.tensor for edit in plan.edits}
    shared = {name: other for shard in plan.shards for name, other in shard.aliases.items() if other in edited}
    names = sorted((base.tensors.keys() | run.merged.tensors.keys()) - edited)

    def differs(name: str) -> bool:
        original = run.merged.weights.get(shared[name]) if name in shared else base.weights.get(name)
        if original is None or name not in run.merged.weights:
            return True
        return not is_unchanged(original, run.merged.weights[name])

    changed = open_engine(run.limits.jobs).map(differs, names)
    return [name for name, is_other in zip(names, changed, strict=True) if is_other]


def _report(
    run: _Run,
    undone: _Undone,
    findings: tuple[Finding, ...],
    out: str,
    outcome: Written | None = None,
    share: FileShare | None = None,
) -> Report:
    plan = undone.prepared.plan
    names = written_names(plan, outcome)
    return Report(
        job="unmerge",
        subject=run.uri,
        format=undone.adapters[0].format if len(undone.adapters) == 1 else "",
        data=UnmergeResult(
            merged=run.uri,
            adapters=undone.adapters,
            proof=undone.proof,
            doubt=undone.doubt,
            is_exact=undone.is_exact,
            weights=tuple(sorted(undone.weights, key=lambda each: each.weight)),
            bytes_written=weight_nbytes(plan) if share is None else share.nbytes,
            files=names,
            is_dry_run=not out,
            share=share,
        ),
        findings=findings,
        written=tuple(os.path.join(out, name) for name in names) if out and share is None else (),
    )


def _adapter(opened: Opened, strength: float) -> MergedAdapter:
    modules = len({module_of(weight) for weight in opened.adapter.updates})
    return MergedAdapter(uri=opened.uri, format=opened.format.NAME, applied=modules, modules=modules, strength=strength)
