"""A merge before it is written, while it is, and as a report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loraformat import rules
from loraformat.containers.quantized.as_trained import Quantizer, error_of
from loraformat.containers.quantized.as_trained import as_trained as with_quantized_layers
from loraformat.diagnostics import Finding, FindingLocation, in_file, show
from loraformat.errors import UsageError
from loraformat.io import Opened, hints_of, open_files, read_bundle
from loraformat.jobs.card.facts import Origin, fields_of_card, used_adapter
from loraformat.jobs.card.publish import publishing_of, write_card
from loraformat.jobs.inputs.subject import subject_of
from loraformat.jobs.merge.distribution import ALONE, Distribution, require_ranks
from loraformat.merger import (
    AdapterSource,
    Arithmetic,
    Inputs,
    MergePlan,
    Resources,
    ShardPlan,
    Trust,
    Written,
    as_written,
    base_names,
    check_combination,
    check_kinds,
    facts_of_merge,
    file_names,
    findings_of,
    fingerprints_of,
    finish_merge,
    permissions_of,
    plan_merge,
    retentions,
    rounding_findings,
    run_merge,
    run_share,
    source_of,
    total_base_change,
    total_code_error,
    total_share,
    weight_nbytes,
    word_of,
)
from loraformat.merger.plan.findings import (
    CODES,
    copies_streamed,
    history_unknown,
    kept_private,
    merged_again,
    unfinished_cleared,
)
from loraformat.merger.write.manifest import adapter_digest, history_of, names_written, read_manifest
from loraformat.model.adapter import module_of
from loraformat.model.assumptions import Assumptions
from loraformat.model.bundle import DIGESTS, MANIFEST, Bundle
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.format_files import expert_of
from loraformat.model.results.verbs import FileShare, MergedAdapter, MergeResult
from loraformat.model.summary import summarize
from loraformat.model.tensors import DType, bytes_of, row_blocks
from loraformat.model.updates import kind_of, scale_of
from loraformat.report import Report
from loraformat.storage import (
    Publication,
    check_names,
    check_output,
    is_hub,
    is_restricted,
    join,
    require_space,
    stage,
)

DEFAULT_MEMORY_NBYTES = 64 << 20
_AS_TRAINED = ("LF115", "LF316")  # what --as-trained is the answer to
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Options:
    """What changes the plan beside base and adapters."""

    container: str | None
    dtype: str | None
    arithmetic: Arithmetic
    max_shard_nbytes: int | None
    quantized: str | None
    quantizer: Quantizer | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge that is planned.

    Attributes:
        base: as it will be written: with repeated layers, or the head of a task.
        opened: the adapters.
        findings: about all of them, in order.
    """

    base: Checkpoint
    opened: tuple[Opened, ...]
    findings: tuple[Finding, ...]
    plan: MergePlan


def prepare(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[str, float]],
    assumptions: Assumptions,
    options: Options,
    *,
    strengths: Mapping[str, float],
    force: bool,
    whole: bool,
) -> Prepared:
    """Adapters opened against a base of one model, judged, and the merge planned.

    Args: strengths: component of a checkpoint in one file → factor for its updates.

    Raises: AdapterRefused (LF800); UsageError (LF021): an alpha that fills nothing, or a strength of a component that
        no adapter changes; and as for planning.
    """
    opened, sources, findings = open_all(checkpoint, adapters, assumptions, options, force=force, whole=whole)
    if strengths:
        opened, sources = _by_component(opened, sources, strengths)
    return planned(checkpoint, opened, sources, options, (*rules.doubts(checkpoint), *findings))


def _by_component(
    opened: Sequence[Opened], sources: Sequence[AdapterSource], strengths: Mapping[str, float]
) -> tuple[list[Opened], list[AdapterSource]]:
    """Each adapter once for each of its components, at the strength of that."""
    parts: list[tuple[Opened, AdapterSource]] = []
    changed: set[str] = set()
    for one, source in zip(opened, sources, strict=True):
        pipeline = one.adapter.config.pipeline
        for component in pipeline.components if pipeline is not None else ():
            part = replace(one, adapter=one.adapter.only(component))
            strength = source.strength * strengths.get(component, 1.0)
            parts.append((part, replace(source, of_component=component, strength=strength)))
            changed.add(component)
        if pipeline is None:
            parts.append((one, source))
    idle = sorted(strengths.keys() - changed)
    if idle:
        text = f"no adapter changes {show(idle[0], 60)}, so that its strength has no effect"
        hint = (
            f"what is changed: {', '.join(sorted(changed))}" if changed else "the strength of an adapter is ADAPTER=0.7"
        )
        raise UsageError(text, where="--strength", hint=hint)
    return [part for part, _ in parts], [source for _, source in parts]


