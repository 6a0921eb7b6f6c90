"""merge: base and adapters to a full checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from loraformat import rules
from loraformat.containers import CONTAINERS, open_checkpoint
from loraformat.containers.quantized import Quantizer, error_of
from loraformat.containers.quantized import as_trained as with_quantized_layers
from loraformat.diagnostics import Finding, FindingLocation, in_file
from loraformat.engine import open_device
from loraformat.errors import UnsupportedUpdate, UsageError, require_one_of
from loraformat.io import Opened, hints_of, open_files, read_bundle
from loraformat.jobs.inputs.strength import with_strength
from loraformat.jobs.inputs.subject import refuse_exchanged, subject_of
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
    check_kinds,
    file_names,
    findings_of,
    fingerprints_of,
    permissions_of,
    plan_merge,
    retentions,
    rounding_findings,
    run_merge,
    source_of,
    total_base_change,
    total_share,
    weight_nbytes,
)
from loraformat.merger.plan.findings import history_unknown, kept_private, merged_again, unfinished_cleared
from loraformat.merger.write.manifest import adapter_digest, history_of, names_written, read_manifest
from loraformat.model.adapter import module_of
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.bundle import DIGESTS, MANIFEST, Bundle
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.verbs import MergedAdapter, MergeResult
from loraformat.model.summary import summarize
from loraformat.model.tensors import DType, bytes_of, row_blocks
from loraformat.model.updates import kind_of, scale_of
from loraformat.report import Report
from loraformat.storage import Location, is_restricted, listed, require_space, stage, uri_of

DEFAULT_MEMORY_NBYTES = 64 << 20
_AS_TRAINED = ("LF115", "LF316")  # what --as-trained is the answer to
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class _Options:
    """What changes the plan beside base and adapters."""

    container: str | None
    dtype: str | None
    arithmetic: Arithmetic
    max_shard_nbytes: int | None
    quantized: str | None
    quantizer: Quantizer | None


@dataclass(frozen=True, slots=True)
class _Prepared:
    base: Checkpoint
    opened: tuple[Opened, ...]
    findings: tuple[Finding, ...]
    plan: MergePlan


def merge(
    base: Location,
    adapters: Sequence[Location],
    out: Location,
    *,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    container: str | None = None,
    jobs: int = 1,
    device: str = "cpu",
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    dtype: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    max_shard_nbytes: int | None = None,
    dequantize: bool = False,
    keep_quantized: bool = False,
    as_trained: str | None = None,
    verify: str = "sample",
    digests: str = "blake3",
    resume: bool = False,
    dry_run: bool = False,
    force: bool = False,
    overwrite: bool = False,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write `base` with all updates of `adapters` applied into the new folder `out`: W + Σ s·BA, rounded once.

    >>> import loraformat
    >>> adapters = ["fixtures/minigpt/lora_adapter"]
    >>> report = loraformat.merge("fixtures/minigpt/base", adapters, "merged", alpha=1.0)
    >>> report.data.tensors_touched, report.data.tensors_copied, round(report.data.retained, 3)
    (10, 28, 1.0)

    Planned from headers, executed in windows of rows; neither `jobs` nor `memory_nbytes` changes a byte.

    Args:
        base: folder with safetensors, `.bin` shards or one `.pt` file, or one weight file.
        adapters: folders or files, applied in this order; each may end in "=STRENGTH" (see `with_strength`).
        out: folder that does not exist yet.
        alpha: fills every adapter that states none.
        assumptions: what else the adapters' files do not say.
        container: "safetensors" or "torch" for the weight files; None keeps the base's.
        jobs: threads.
        device: "cpu", "cuda" or "cuda:N"; on a CUDA device sums may differ from the CPU's in the last place.
        memory_nbytes: for windows; Python and the adapters come on top.
        dtype: "float32", "bfloat16" or "float16" for every floating tensor of the output; None keeps the base's.
        rounding: "nearest", or "stochastic" for outputs of 16 bits.
        seed: of stochastic rounding; the same seed gives the same bytes.
        max_shard_nbytes: most bytes of tensors in a safetensors file of the output; None keeps the base's files.
        dequantize: write all weights of a quantized base dense.
        keep_quantized: write those weights of a quantized base dense that change, and keep the codes of all others.
        as_trained: "nf4", "fp4" or "int8", with ",double" and ",block=N" for the settings of bitsandbytes with which
            the model was loaded for training: its linear layers are quantized and decoded before they are merged into.
        verify: "none", "sample" or "full": how much of the output is compared before it is moved into place.
        digests: "blake3" (of every byte, into loraformat.digests.json), "sha256" (of whole files too, as the Hub
            has it), or "none" (of what is computed alone).
        resume: go on where an interrupted run to `out` stopped; and keep what is done where a signal ends this one.
        dry_run: plan, report and write nothing.
        force: let forgivable errors pass as warnings (`rules.refuse`).
        overwrite: replace an existing folder.
        announce: called with findings before anything is written, and with those about what was written.
        progress: called with (bytes done, bytes in all).

    Raises: AdapterRefused, MergeError and subclasses where the result would not be right; StorageError, ContainerError,
        FormatError where something cannot be read or written. Nothing is left of `out` then.
    """
    base, adapters, out = uri_of(base), listed(adapters), uri_of(out)
    for value, allowed, argument in (
        (container, tuple(CONTAINERS), "container"),
        (dtype, _DTYPES, "dtype"),
        (rounding, ("nearest", "stochastic"), "rounding"),
        (verify, ("none", "sample", "full"), "verify"),
        (digests, ("blake3", "sha256", "none"), "digests"),
    ):
        if value is not None:
            require_one_of(value, allowed, argument)
    quantizer = Quantizer.parse(as_trained) if as_trained is not None else None
    quantized = _quantized(dequantize=dequantize, keep_quantized=keep_quantized, as_trained=quantizer is not None)
    options = _Options(container, dtype, Arithmetic(rounding, seed), max_shard_nbytes, quantized, quantizer)
    chosen = [with_strength(adapter) for adapter in adapters]
    refuse_exchanged(base, [uri for uri, _ in chosen])
    opened_device = open_device(device)
    prepared = _prepare(base, chosen, with_alpha(alpha, assumptions), options, force=force, whole=dry_run)
    if announce is not None:
        announce(prepared.findings)
    if dry_run:
        return _report(prepared, base)
    limits = Resources(jobs=jobs, device=opened_device, memory_nbytes=memory_nbytes)
    trust = Trust(verify=verify, digests=digests, resume=resume)
    met: list[Finding] = []

    def meet(findings: tuple[Finding, ...]) -> None:
        met.extend(findings)
        if announce is not None:
            announce(findings)

    outcome = _write(
        prepared, out, limits, trust, (base, *(uri for uri, _ in chosen)), meet, overwrite=overwrite, progress=progress
    )
    prepared = replace(prepared, findings=(*prepared.findings, *met))
    report = _report(prepared, base, out, outcome, verify)
    if announce is not None:
        announce(report.findings[len(prepared.findings) :])
    return report


