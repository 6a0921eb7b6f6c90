"""plot: adapters as one page or one figure; several checkpoints of a run over their steps."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from loraformat._version import __version__
from loraformat.containers import open_bundle, open_checkpoint, sources_of
from loraformat.diagnostics import Finding
from loraformat.errors import LoraFormatError, StorageError, UsageError
from loraformat.jobs.inputs.made_by import read_made_by, with_made
from loraformat.jobs.inspect import Studied, result_of, study
from loraformat.jobs.measure.figures import root_of_squares
from loraformat.model.adapter import Adapter
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.bundle import JsonFile
from loraformat.model.results.factor_changes import FactorResult
from loraformat.model.results.plot_data import ComponentRecord, Picture, Subject
from loraformat.model.results.verbs import PlotResult
from loraformat.model.results.weight_figures import WeightRecord
from loraformat.model.summary import summarize
from loraformat.model.updates import LowRank
from loraformat.report import Report
from loraformat.report.words import plural
from loraformat.storage import LocalStore, Location, listed, permissions_for, uri_of, uri_or_none

FORMS = {".html": "html", ".htm": "html", ".svg": "svg", ".png": "png", ".pdf": "pdf"}


def plot(
    adapters: Sequence[Location],
    out: Location,
    *,
    base: Location | None = None,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    format: str | None = None,  # noqa: A002
    made_by: Sequence[Location] = (),
    overwrite: bool = False,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Plot adapters into one file, which appears complete or not at all.

    >>> import loraformat
    >>> report = loraformat.plot(["fixtures/good/peft/tiny-llama"], "tiny-llama.html")
    >>> report.data.form, report.written
    ('html', ('tiny-llama.html',))

    If all adapters have different steps (`global_step` of trainer_state.json, otherwise the number at the end of the
    folder name, "checkpoint-500") and change the same weights, they are treated as checkpoints of one run. The last
    checkpoint of a run is plotted weight by weight, the others by layer; adapters that are not a run are each plotted
    weight by weight. The report has the findings of all of them.

    Args:
        adapters: folders or files, at least one.
        out: a new file; its extension sets the format: .html, .svg, .png, .pdf. All but .html need matplotlib.
        base: folder or file of the base; adds the change of its weights, for each adapter plotted weight by weight.
        alpha, assumptions, format: as for `inspect`.
        made_by: for each adapter, in the same order, the JSON report of the verb that wrote it: `resize`, `combine` or
            `extract` with `--format json`. Adds the error of each weight; the adapters are then not treated as
            checkpoints of a run.
        overwrite: replace an existing file.
        jobs: threads that read the base.
        progress: called with bytes of the base (read, in all).

    Raises: UsageError (LF021): the extension is not one of FORMS; a report is about another adapter. ConfigError:
        `made_by` is not such a report. StorageError: the file exists or cannot be written.
        StorageError, ContainerError, FormatError: an adapter cannot be read.
    """
    adapters, out, base = listed(adapters), uri_of(out), uri_or_none(base)
    form, store = _form(out), _store(out, overwrite=overwrite)
    _refuse_missing_extra(form)
    assumed = with_alpha(alpha, assumptions)
    reports = listed(made_by)
    if reports and len(reports) != len(adapters):
        counts = f"{plural(len(adapters), 'adapter')} and {plural(len(reports), 'report')}"
        text = f"{counts}: expected one --made-by for each adapter"
        raise UsageError(text, where="plot")
    if reports and form != "html":
        text = f"--made-by is drawn on pages (.html), not in a figure ({os.path.splitext(out)[1]})"
        raise UsageError(text, where=out)
    made = [read_made_by(report) for report in reports]
    names: list[tuple[str, int | None]] = [(uri, None) for uri in adapters] if made else _steps_of(adapters)
    checkpoint = None if base is None else open_checkpoint(base)

    def studied_as(uri: str, *, is_whole: bool) -> Studied:
        return study(
            uri,
            base=checkpoint if is_whole else None,
            assumptions=assumed,
            spectrum=is_whole,
            histograms=is_whole,
            format=format,
            jobs=jobs,
            progress=progress,
        )

    is_whole = [step is None or number == len(names) for number, (_, step) in enumerate(names, 1)]
    studied = [(uri, step, studied_as(uri, is_whole=whole)) for (uri, step), whole in zip(names, is_whole, strict=True)]
    if not _is_run(studied):
        studied = [
            (uri, step, one if whole else studied_as(uri, is_whole=True))
            for (uri, step, one), whole in zip(studied, is_whole, strict=True)
        ]
    picture = _picture(base, studied)
    if made:
        adapters_of = (one.opened.adapter for _, _, one in studied)
        subjects = zip(picture.subjects, made, reports, adapters_of, strict=True)
        picture = replace(picture, subjects=tuple(_with_made(*each) for each in subjects))
    data = _drawn(picture, form)
    name = os.path.basename(out)
    store = LocalStore(store.folder, _permissions(studied, out))
    with store.create(name, len(data)) as writer:
        writer.write(data)
    main = studied[-1][2]
    return Report(
        job="plot",
        subject=names[-1][0],
        format=main.opened.format.NAME,
        reason=main.opened.reason,
        data=PlotResult(
            form=form,
            adapters=tuple(uri for uri, _ in names),
            steps=tuple(step for _, step in names if step is not None) if picture.is_run else (),
            weights=len(main.records),
            nbytes=len(data),
        ),
        findings=_findings(studied),
        skipped=tuple(skipped for _, _, one in studied for skipped in one.skipped),
        written=(out,),
    )


