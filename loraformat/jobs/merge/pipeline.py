"""A merge into a diffusers pipeline: component by component, into one folder that appears complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from loraformat import rules
from loraformat.diagnostics import Finding, FindingLocation, listed, show
from loraformat.errors import UnmatchedUpdate, UsageError
from loraformat.jobs.merge.distribution import ALONE, Distribution
from loraformat.jobs.merge.prepare import Options, Prepared, open_all, planned, report_of, written_names
from loraformat.merger import (
    AdapterSource,
    Facts,
    Inputs,
    Resources,
    Share,
    Trust,
    Written,
    divided,
    facts_of_merge,
    finish_merge,
    permissions_of,
    retentions,
    run_merge,
    run_share,
    sizes_of,
    source_of,
    total_share,
    weight_nbytes,
    word_of,
)
from loraformat.merger.plan.findings import kept_private, unfinished_cleared
from loraformat.merger.write.manifest import names_written
from loraformat.merger.write.run import Source as Files
from loraformat.model.assumptions import Assumptions
from loraformat.model.bundle import DIGESTS, MANIFEST, OpenedFiles
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.verbs import Checked, FileShare, MergedAdapter, MergeResult
from loraformat.report import Report
from loraformat.storage import (
    MARKER,
    OWN_PREFIX,
    Copy,
    Output,
    Store,
    check_output,
    has_folders,
    is_hub,
    is_restricted,
    join,
    open_store,
    permissions_for,
    require_space,
    stage,
)

# What a merge into one model writes beside the model; of a pipeline that was merged before it is stale.
_RECORDS = (MANIFEST, DIGESTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRun:
    """Where and how a pipeline is written; see `merge`.

    Attributes:
        strengths: component → factor for its updates.
        distribution: who computes the weight files, over all components.
    """

    base: Checkpoint
    out: str
    limits: Resources
    trust: Trust
    overwrite: bool
    announce: Callable[[tuple[Finding, ...]], None] | None
    progress: Callable[[int, int], None] | None
    strengths: Mapping[str, float]
    distribution: Distribution = ALONE


def merge_pipeline(
    run: PipelineRun,
    adapters: Sequence[tuple[str, float]],
    assumptions: Assumptions,
    options: Options,
    *,
    force: bool,
    dry_run: bool,
) -> Report:
    """Merge adapters into the components that they change; everything else of the pipeline is copied.

    Raises: UsageError (LF021): an option that pipelines do not have, or a pipeline that is not on a disk.
        UnmatchedUpdate (LF301): an update of a component that the pipeline does not have. AdapterRefused (LF800) and
        all that a merge into one model raises.
    """
    _check_options(run, options)
    opened, sources, findings = open_all(run.base, adapters, assumptions, options, force=force, whole=dry_run)
    parts: dict[str, Prepared] = {}
    for component, checkpoint in run.base.components.items():
        mine = [(one, one.adapter.only(component), source) for one, source in zip(opened, sources, strict=True)]
        changing = [(one, part, source) for one, part, source in mine if part.updates]
        if changing:
            parts[component] = planned(
                checkpoint,
                [replace(one, adapter=part) for one, part, _ in changing],
                [_of_component(source, component, run) for _, _, source in changing],
                options,
                tuple(rules.doubts(checkpoint)),
            )
    _check_complete(run, {name for one in opened for name in one.adapter.updates})
    if not parts:
        raise UnmatchedUpdate("no adapter changes a component of this pipeline", where=run.base.uri)
    _check_strengths(run, parts)
    found = (*findings, *(finding for part in parts.values() for finding in part.findings))
    if run.announce is not None:
        run.announce(found)
    copies = {name: open_store(os.path.join(run.base.uri, name)) for name in run.base.folders if name not in parts}
    if dry_run:
        check_output(
            run.out,
            overwrite=run.overwrite,
            inputs=(run.base.uri, *(uri for uri, _ in adapters)),
            names=_replaceable(run, parts, copies),
            written=_written_before(run),
        )
        return _report(run, found, parts, {}, _names(run, parts, copies))
    met: list[Finding] = []

    def meet(several: tuple[Finding, ...]) -> None:
        met.extend(several)
        if run.announce is not None:
            run.announce(several)

    outcomes = _write(run, [uri for uri, _ in adapters], parts, copies, meet)
    return _report(run, (*found, *met), parts, outcomes, _names(run, parts, copies, outcomes))


def _of_component(source: AdapterSource, component: str, run: PipelineRun) -> AdapterSource:
    strength = source.strength * run.strengths.get(component, 1.0)
    return replace(source, of_component=component, strength=strength)


def _check_options(run: PipelineRun, options: Options) -> None:
    if not has_folders(run.base.store) or is_hub(run.out):
        is_out = has_folders(run.base.store)
        hint = "write a folder and upload it with `hf upload`" if is_out else "download it first"
        text = "a pipeline can be merged only on a disk or in an object store"
        raise UsageError(text, where="-o" if is_out else "merge", hint=hint)
    strange = sorted(run.strengths.keys() - run.base.components.keys())
    if strange:
        known = ", ".join(run.base.components)
        text = f"the pipeline has no component {show(strange[0], 60)}"
        raise UsageError(text, where="--strength", hint=f"its components are {known}")
    unknown = {
        "--dequantize, --keep-quantized, --requantize and --as-trained": options.quantized is not None,
        "--container": options.container is not None,
    }
    hint = "convert --to peft writes a folder for each component; merge that into the component's folder"
    for option, is_given in unknown.items():
        if is_given:
            raise UsageError(f"{option}: not supported for a pipeline", where="merge", hint=hint)


def _check_complete(run: PipelineRun, names: set[str]) -> None:
    """Raises: UnmatchedUpdate (LF301): an update that no component takes, where `--force` let it pass."""
    lost = sorted(name for name in names if name.partition(".")[0] not in run.base.components)
    if lost:
        raise UnmatchedUpdate(
            f"{listed([show(name, 120) for name in lost], 3)}: the pipeline has no such component",
            where=run.base.uri,
            hint=f"its components are {', '.join(run.base.components)}",
        )


def _check_strengths(run: PipelineRun, changed: Collection[str]) -> None:
    """Raises: UsageError: a strength for a component that no adapter changes, which would have no effect."""
    idle = sorted(run.strengths.keys() - set(changed))
    if idle:
        text = f"no adapter changes {show(idle[0], 60)}, so that its strength has no effect"
        raise UsageError(text, where="--strength", hint=f"what is changed: {', '.join(changed)}")


def _names(
    run: PipelineRun,
    parts: Mapping[str, Prepared],
    copies: Mapping[str, Store],
    outcomes: Mapping[str, Written] | None = None,
) -> tuple[str, ...]:
    """All files of the output, as far as known before it is written."""
    done = outcomes or {}
    found = list(_copied(run.base.store))
    found += [f"{name}/{file}" for name, store in copies.items() for file in _copied(store)]
    found += [f"{name}/{file}" for name, one in parts.items() for file in written_names(one.plan, done.get(name))]
    return tuple(sorted(found))


def _copied(store: OpenedFiles) -> dict[str, int]:
    """The files of a folder that are copied, with their sizes."""
    return {name: nbytes for name, nbytes in store.files().items() if name not in _RECORDS}


def _written_before(run: PipelineRun) -> Callable[[str], Collection[str]]:
    """What an earlier merge wrote into the folders of its components, as their manifests say."""

    def names(path: str) -> set[str]:
        return {f"{name}/{file}" for name in run.base.folders for file in names_written(os.path.join(path, name))}

    return names


def _replaceable(run: PipelineRun, parts: Mapping[str, Prepared], copies: Mapping[str, Store]) -> tuple[str, ...]:
    """Names of files and folders that a run may replace in an output that exists."""
    return (*_names(run, parts, copies), *(f"{name}/" for name in run.base.folders))


def _write(
    run: PipelineRun,
    adapters: Sequence[str],
    parts: dict[str, Prepared],
    copies: Mapping[str, Store],
    meet: Callable[[tuple[Finding, ...]], None],
) -> dict[str, Written]:
    """Write everything; what was computed, by component."""
    permissions = permissions_for([(run.base.store, run.base.others)], run.out)
    for name, part in parts.items():
        permissions &= permissions_of(_inputs(part), _used(part), part.plan, os.path.join(run.out, name))
    where = FindingLocation(subject=run.out)
    if is_restricted(permissions):
        meet((kept_private(where, permissions),))
    facts = {name: facts_of_merge(one.plan, _inputs(one), _used(one), run.trust) for name, one in parts.items()}
    word = word_of({f"{name}: {what}": value for name, known in facts.items() for what, value in known.items()})
    inputs, names = (run.base.uri, *adapters), _replaceable(run, parts, copies)
    if run.distribution.share is not None:
        with join(
            run.out,
            word,
            overwrite=run.overwrite,
            inputs=inputs,
            names=names,
            written=_written_before(run),
            permissions=permissions,
        ) as output:
            return _write_share(output, run, parts, facts, meet)
    with stage(
        run.out,
        overwrite=run.overwrite,
        inputs=inputs,
        resume=run.trust.resume,
        names=names,
        written=_written_before(run),
        permissions=permissions,
        on_cleared=lambda nbytes: meet((unfinished_cleared(where, nbytes),)),
        word=word if run.distribution.is_finish else None,
    ) as output:
        return _fill(output, run, parts, copies, facts, meet)


def _shares(parts: Mapping[str, Prepared], world: int) -> tuple[tuple[str, ...], ...]:
    """The weight files of each share, each named with its component."""
    sizes = {f"{name}/{file}": size for name, one in parts.items() for file, size in sizes_of(one.plan).items()}
    return divided(sizes, world)


def _in_component(name: str, files: Sequence[str]) -> list[str]:
    return [file.removeprefix(f"{name}/") for file in files if file.startswith(f"{name}/")]


def _write_share(
    output: Output,
    run: PipelineRun,
    parts: Mapping[str, Prepared],
    facts: Mapping[str, Facts],
    meet: Callable[[tuple[Finding, ...]], None],
) -> dict[str, Written]:
    share = run.distribution.share
    assert share is not None
    mine, limits = _shares(parts, share.world)[share.rank], _limits(run, parts)
    outcomes: dict[str, Written] = {}
    for name, part in parts.items():
        with output.subfolder(name) as folder:
            files = _in_component(name, mine)
            outcomes[name] = run_share(
                part.plan, _inputs(part), folder, limits, run.trust, share, facts[name], meet, files
            )
    return outcomes


def _fill(
    output: Output,
    run: PipelineRun,
    parts: Mapping[str, Prepared],
    copies: Mapping[str, Store],
    facts: Mapping[str, Facts],
    meet: Callable[[tuple[Finding, ...]], None],
) -> dict[str, Written]:
    """Copy and merge into a folder in which an interrupted run, or all ranks, have left something."""
    total = sum(weight_nbytes(part.plan) for part in parts.values())
    limits = _limits(run, parts)
    for left in set(output.folders()) - set(run.base.folders):
        output.remove_folder(left)
    require_space(run.out, total + sum(sum(one.files().values()) for one in copies.values()) - output.nbytes())
    _copy_all(run.base.store, output, but=run.base.folders)
    for name, store in copies.items():
        with output.subfolder(name) as folder:
            _copy_all(store, folder)
    outcomes: dict[str, Written] = {}
    for name in parts:
        with output.subfolder(name) as folder:
            outcomes[name] = _merged(name, folder, run, parts, facts, limits, meet)
    for name in parts:  # the journals, by which an interrupted run goes on, are of no use now
        with output.subfolder(name) as folder:
            for own in [file for file in folder.names() if file.startswith(OWN_PREFIX)]:
                folder.remove(own)
    return outcomes


def _limits(run: PipelineRun, parts: Mapping[str, Prepared]) -> Resources:
    """What the run may use, with progress over all components."""
    total = sum(weight_nbytes(part.plan) for part in parts.values())
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if run.progress is not None:
            run.progress(min(done, total), total)

    return replace(run.limits, progress=advance)


def _merged(
    name: str,
    folder: Output,
    run: PipelineRun,
    parts: Mapping[str, Prepared],
    facts: Mapping[str, Facts],
    limits: Resources,
    meet: Callable[[tuple[Finding, ...]], None],
) -> Written:
    """One component, computed here, or by ranks before."""
    part = parts[name]
    if not run.distribution.is_finish:
        inputs = _inputs(part)
        return run_merge(part.plan, inputs, _used(part), folder, limits, run.trust, meet, run.distribution.engine)

    def shares(world: int) -> list[list[str]]:
        return [_in_component(name, files) for files in _shares(parts, world)]

    return finish_merge(part.plan, _inputs(part), _used(part), folder, limits, run.trust, facts[name], shares)


def _copy_all(source: OpenedFiles, folder: Output, but: Collection[str] = ()) -> None:
    """Copy the regular files of a folder; what an interrupted run left beside them, and beside `but`, goes."""
    wanted = _copied(source)
    for name in folder.names():
        if name not in wanted and name not in but and name != MARKER:
            folder.remove(name)
    for name, nbytes in wanted.items():
        source.check_inside(name)
        with folder.create(name, nbytes, (Copy(0, nbytes, source, name, 0),)) as writer:
            writer.copy_from(source, name, 0, 0, nbytes)


def _inputs(part: Prepared) -> Inputs:
    return Inputs(
        base=part.base,
        adapters=[one.adapter for one in part.opened],
        bundles=[one.bundle for one in part.opened],
    )


def _used(part: Prepared) -> list[Files]:
    return [source_of(one.bundle) for one in part.opened]


def _report(
    run: PipelineRun,
    findings: Sequence[Finding],
    parts: dict[str, Prepared],
    outcomes: dict[str, Written],
    names: Sequence[str],
) -> Report:
    """One report of all components; weights and files are named with their component."""
    each = {
        name: report_of(part, run.base.uri, run.out, outcomes.get(name), run.trust.verify)
        for name, part in parts.items()
    }
    results = {name: one.data for name, one in each.items() if isinstance(one.data, MergeResult)}
    several = list(results.values())
    done = outcomes if run.distribution.share is None else {}
    tallies = {f"{name}.{weight}": one for name, part in done.items() for weight, one in part.tallies.items()}
    first = next(iter(each.values()))
    share = run.distribution.share
    mine = None if share is None else _described(parts, share)
    found = [*findings, *(finding for one in each.values() for finding in one.findings if finding not in findings)]
    return Report(
        job="merge",
        subject=run.base.uri,
        format=first.format,
        reason=first.reason,
        summary=None if len(parts) != 1 else first.summary,
        data=MergeResult(
            base=run.base.uri,
            adapters=_adapters(several),
            tensors_touched=sum(one.tensors_touched for one in several),
            tensors_copied=sum(one.tensors_copied for one in several),
            tensors_dequantized=0,
            tensors_cast=sum(one.tensors_cast for one in several),
            parameters_touched=sum(one.parameters_touched for one in several),
            bytes_written=sum(one.bytes_written for one in several) if mine is None else mine.nbytes,
            files=tuple(names),
            is_dry_run=not outcomes,
            plan=None,
            retained=total_share(tallies),
            retention=retentions(tallies, {}),
            verified=run.trust.verify if outcomes and mine is None else "none",
            checked=_together([one.checked for one in several if one.checked is not None]),
            share=mine,
        ),
        findings=tuple(found),
        written=() if mine is not None else tuple(os.path.join(run.out, name) for name in names),
    )


def _described(parts: Mapping[str, Prepared], share: Share) -> FileShare:
    files = _shares(parts, share.world)[share.rank]
    sizes = {f"{name}/{file}": size for name, one in parts.items() for file, size in sizes_of(one.plan).items()}
    nbytes = sum(sizes[file] for file in files)
    return FileShare(rank=share.rank, world=share.world, files=files, nbytes=nbytes)


def _adapters(several: Sequence[MergeResult]) -> tuple[MergedAdapter, ...]:
    """Each adapter once, with its modules of all components."""
    found: dict[tuple[str, float], MergedAdapter] = {}
    for one in (adapter for result in several for adapter in result.adapters):
        known = found.get((one.uri, one.strength))
        counts = (0, 0) if known is None else (known.applied, known.modules)
        total = replace(one, applied=one.applied + counts[0], modules=one.modules + counts[1])
        found[one.uri, one.strength] = total
    return tuple(found.values())


def _together(several: Sequence[Checked]) -> Checked | None:
    if not several:
        return None
    names = [one.name for one in fields(Checked)]
    return Checked(**{name: sum(getattr(one, name) for one in several) for name in names})