def dequantize(
    base: Location,
    out: Location,
    *,
    container: str | None = None,
    jobs: int = 1,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    dtype: str | None = None,
    max_shard_nbytes: int | None = None,
    verify: str = "sample",
    digests: str = "blake3",
    resume: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write a quantized base with all weights dense into the new folder `out`.

    >>> import loraformat
    >>> report = loraformat.dequantize("fixtures/quantized/nf4", "dense")
    >>> report.data.tensors_decoded, report.data.tensors_copied
    (4, 4)

    A weight is what the library of the scheme computes, rounded once to the dtype of the output. The settings of the
    quantization leave config.json, and the files beside it that repeat them are not copied.

    Args: as for `merge`.

    Raises: UsageError (LF021): the base is not quantized. UnsupportedUpdate (LF013): its scheme is not read. Else as
        for `merge`.
    """
    return merge(
        base,
        (),
        out,
        container=container,
        jobs=jobs,
        memory_nbytes=memory_nbytes,
        dtype=dtype,
        max_shard_nbytes=max_shard_nbytes,
        dequantize=True,
        verify=verify,
        digests=digests,
        resume=resume,
        dry_run=dry_run,
        overwrite=overwrite,
        announce=announce,
        progress=progress,
    )


def _quantized(*, dequantize: bool, keep_quantized: bool, as_trained: bool) -> str | None:
    """What `plan_merge` calls it."""
    if dequantize + keep_quantized + as_trained > 1:
        raise UsageError("--dequantize, --keep-quantized and --as-trained exclude each other", where="merge")
    return "dense" if dequantize or as_trained else "mixed" if keep_quantized else None


def _prepare(
    base: str,
    adapters: Sequence[tuple[str, float]],
    assumptions: Assumptions,
    options: _Options,
    *,
    force: bool,
    whole: bool,
) -> _Prepared:
    checkpoint = open_checkpoint(base)
    if checkpoint.components:
        raise UnsupportedUpdate(
            "the base is a pipeline; adapters are merged into one model at a time",
            where=base,
            hint="give the folder of the component",
        )
    findings: list[Finding] = list(rules.doubts(checkpoint))
    opened: list[Opened] = []
    sources: list[AdapterSource] = []
    for uri, strength in adapters:
        bundle = open_files(uri)
        said = _said_of(bundle, assumptions, checkpoint) if len(adapters) > 1 else assumptions
        one, found = subject_of(bundle, base=checkpoint, assumptions=said)
        answered = _AS_TRAINED if options.quantizer is not None else ()
        findings.extend(one for one in rules.refuse(found, uri, force=force) if one.code not in answered)
        opened.append(one)
        sources.append(_source(one, said, strength, whole=whole))
    if assumptions.alpha is not None and all(source.alpha is None for source in sources):
        raise UsageError(
            f"--alpha {assumptions.alpha:g} is given, but every adapter states its own",
            where="merge",
            hint="leave --alpha out",
        )
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
    plan = replace(plan, base_files=fingerprints_of(checkpoint.store, base_names(plan, checkpoint)))
    findings.extend(findings_of(plan, checkpoint, read))
    findings.extend(_merged_before(checkpoint, opened))
    return _Prepared(checkpoint, tuple(opened), tuple(findings), plan)


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


def _source(opened: Opened, assumptions: Assumptions, strength: float, *, whole: bool) -> AdapterSource:
    store = opened.bundle.opened
    files = () if store is None else fingerprints_of(store, opened.bundle.files, whole=whole)
    return AdapterSource(opened.uri, opened.format.NAME, **assumptions.said(), strength=strength, files=files)


def _write(
    prepared: _Prepared,
    out: str,
    limits: Resources,
    trust: Trust,
    sources: Sequence[str],
    meet: Callable[[tuple[Finding, ...]], None],
    *,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> Written:
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
    if is_restricted(permissions):
        meet((kept_private(FindingLocation(subject=out), permissions),))
    with stage(
        out,
        overwrite=overwrite,
        inputs=sources,
        resume=trust.resume,
        written=names_written,
        permissions=permissions,
        on_cleared=lambda nbytes: meet((unfinished_cleared(FindingLocation(subject=out), nbytes),)),
    ) as output:
        require_space(out, total - sum(output.files().values()))
        return run_merge(plan, inputs, used, output, limits, trust, meet)


def _report(
    prepared: _Prepared, base: str, out: str = "", outcome: Written | None = None, verified: str = "none"
) -> Report:
    plan, opened = prepared.plan, prepared.opened
    edited = {edit.tensor for edit in plan.edits if edit.terms}
    codes = {edit.tensor for edit in plan.edits if not edit.terms and prepared.base.tensors[edit.source].encoded}
    touched = [name for shard in plan.shards for name in _names(shard) if shard.aliases.get(name, name) in edited]
    decoded = [name for shard in plan.shards for name in _names(shard) if shard.aliases.get(name, name) in codes]
    tensors = sum(len(_names(shard)) for shard in plan.shards)
    sizes = {tensor.name: tensor.shape for shard in plan.shards for tensor in shard.tensors}
    tallies = outcome.tallies if outcome is not None else {}
    as_trained = plan.quantized.on_loading if plan.quantized is not None else ""
    origins = {edit.tensor: prepared.base.tensors[edit.source].encoded for edit in plan.edits if edit.tensor in tallies}
    errors = {name: error_of(prepared.base, code) for name, code in origins.items() if as_trained and code}
    modules = [len({module_of(weight) for weight in one.adapter.updates}) for one in opened]
    landed = [
        {module_of(term.weight) for edit in plan.edits for term in edit.terms if term.adapter == number}
        for number in range(len(opened))
    ]
    names = tuple(sorted((*file_names(plan), MANIFEST, DIGESTS)))
    lost = rounding_findings(base, tallies, {edit.dtype for edit in plan.edits if edit.tensor in tallies})
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
            tensors_copied=tensors - len(touched) - len(decoded),
            tensors_decoded=len(decoded),
            parameters_touched=sum(math.prod(sizes[name]) for name in touched if name in sizes),
            bytes_written=weight_nbytes(plan),
            files=names,
            is_dry_run=outcome is None,
            plan=plan.to_json() if outcome is None else None,
            retained=total_share(tallies),
            retention=retentions(tallies, errors),
            verified=verified,
            checked=None if outcome is None else outcome.checked,
            as_trained=as_trained,
            base_change=total_base_change(tallies, errors) if errors else None,
        ),
        findings=(*prepared.findings, *lost),
        written=() if outcome is None else tuple(os.path.join(out, name) for name in names),
    )


def _names(shard: ShardPlan) -> list[str]:
    """Tensors of an output file, those included that share their bytes with another."""
    return [*(tensor.name for tensor in shard.tensors), *shard.aliases]
