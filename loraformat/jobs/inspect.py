"""inspect: what is in an adapter, from its headers; with norms and spectra, what it does to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraformat import rules
from loraformat.diagnostics import Finding, in_order
from loraformat.errors import UsageError
from loraformat.formats.kit.image.training import training_facts
from loraformat.io import Opened
from loraformat.jobs.inputs.subject import open_base, open_subject, require_real
from loraformat.jobs.measure.figures import SORT_KEYS, figures_of, layer_norms, root_of_squares, sorted_by
from loraformat.model.adapter import Adapter
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.validation import Skipped
from loraformat.model.results.verbs import InspectResult
from loraformat.model.results.weight_figures import WeightRecord
from loraformat.model.summary import Summary, summarize
from loraformat.model.updates import Replace, Rows
from loraformat.report import Report
from loraformat.storage import Location, uri_of

if TYPE_CHECKING:
    from loraformat.jobs.measure.changes import Changes

GROUPINGS = ("auto", "module", "layer", "block", "none")
_REPLACING = ("replace", "rows")
_VALUE_RULES = rules.select(rules.RULES, ("LF4",))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How `inspect` shows the weights.

    >>> import loraformat
    >>> view = loraformat.View(sort="parameters", group="none")
    >>> loraformat.inspect("fixtures/good/peft/tiny-llama", view=view).data.weights[0].parameters
    160

    Attributes:
        sort: one of SORT_KEYS.
        group: one of GROUPINGS; "auto" groups by module if there are many weights.
        heat: whether text output has a heat map, module × layer.
        metadata: whether to show the whole header of an image adapter, including its author's paths.
    """

    sort: str = "weight"
    group: str = "auto"
    heat: bool = False
    metadata: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Studied:
    """An adapter with its figures.

    Attributes:
        changes: of the base; None where there was none or no norms were asked for.
    """

    opened: Opened
    base: Checkpoint | None
    summary: Summary
    records: tuple[WeightRecord, ...]
    findings: tuple[Finding, ...]
    changes: Changes | None = None
    skipped: tuple[Skipped, ...] = ()


