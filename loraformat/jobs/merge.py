"""merge: base and adapters to a full checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraformat import rules
from loraformat.containers import open_checkpoint
from loraformat.diagnostics import Finding
from loraformat.io import Opened
from loraformat.jobs.strength import with_strength
from loraformat.jobs.subject import Assumptions, open_subject, with_alpha
from loraformat.merger import (
    AdapterSource,
    Inputs,
    Limits,
    MergePlan,
    ShardPlan,
    file_names,
    findings_of,
    plan_merge,
    repeated,
    weight_nbytes,
    write_others,
    write_shard,
)
from loraformat.model.adapter import module_of
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results import MergedAdapter, MergeResult
from loraformat.model.summary import summarize
from loraformat.report import Report
from loraformat.storage import open_store, require_space, stage

DEFAULT_MEMORY_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Prepared:
    base: Checkpoint
    opened: tuple[Opened, ...]
    findings: tuple[Finding, ...]
    plan: MergePlan


def merge(
    base: str,
    adapters: Sequence[str],
    out: str,
    *,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    container: str | None = None,
    jobs: int = 1,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    dry_run: bool = False,
    force: bool = False,
    overwrite: bool = False,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write `base` with all updates of `adapters` applied into the new folder `out`: W + Σ s·BA, rounded once.

    Planned from headers, executed in windows of rows; neither `jobs` nor `memory_nbytes` changes a byte.

    Args:
        base: folder with safetensors, `.bin` shards or one `.pt` file, or one weight file.
        adapters: folders or files, applied in this order; each may end in "=STRENGTH" (see `with_strength`).
        out: folder that does not exist yet.
        alpha: fills every adapter that states none.
        assumptions: what else the adapters' files do not say.
        container: "safetensors" or "torch" for the weight files; None keeps the base's.
        jobs: threads.
        memory_nbytes: for windows; Python, torch and the adapters come on top.
        dry_run: plan, report and write nothing.
        force: let forgivable errors pass as warnings (`rules.refuse`).
        overwrite: replace an existing folder.
        announce: called with warnings before anything is written.
        progress: called with (bytes done, bytes in all).

    Raises: AdapterRefused, MergeError and subclasses where the result would not be right; StorageError, ContainerError,
        FormatError where something cannot be read or written. Nothing is left of `out` then.
    """
    chosen = [with_strength(adapter) for adapter in adapters]
    prepared = _prepare(base, chosen, with_alpha(alpha, assumptions), container, force=force)
    if announce is not None:
        announce(prepared.findings)
    written: tuple[str, ...] = ()
    if not dry_run:
        limits = Limits(jobs=jobs, memory_nbytes=memory_nbytes)
        written = _write(
            prepared, out, limits, (base, *(uri for uri, _ in chosen)), overwrite=overwrite, progress=progress
        )
    return _report(prepared, base, written, dry_run=dry_run)


def _prepare(
    base: str,
    adapters: Sequence[tuple[str, float]],
    assumptions: Assumptions,
    container: str | None,
    *,
    force: bool,
) -> _Prepared:
    checkpoint = open_checkpoint(base)
    findings: list[Finding] = []
    opened: list[Opened] = []
    for uri, _ in adapters:
        one, found = open_subject(uri, base=checkpoint, assumptions=assumptions)
        findings.extend(rules.refuse(found, uri, force=force))
        opened.append(one)
    sources = [_source(one, assumptions, strength) for one, (_, strength) in zip(opened, adapters, strict=True)]
    checkpoint = repeated(checkpoint, [one.adapter for one in opened])
    plan = plan_merge(checkpoint, [one.adapter for one in opened], sources, container=container)
    findings.extend(findings_of(plan, checkpoint, [one.adapter for one in opened]))
    return _Prepared(checkpoint, tuple(opened), tuple(findings), plan)


def _source(opened: Opened, assumptions: Assumptions, strength: float) -> AdapterSource:
    return AdapterSource(
        opened.uri,
        opened.format.NAME,
        alpha=assumptions.alpha,
        rank=assumptions.rank,
        scale=assumptions.scale,
        fan_in_fan_out=assumptions.fan_in_fan_out,
        strength=strength,
    )


def _write(
    prepared: _Prepared,
    out: str,
    limits: Limits,
    sources: Sequence[str],
    *,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[str, ...]:
    plan = prepared.plan
    total = weight_nbytes(plan)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(min(done, total), total)

    inputs = Inputs(store=open_store(plan.base), base=prepared.base, adapters=[one.adapter for one in prepared.opened])
    limits = Limits(jobs=limits.jobs, memory_nbytes=limits.memory_nbytes, progress=advance)
    with stage(out, overwrite=overwrite, inputs=sources) as output:
        require_space(out, total)
        write_others(plan, inputs, output)
        for shard in plan.shards:
            write_shard(shard, inputs, output, limits)
    return tuple(os.path.join(out, name) for name in file_names(plan))


def _report(prepared: _Prepared, base: str, written: tuple[str, ...], *, dry_run: bool) -> Report:
    plan, opened = prepared.plan, prepared.opened
    edited = {edit.tensor for edit in plan.edits if edit.terms}
    touched = [name for shard in plan.shards for name in _names(shard) if shard.aliases.get(name, name) in edited]
    tensors = sum(len(_names(shard)) for shard in plan.shards)
    sizes = {tensor.name: tensor.shape for shard in plan.shards for tensor in shard.tensors}
    modules = [len({module_of(weight) for weight in one.adapter.updates}) for one in opened]
    return Report(
        job="merge",
        subject=base,
        format=opened[0].format.NAME if len(opened) == 1 else "",
        because=opened[0].because if len(opened) == 1 else "",
        summary=summarize(opened[0].adapter) if len(opened) == 1 else None,
        data=MergeResult(
            base=base,
            adapters=tuple(
                MergedAdapter(
                    uri=one.uri, format=one.format.NAME, applied=count, modules=count, strength=source.strength
                )
                for one, count, source in zip(opened, modules, plan.adapters, strict=True)
            ),
            tensors_touched=len(touched),
            tensors_copied=tensors - len(touched),
            parameters_touched=sum(_count(sizes[name]) for name in touched if name in sizes),
            bytes_written=weight_nbytes(plan),
            files=file_names(plan),
            is_dry_run=dry_run,
            plan=plan.to_json() if dry_run else None,
        ),
        findings=prepared.findings,
        written=written,
    )


def _names(shard: ShardPlan) -> list[str]:
    """Tensors of an output file, those included that share their bytes with another."""
    return [*(tensor.name for tensor in shard.tensors), *shard.aliases]


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