def _with_made(subject: Subject, made: tuple[str, FactorResult], report: str, adapter: Adapter) -> Subject:
    """The subject with what the verb that wrote it reported."""
    verb, result = made
    weights = with_made(subject.result.weights, result, report, subject.uri, _fused(adapter))
    return replace(subject, result=replace(subject.result, weights=weights), made_by=verb, made=result)


def _fused(adapter: Adapter) -> set[str]:
    """Weights that have a factor in common with another: q, k and v of a fused projection share one."""
    users: dict[object, set[str]] = {}
    for weight, chain in adapter.updates.items():
        for update in chain:
            if isinstance(update, LowRank):
                users.setdefault((update.down.read, update.down.shape), set()).add(weight)
    return {weight for group in users.values() if len(group) > 1 for weight in group}


def _permissions(studied: Sequence[tuple[str, int | None, Studied]], out: str) -> int:
    """The mode bits of the picture: it is never more readable than what it shows."""
    bundles = [one.opened.bundle for _, _, one in studied]
    return permissions_for([source for bundle in bundles for source in sources_of(bundle)], out)


def _form(out: str) -> str:
    ending = os.path.splitext(out)[1].lower()
    if ending not in FORMS:
        known = ", ".join(FORMS)
        raise UsageError(f"expected a file name that ends in one of {known}, found {ending!r}", where=out)
    return FORMS[ending]


def _store(out: str, *, overwrite: bool) -> LocalStore:
    """The folder of the output, looked at before any work is done."""
    folder = os.path.dirname(out) or "."
    store = LocalStore(folder)
    store.check_target(os.path.basename(out))
    if os.path.lexists(out) and not overwrite:
        raise StorageError("the output exists already", where=out, hint="replace it with --overwrite")
    return store


def _refuse_missing_extra(form: str) -> None:
    if form != "html":
        from loraformat.report.page.figure import require_matplotlib

        require_matplotlib()


def _steps_of(adapters: Sequence[str]) -> list[tuple[str, int | None]]:
    """(URI, step), sorted by step where every adapter has one of its own; otherwise in the order given."""
    found = [(uri, _step(uri, open_bundle(uri).files.get("trainer_state.json"))) for uri in adapters]
    steps = [step for _, step in found]
    if len(found) > 1 and None not in steps and len(set(steps)) == len(steps):
        return sorted(found, key=lambda pair: pair[1] or 0)
    return [(uri, None) for uri, _ in found] if len(found) > 1 else found


def _step(uri: str, state: object) -> int | None:
    if isinstance(state, JsonFile):
        try:
            value = state.load()
        except LoraFormatError:
            value = None  # not a fault of the adapter, and the name of the folder may have the step
        step = value.get("global_step") if isinstance(value, Mapping) else None
        if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
            return step
    named = re.search(r"(?:^|[-_.])(\d{1,12})(?:\.[A-Za-z]+)?$", os.path.basename(os.path.normpath(uri)))
    return int(named[1]) if named else None