def open_all(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[str, float]],
    assumptions: Assumptions,
    options: Options,
    *,
    force: bool,
    whole: bool,
    expected: Collection[str] = (),
) -> tuple[list[Opened], list[AdapterSource], list[Finding]]:
    """The adapters, how to open them again, and what the rules found about them.

    Args:
        expected: codes of findings that the task itself explains; they are left out.
    """
    findings: list[Finding] = []
    opened: list[Opened] = []
    sources: list[AdapterSource] = []
    for uri, strength in adapters:
        bundle = open_files(uri)
        said = _said_of(bundle, assumptions, checkpoint) if len(adapters) > 1 else assumptions
        one, found = subject_of(bundle, base=checkpoint, assumptions=said)
        answered = _AS_TRAINED if options.quantizer is not None else ()
        found = tuple(each for each in found if each.code not in expected)
        findings.extend(one for one in rules.refuse(found, uri, force=force) if one.code not in answered)
        opened.append(one)
        sources.append(adapter_source(one, said, strength, whole=whole))
    if assumptions.alpha is not None and all(source.alpha is None for source in sources):
        raise UsageError(
            f"--alpha {assumptions.alpha:g} was given, but every adapter states its own",
            where="merge",
            hint="leave --alpha out",
        )
    return opened, sources, findings


def planned(
    checkpoint: Checkpoint,
    opened: Sequence[Opened],
    sources: Sequence[AdapterSource],
    options: Options,
    findings: Sequence[Finding],
) -> Prepared:
    """The plan of opened adapters, and what is found while it is made."""
    read = [one.adapter for one in opened]
    if options.quantizer is not None:
        checkpoint = with_quantized_layers(checkpoint, options.quantizer)
    checkpoint = as_written(checkpoint, read)
    check_kinds(read)
    plan = plan_merge(
        checkpoint,
        read,
        sources,
        container=options.container,
        dtype=DType.by_torch_name(options.dtype) if options.dtype else None,
        arithmetic=options.arithmetic,
        max_shard_nbytes=options.max_shard_nbytes,
        same=_comparison(checkpoint),
        quantized=options.quantized,
    )
    check_combination(plan, checkpoint, read)
    plan = replace(plan, base_files=fingerprints_of(checkpoint.store, base_names(plan, checkpoint)))
    more = (*findings_of(plan, checkpoint, read), *_merged_before(checkpoint, opened))
    return Prepared(checkpoint, tuple(opened), (*findings, *more), plan)


def _merged_before(base: Checkpoint, opened: Sequence[Opened]) -> Iterator[Finding]:
    """LF814 for each adapter that the manifest of the base names; LF819 where it cannot be read."""
    manifest = read_manifest(base.store)
    if manifest is None and MANIFEST in base.store.files():
        yield history_unknown(in_file(MANIFEST))
    history = history_of(manifest)
    known = {adapter["digest"] for merge in history for adapter in merge["adapters"]}
    for one in opened if known else ():
        if adapter_digest(one.adapter) in known:
            yield merged_again(FindingLocation(subject=base.uri), one.uri)


def _comparison(base: Checkpoint) -> Callable[[str, str], bool]:
    """Whether two weights of the base have equal bytes; a few MiB of each are in memory at a time."""

    def same(one: str, other: str) -> bool:
        first, second = base.weights[one], base.weights[other]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        blocks = row_blocks(first.shape, first.dtype.itemsize, 4 << 20)
        return all(
            bytes_of(first.read(start, stop), first.dtype) == bytes_of(second.read(start, stop), second.dtype)
            for start, stop in blocks
        )

    return same


