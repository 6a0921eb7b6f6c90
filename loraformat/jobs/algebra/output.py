"""Writes an adapter made from others: its config, files and report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from loraformat import formats
from loraformat.containers import sources_of
from loraformat.diagnostics import Finding, FindingLocation, counted
from loraformat.errors import AdapterRefused
from loraformat.formats.kit.base import Format, WriteOptions
from loraformat.io import hints_of, refuse_losses, write_adapter
from loraformat.jobs.algebra.options import OutputOptions
from loraformat.jobs.algebra.sources import OpenedSource
from loraformat.jobs.card.facts import Origin as CardOrigin
from loraformat.jobs.card.facts import UsedAdapter, fields_of_card, name_of
from loraformat.jobs.card.publish import publishing_of, write_card
from loraformat.merger.plan.findings import kept_private
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.assumptions import Assumptions
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.factor_changes import FactorResult
from loraformat.model.summary import summarize
from loraformat.model.updates import LowRank, Update
from loraformat.report import Report
from loraformat.storage import check_output, is_hub, is_restricted, permissions_for

# Settings of PEFT that say how training made or split the factors, which are others now.
_OF_THE_OLD_FACTORS = frozenset(
    [
        *("alpha_pattern", "corda_config", "enable_lora", "eva_config", "init_lora_weights", "kasa_config"),
        *("loftq_config", "lora_ga_config", "rank_pattern", "target_parameters", "use_bdlora", "use_rslora"),
    ]
)


def config_of(before: AdapterConfig, updates: Mapping[str, tuple[Update, ...]], *, is_fresh: bool) -> AdapterConfig:
    """The config of an output.

    Args:
        is_fresh: whether the factors are others than the source's.
    """
    ranks = {
        weight: update.rank for weight, chain in updates.items() for update in chain if isinstance(update, LowRank)
    }
    raw = {name: value for name, value in before.raw.items() if not (is_fresh and name in _OF_THE_OLD_FACTORS)}
    return replace(before, raw=raw, declared_ranks=ranks)


def with_updates(source: Adapter, updates: Mapping[str, tuple[Update, ...]], *, is_fresh: bool) -> Adapter:
    """An adapter with other updates of some or all of its weights."""
    config = config_of(source.config, updates, is_fresh=is_fresh)
    if updates.keys() != source.updates.keys():
        # The source's short names would select modules that have no update any more.
        config = replace(config, targets=None)
    return replace(source, config=config, updates=dict(sorted(updates.items())), origin=None)


def target_of(options: OutputOptions, source: OpenedSource) -> Format:
    """The format to write: the one that was asked for, else the source's own, else PEFT."""
    if options.to is not None:
        return formats.writable(options.to)
    return source.opened.format if source.opened.format.WRITES else formats.get("peft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What an output is made of, as far as its files and its report depend on that.

    Attributes:
        uri: what the report is about.
        inputs: paths that the output must not touch.
        used: (store, names) of the files that were read, which the output is not more readable than.
        format, reason: of the first adapter, and why it was detected; "" where it is made of models.
        findings: what was found in them.
    """

    uri: str
    inputs: tuple[str, ...]
    used: tuple[tuple[object, Iterable[str]], ...]
    format: str = ""
    reason: str = ""
    findings: tuple[Finding, ...] = ()


def origin_of(sources: Sequence[OpenedSource]) -> Origin:
    """Adapters as what an output is made of."""
    first = sources[0].opened
    return Origin(
        uri=first.uri,
        inputs=tuple(source.opened.uri for source in sources),
        used=tuple(each for source in sources for each in sources_of(source.opened.bundle)),
        format=first.format.NAME,
        reason=first.reason,
        findings=tuple(each for source in sources for each in source.findings),
    )


def write(
    adapter: Adapter,
    result: FactorResult,
    origin: Origin,
    out: str,
    *,
    job: str,
    base: Checkpoint | None,
    options: OutputOptions,
    findings: tuple[Finding, ...] = (),
) -> Report:
    """Write the output, whole or not at all, and report.

    Raises: AdapterRefused where the format cannot express it, or with `strict` where anything is lost.
    """
    if not adapter.updates:
        raise AdapterRefused("nothing to write: the output would not change any weight", where=job)
    target = formats.get(result.target)
    wanted = WriteOptions(container=options.container, base=hints_of(Assumptions(), base))
    losses = tuple(target.losses(adapter, wanted))
    notes = (*origin.findings, *findings)
    permissions = permissions_for(origin.used, out)
    if is_restricted(permissions) and not options.dry_run:
        notes = (*notes, kept_private(FindingLocation(subject=out), permissions))
    if options.announce is not None:
        options.announce((*notes, *losses))
    refuse_losses((*findings, *losses), target.NAME, strict=options.strict)
    met: list[Finding] = []
    if options.dry_run:
        made = target.write(adapter, wanted)
        check_output(out, overwrite=options.overwrite, inputs=origin.inputs, names=made.files)
        files, nbytes = tuple(sorted(made.files)), summarize(adapter).nbytes
    else:
        publishing = publishing_of(options.publication, out, partial(_meet, met, options.announce))
        written = write_adapter(
            adapter,
            out,
            to=target.NAME,
            container=options.container,
            base=base,
            overwrite=options.overwrite,
            inputs=origin.inputs,
            permissions=permissions,
            progress=options.progress,
            publishing=publishing,
            finish=lambda output: write_card(output, out, publishing, lambda: _card(result, job, base)),
        )
        files, nbytes = tuple(written), sum(written.values())
    return Report(
        job=job,
        subject=origin.uri,
        format=origin.format,
        reason=origin.reason,
        summary=summarize(adapter),
        data=replace(result, files=files, bytes_written=nbytes, is_dry_run=options.dry_run),
        findings=(*notes, *losses, *met),
        written=() if options.dry_run else tuple(os.path.join(out, name) for name in files),
    )


def _meet(
    met: list[Finding], announce: Callable[[tuple[Finding, ...]], None] | None, findings: tuple[Finding, ...]
) -> None:
    met.extend(findings)
    if announce is not None:
        announce(findings)


_MADE = {
    "resize": "with other ranks",
    "combine": "combined from several",
    "scale": "scaled",
    "pick": "with some of its updates",
    "extract": "extracted from a fine-tuned model",
    "ablate": "which removes directions from its weights",
    "init": "not trained yet",
}


def _card(result: FactorResult, job: str, base: Checkpoint | None) -> CardOrigin:
    """What a card says of an adapter that was made of others, or of models."""
    return CardOrigin(
        base="" if base is None else base.uri,
        base_fields=fields_of_card(None if base is None else base.store),
        adapters=tuple(
            UsedAdapter(name=name_of(uri), strength=weight, is_on_the_hub=is_hub(uri))
            for uri, weight in result.adapters
        ),
        retained=result.retained,
        made=_MADE[job],
    )


def nothing_left(job: str, count: int) -> AdapterRefused:
    """The error about sources whose updates are all zero."""
    return AdapterRefused(f"{counted(count, 'update')} of the sources, all of them zero: nothing is left", where=job)