def _findings(studied: Sequence[tuple[str, int | None, Studied]]) -> tuple[Finding, ...]:
    """What was found about every adapter; with its path before the place where there are several."""
    if len(studied) == 1:
        return studied[0][2].findings
    return tuple(
        replace(finding, location=replace(finding.location, subject=uri))
        for uri, _, one in studied
        for finding in one.findings
    )


def _is_run(studied: Sequence[tuple[str, int | None, Studied]]) -> bool:
    """Whether they are checkpoints of one run: all have a step of their own and change the same weights."""
    names = studied[-1][2].opened.adapter.updates.keys()
    return len(studied) > 1 and all(
        step is not None and one.opened.adapter.updates.keys() == names for _, step, one in studied
    )


def _bins(studied: Studied) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bins of the base's values and of their changes; empty ones without a base."""
    if studied.changes is None:
        return (), ()
    total = studied.changes.total(record.weight for record in studied.records)
    return total.base_bins, total.update_bins


def _picture(base: str | None, studied: Sequence[tuple[str, int | None, Studied]]) -> Picture:
    last = studied[-1][2]
    return Picture(
        version=__version__,
        base=base,
        subjects=tuple(
            Subject(
                uri=uri,
                label=_label(uri, step, [each for each, _, _ in studied]),
                step=step,
                format=one.opened.format.NAME,
                summary=one.summary,
                result=result_of(one),
                findings=one.findings,
                config=one.opened.adapter.config.raw,
                components=_components(one),
                cosine=_cosine(one.opened.adapter, last.opened.adapter) if len(studied) > 1 else None,
                base_bins=_bins(one)[0],
                update_bins=_bins(one)[1],
            )
            for uri, step, one in studied
        ),
        is_run=_is_run(studied),
    )


def _components(studied: Studied) -> tuple[ComponentRecord, ...]:
    """A record of each component of an image or video model that the adapter changes."""
    pipeline = studied.opened.adapter.config.pipeline
    if pipeline is None:
        return ()
    groups: dict[str, list[WeightRecord]] = {}
    for record in studied.records:
        groups.setdefault(pipeline.component_of(record.weight), []).append(record)
    return tuple(
        ComponentRecord(
            component=component,
            weights=len(records),
            ranks=dict(sorted(Counter(record.rank for record in records if record.rank is not None).items())),
            parameters=summarize(studied.opened.adapter.only(component)).parameters,
            norm=root_of_squares(record.norm for record in records),
            relative_norm=None
            if studied.changes is None
            else studied.changes.total(record.weight for record in records).relative,
        )
        for component, records in sorted(groups.items())
    )


def _label(uri: str, step: int | None, others: Sequence[str]) -> str:
    """The step, or the last part of the path; the whole path where two end alike."""
    if step is not None and len(others) > 1:
        return f"step {step:,}"
    name = os.path.basename(os.path.normpath(uri))
    alike = [other for other in others if os.path.basename(os.path.normpath(other)) == name]
    return name if len(alike) < 2 else uri


def _cosine(one: Adapter, other: Adapter) -> float | None:
    """The cosine of all that two adapters add together; None where they add nothing that compares."""
    from loraformat.algebra import frobenius, inner

    products: list[float] = []
    norms: tuple[list[float], list[float]] = ([], [])
    for weight in sorted(one.updates.keys() & other.updates.keys()):
        for mine, theirs in zip(one.updates[weight], other.updates[weight], strict=False):
            product = inner(mine, theirs)
            if product is not None:
                products.append(product)
                norms[0].append(frobenius(mine) or 0.0)
                norms[1].append(frobenius(theirs) or 0.0)
    whole = math.hypot(*norms[0]) * math.hypot(*norms[1])
    return max(-1.0, min(1.0, math.fsum(products) / whole)) if whole > 0 and math.isfinite(whole) else None


def _drawn(picture: Picture, form: str) -> bytes:
    if form == "html":
        from loraformat.report.page.html import render_page

        return render_page(picture).encode()
    from loraformat.report.page.figure import render_figure

    return render_figure(picture, form)