def inspect(
    adapter: Location,
    *,
    base: Location | Checkpoint | None = None,
    norms: bool = False,
    spectrum: bool = False,
    view: View = View(),
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    format: str | None = None,  # noqa: A002
    partial: bool = False,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Show format, ranks, scales, targets and parameters of an adapter; values are read only with `norms`.

    >>> import loraformat
    >>> report = loraformat.inspect("fixtures/good/peft/tiny-llama", norms=True)
    >>> report.summary.ranks, report.summary.scales
    ({2: 8}, {1.5: 8})
    >>> [record.weight for record in report.data.weights if record.norm is not None][0]
    'model.layers.0.mlp.down_proj.weight'

    Args:
        adapter: folder or file.
        base: folder or file of the base; adds the share of parameters, adapter / (base + adapter), and with `norms` the
            relative change of its weights, which are then read in windows of rows.
        norms: compute ‖ΔW‖_F of each weight, in float64 from the factors, and run the rules that read values.
        spectrum: compute singular values and effective ranks; implies norms.
        view: order and grouping of the weights.
        alpha: for files that do not state it.
        assumptions: what else the files do not state.
        format: name of a format, to skip detection.
        partial: see `load_adapter`.
        jobs: threads that read the base.
        progress: called with bytes of the base (read, in all).

    Raises:
        StorageError, ContainerError, FormatError: the adapter cannot be read at all.
        AdapterRefused (LF800): it has no updates. UnsupportedUpdate (LF013): it holds complex numbers.
    """
    _check(view)
    adapter = uri_of(adapter)
    studied = study(
        adapter,
        base=base if base is None or isinstance(base, Checkpoint) else uri_of(base),
        norms=norms or spectrum,
        spectrum=spectrum,
        assumptions=with_alpha(alpha, assumptions),
        format=format,
        partial=partial,
        jobs=jobs,
        progress=progress,
    )
    return Report(
        job="inspect",
        subject=adapter,
        format=studied.opened.format.NAME,
        reason=studied.opened.reason,
        summary=studied.summary,
        data=result_of(studied, view),
        findings=studied.findings,
        skipped=studied.skipped,
    )


def study(
    adapter: str,
    *,
    base: str | Checkpoint | None,
    assumptions: Assumptions,
    norms: bool = True,
    spectrum: bool = False,
    histograms: bool = False,
    format: str | None = None,  # noqa: A002
    partial: bool = False,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Studied:
    """An adapter opened and measured. Arguments as for `inspect` and `changes_of`."""
    checkpoint = open_base(base) if base is None or isinstance(base, str) else base
    opened, findings = open_subject(adapter, base=checkpoint, assumptions=assumptions, format=format, partial=partial)
    _require_updates(opened.adapter, findings, adapter)
    summary = summarize(opened.adapter)
    if checkpoint is not None and summary.new_rows is None:
        summary = replace(summary, new_rows=_new_rows(opened.adapter, checkpoint))
    changes: Changes | None = None
    skipped: tuple[Skipped, ...] = ()
    if norms:
        findings = _with_values(opened, checkpoint, findings)
        if checkpoint is not None and not any(finding.code == "LF402" for finding in findings):
            from loraformat.jobs.measure.changes import changes_of

            changes = changes_of(
                checkpoint,
                opened.adapter,
                jobs=jobs,
                with_spectra=spectrum,
                with_histograms=histograms,
                progress=progress,
            )
            skipped = changes.skipped
    return Studied(
        opened=opened,
        base=checkpoint,
        summary=summary,
        records=figures_of(opened.adapter, changes, norms=norms, spectrum=spectrum, jobs=jobs),
        findings=findings,
        changes=changes,
        skipped=skipped,
    )


def result_of(studied: Studied, view: View = View()) -> InspectResult:
    """The figures as what a report holds."""
    summary, base, changes = studied.summary, studied.base, studied.changes
    changed = [record for record in studied.records if record.kind not in _REPLACING]
    config = studied.opened.adapter.config
    header = {} if config.pipeline is None else {k: v for k, v in config.raw.items() if isinstance(v, str)}
    whole = None if changes is None else changes.total(record.weight for record in changed)
    share = None
    if base is not None and summary.parameters:
        share = summary.parameters / (base.parameters + summary.parameters)
    return InspectResult(
        weights=sorted_by(studied.records, view.sort),
        layer_norms=layer_norms(studied.records),
        total_norm=root_of_squares(record.norm for record in changed),
        total_relative_norm=None if whole is None else whole.relative,
        retained_bf16=None if whole is None else whole.retained(0),
        retained_fp16=None if whole is None else whole.retained(1),
        tables=() if changes is None else tuple(sorted(changes.tables, key=lambda table: table.weight)),
        share=share,
        base_scheme=None if base is None or base.quantized is None else base.quantized.scheme,
        grouping=view.group,
        has_heat=view.heat,
        training=training_facts(header),
        metadata=header if view.metadata else {},
    )


def _check(view: View) -> None:
    for name, value, known in (("sort", view.sort, SORT_KEYS), ("group", view.group, GROUPINGS)):
        if value not in known:
            raise UsageError(f"{name}: expected one of {', '.join(known)}, found {value!r}", where="inspect")


def _with_values(opened: Opened, base: Checkpoint | None, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The findings, and those of the rules that read values, which is done anyway."""
    subject = rules.Subject(bundle=opened.bundle, format=opened.format.NAME, adapter=opened.adapter, base=base)
    found, _ = rules.run(subject, _VALUE_RULES, deep=True)
    return in_order((*findings, *found))


def _require_updates(adapter: Adapter, findings: Sequence[Finding], uri: str) -> None:
    """There is something to show, and it is made of real numbers."""
    if not adapter.updates:
        rules.refuse([finding for finding in findings if finding.code == "LF213"], uri)
    require_real(adapter, uri)


def _new_rows(adapter: Adapter, base: Checkpoint) -> int | None:
    """Rows that the adapter's embedding tables have beyond the base's; None where no table replaces one of the base."""
    if adapter.config.vocab_size is None:
        return None
    from loraformat.matching import match

    for weight, (landing, *_) in match(adapter, base).landings.items():
        rows = [update.shape[0] for update in adapter.updates[weight] if isinstance(update, (Replace, Rows))]
        if rows and max(rows) == adapter.config.vocab_size and landing.is_stored:
            return max(0, max(rows) - base.tensors[landing.tensor].shape[0])
    return None