def _said_of(bundle: Bundle, assumptions: Assumptions, base: Checkpoint) -> Assumptions:
    """What is assumed of one adapter among several: an alpha or scale fills those that state none."""
    if assumptions.component is not None and len(bundle.files) == 1 and expert_of(next(iter(bundle.files))):
        assumptions = replace(assumptions, component=None)  # the name of the file says it
    without = replace(assumptions, alpha=None, scale=None)
    if without == assumptions:
        return assumptions
    adapter = read_bundle(bundle, hints=hints_of(without, base)).adapter
    gaps = (
        kind_of(update).has_scale and scale_of(update) is None
        for updates in adapter.updates.values()
        for update in updates
    )
    return assumptions if any(gaps) else without


def adapter_source(opened: Opened, assumptions: Assumptions, strength: float, *, whole: bool) -> AdapterSource:
    """How an adapter is opened again, with what its files are now; see `AdapterSource`."""
    store = opened.bundle.opened
    files = () if store is None else fingerprints_of(store, opened.bundle.files, whole=whole)
    return AdapterSource(opened.uri, opened.format.NAME, **assumptions.said(), strength=strength, files=files)


def write(
    prepared: Prepared,
    out: str,
    limits: Resources,
    trust: Trust,
    sources: Sequence[str],
    meet: Callable[[tuple[Finding, ...]], None],
    *,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
    publication: Publication | None = None,
    distribution: Distribution = ALONE,
) -> Written:
    """Write a planned merge into the new folder `out`, whole or not at all; of a share, what others will finish."""
    plan = prepared.plan
    total = weight_nbytes(plan)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(min(done, total), total)

    inputs = Inputs(
        base=prepared.base,
        adapters=[one.adapter for one in prepared.opened],
        bundles=[one.bundle for one in prepared.opened],
    )
    limits = replace(limits, progress=advance)
    used = [source_of(one.bundle) for one in prepared.opened]
    permissions = permissions_of(inputs, used, plan, out)
    names = written_names(plan, None)
    check_names(out, names)
    publishing = publishing_of(publication, out, meet, names)
    if is_restricted(permissions):
        meet((kept_private(FindingLocation(subject=out), permissions),))
    facts = facts_of_merge(plan, inputs, used, trust)
    share = distribution.share
    if share is not None:
        with join(
            out, word_of(facts), overwrite=overwrite, inputs=sources, written=names_written, permissions=permissions
        ) as output:
            require_space(out, total // share.world)
            return run_share(plan, inputs, output, limits, trust, share, facts, meet)
    if distribution.is_finish:
        require_ranks(out, facts)
    with stage(
        out,
        overwrite=overwrite,
        inputs=sources,
        resume=trust.resume,
        written=names_written,
        permissions=permissions,
        on_cleared=lambda nbytes: meet((unfinished_cleared(FindingLocation(subject=out), nbytes),)),
        publishing=publishing,
        word=word_of(facts) if distribution.is_finish else None,
    ) as output:
        if distribution.is_finish:
            written = finish_merge(plan, inputs, used, output, limits, trust, facts)
        else:
            require_space(out, _nbytes_needed(prepared, out) - sum(output.files().values()))
            written = run_merge(plan, inputs, used, output, limits, trust, meet, distribution.engine)
        if output.refused:
            meet((copies_streamed(FindingLocation(subject=out), output.refused),))
        write_card(output, out, publishing, lambda: _origin(prepared, written))
        return written


def check_place(plan: MergePlan, out: str, sources: Sequence[str], *, overwrite: bool) -> None:
    """Raises: StorageError: `write` would refuse to write to `out`."""
    check_names(out, written_names(plan, None))
    check_output(out, overwrite=overwrite, inputs=sources, written=names_written)


def written_names(plan: MergePlan, outcome: Written | None) -> tuple[str, ...]:
    """The files of an output, as far as known before it is written."""
    lists = (DIGESTS,) if outcome is None or outcome.has_list else ()
    return tuple(sorted((*file_names(plan), MANIFEST, *lists)))


def _nbytes_needed(prepared: Prepared, out: str) -> int:
    """Bytes of weights that need room; files that the Hub copies need none."""
    plan = prepared.plan
    if not (is_hub(out) and is_hub(prepared.base.uri)):
        return weight_nbytes(plan)
    return weight_nbytes(replace(plan, shards=tuple(one for one in plan.shards if one.edits or not one.verbatim)))


def _origin(prepared: Prepared, written: Written) -> Origin:
    """What a card says of a merge."""
    adapters = tuple(
        used_adapter(one.uri, source.strength, summarize(one.adapter))
        for one, source in zip(prepared.opened, prepared.plan.adapters, strict=True)
    )
    return Origin(
        base=prepared.base.uri,
        base_fields=fields_of_card(prepared.base.store),
        adapters=adapters,
        retained=total_share(written.tallies),
    )


def report_of(
    prepared: Prepared,
    base: str,
    out: str = "",
    outcome: Written | None = None,
    verified: str = "none",
    share: FileShare | None = None,
) -> Report:
    """What a merge did; without `outcome`, what it would do. What became of a `share` is known when it is finished."""
    plan, opened = prepared.plan, prepared.opened
    edited = {name for edit in plan.edits if edit.terms for name in edit.written}
    recoded = {edit.tensor: edit.matrix for edit in plan.edits if edit.parts}
    parts = {part.name for edit in plan.edits for part in edit.parts}
    bare = {edit.tensor for edit in plan.edits if not edit.terms}
    codes = {edit.tensor for edit in plan.edits if not edit.terms and prepared.base.tensors[edit.source].encoded}
    touched = [name for shard in plan.shards for name in _names(shard) if shard.aliases.get(name, name) in edited]
    decoded = [name for shard in plan.shards for name in _names(shard) if shard.aliases.get(name, name) in codes]
    cast = [name for shard in plan.shards for name in _names(shard) if shard.aliases.get(name, name) in bare - codes]
    tensors = sum(len(_names(shard)) for shard in plan.shards)
    sizes = {tensor.name: tensor.shape for shard in plan.shards for tensor in shard.tensors}
    tallies = outcome.tallies if outcome is not None and share is None else {}
    as_trained = plan.quantized.on_loading if plan.quantized is not None else ""
    origins = {edit.tensor: prepared.base.tensors[edit.source].encoded for edit in plan.edits if edit.tensor in tallies}
    errors = {name: error_of(prepared.base, code) for name, code in origins.items() if as_trained and code}
    modules = [len({module_of(weight) for weight in one.adapter.updates}) for one in opened]
    landed = [
        {module_of(term.weight) for edit in plan.edits for term in edit.terms if term.adapter == number}
        for number in range(len(opened))
    ]
    names = written_names(plan, outcome)
    scheme = plan.quantized.scheme if plan.quantized is not None else ""
    kinds = {f"{CODES}{scheme}" if edit.parts else edit.dtype for edit in plan.edits if edit.tensor in tallies}
    lost = rounding_findings(base, tallies, kinds)
    return Report(
        job="merge" if opened else "dequantize",
        subject=base,
        format=opened[0].format.NAME if len(opened) == 1 else "",
        reason=opened[0].reason if len(opened) == 1 else "",
        summary=summarize(opened[0].adapter) if len(opened) == 1 else None,
        data=MergeResult(
            base=base,
            adapters=tuple(
                MergedAdapter(
                    uri=one.uri,
                    format=one.format.NAME,
                    applied=len(landed[number]),
                    modules=count,
                    strength=plan.adapters[number].strength,
                )
                for number, (one, count) in enumerate(zip(opened, modules, strict=True))
            ),
            tensors_touched=len(touched),
            tensors_copied=tensors - len(touched) - len(decoded) - len(cast),
            tensors_dequantized=len(decoded),
            tensors_cast=len(cast),
            parameters_touched=sum(math.prod(sizes[name]) for name in touched if name in sizes and name not in parts)
            + sum(math.prod(shape) for shape in recoded.values()),
            bytes_written=weight_nbytes(plan) if share is None else share.nbytes,
            files=names,
            is_dry_run=outcome is None,
            plan=plan.to_json() if outcome is None else None,
            retained=total_share(tallies),
            retention=retentions(tallies, errors),
            verified=verified if share is None else "none",
            checked=None if outcome is None else outcome.checked,
            as_trained=as_trained,
            base_change=total_base_change(tallies, errors) if errors else None,
            recoded=len(recoded),
            code_error=total_code_error(tallies),
            share=share,
        ),
        findings=(*prepared.findings, *lost),
        written=() if outcome is None or share is not None else tuple(os.path.join(out, name) for name in names),
    )


def _names(shard: ShardPlan) -> list[str]:
    """Tensors of an output file, those included that share their bytes with another."""
    return [*(tensor.name for tensor in shard.tensors), *shard.aliases]
