"""Executes a merge plan up to a verified folder: weight files, other files, manifest, journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from loraformat._version import __version__
from loraformat.algebra.retention import LEAST_SHARE
from loraformat.containers.fingerprints import file_sha256, fingerprint_of
from loraformat.diagnostics import Finding
from loraformat.engine import open_engine
from loraformat.errors import MergeError
from loraformat.merger.compute.retention import total_code_error, total_share
from loraformat.merger.compute.windows import Resources
from loraformat.merger.inputs import Inputs, base_names, fingerprints_of
from loraformat.merger.kinds import check_kinds
from loraformat.merger.plan.data import MergePlan, nbytes_of
from loraformat.merger.plan.findings import resumed
from loraformat.merger.write.digests import build_digests, rendered
from loraformat.merger.write.file_tasks import FileEngine, FileTask, tasks_of
from loraformat.merger.write.journal import Journal, run_fingerprint
from loraformat.merger.write.manifest import (
    build_manifest,
    history_of,
    plain_fingerprint,
    read_manifest,
    write_manifest,
)
from loraformat.merger.write.other_files import file_names, put, write_others
from loraformat.merger.write.weights import Written, all_of, write_weights
from loraformat.model.bundle import CARD, DIGESTS, Bundle, FileFingerprint, OpenedFiles
from loraformat.storage import ALGORITHM, Output, Run, permissions_for

Map: TypeAlias = Callable[[Callable[[str], Any], Iterable[str]], Iterable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a merge does so that its output can be relied on.

    Attributes:
        verify: "none", "sample" or "full": how much of the output is compared before it is moved into place.
        digests: "blake3": of every byte that is written; "sha256": that, and of whole files, as the Hub has it; "none":
            of what is computed alone.
        resume: whether an interrupted run's complete files are used.
        least_kept: share of the update that must survive in weights that are put into codes again.
    """

    verify: str = "sample"
    digests: str = "blake3"
    resume: bool = False
    least_kept: float = LEAST_SHARE


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one input: where they are and which were used."""

    store: OpenedFiles
    names: Sequence[str]


def source_of(bundle: Bundle) -> Source:
    """The files of an adapter, by the opening through which it was read."""
    assert bundle.opened is not None
    return Source(bundle.opened, tuple(bundle.files))


def base_source(plan: MergePlan, inputs: Inputs) -> Source:
    """The files of the base from which the output is made."""
    return Source(inputs.store, base_names(plan, inputs.base))


def run_merge(
    plan: MergePlan,
    inputs: Inputs,
    sources: Sequence[Source],
    output: Output,
    limits: Resources,
    trust: Trust,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    engine: FileEngine | None = None,
) -> Written:
    """Write everything of a plan into an output folder.

    Args:
        sources: the adapters' files, in the order of `plan.adapters`.
        announce: called with what was taken over from an unfinished output.
        engine: writes the weight files, each as a task of its own; None for threads of this process.

    Raises: as `write_weights`, `write_others` and `check_output`.
    """
    check_kinds(inputs.adapters)
    base = base_source(plan, inputs)
    processor = limits.processor if engine is None else getattr(engine, "device", limits.processor)
    identities = [_identities(one) for one in (base, *sources)]
    journal = Journal(output, run_fingerprint(plan, identities, __version__, processor))
    read = open_engine(limits.jobs).map
    there = _taken_over(journal, read, announce) if trust.resume else {}
    if not trust.resume:
        journal.begin()
    if limits.progress is not None:
        limits.progress(sum(nbytes_of(tensor) for one in plan.shards if one.target in there for tensor in one.tensors))
    runs, digests = write_described(plan, inputs, output), digests_copies(trust, output)
    if engine is None:
        written = write_weights(plan, inputs, output, limits, on_written=journal.add, there=there, digests=digests)
    else:
        tasks = tasks_of(
            plan,
            output.location,
            without=there,
            limits=limits,
            digests=digests,
            permissions=output.permissions,
        )
        written = _written_by(engine, tasks, there, journal, limits)
    check_kept(plan, written, trust)
    output.seal([shard.target for shard in plan.shards])
    return complete(plan, inputs, sources, output, limits, trust, written, runs)


def write_described(plan: MergePlan, inputs: Inputs, output: Output) -> dict[str, tuple[Run, ...]]:
    """Write all files but the weights; the digests of what the manifest describes."""
    runs = write_others(plan, inputs, output)
    runs.pop(CARD, None)  # a card is for people, who write in it
    return runs


def complete(
    plan: MergePlan,
    inputs: Inputs,
    sources: Sequence[Source],
    output: Output,
    limits: Resources,
    trust: Trust,
    written: Written,
    runs: Mapping[str, tuple[Run, ...]],
) -> Written:
    """Check an output whose files can all be read, and write what describes it.

    Args:
        written: the figures of all weight files.
        runs: digests of the other files, by name.

    Raises: as `check_output`.
    """
    base, read = base_source(plan, inputs), open_engine(limits.jobs).map
    if trust.verify != "none":
        from loraformat.merger.verify import check_output

        is_full = trust.verify == "full"
        written.checked = check_output(
            plan,
            inputs,
            output,
            full=is_full,
            digests=written.digests,
            jobs=limits.jobs,
            reads_copies=is_full or output.reads_copies,
        )
    adapters = [_recorded(one, known.files) for one, known in zip(sources, plan.adapters, strict=True)]
    prints = {"base": _recorded(base, plan.base_files), "adapters": adapters}
    outputs = list(
        read(lambda name: _output_print(output, name, runs), [name for name in file_names(plan) if name != CARD])
    )
    history = history_of(read_manifest(inputs.store))
    write_manifest(output, build_manifest(plan, inputs, prints, outputs, written.digests, history))
    written.has_list = output.reads_copies or digests_copies(trust, output)
    if written.has_list:
        _write_digests(output, {**runs, **written.runs}, (base, *sources), trust, read)
    return written


def digests_copies(trust: Trust, output: Output) -> bool:
    """Whether copied bytes get digests: those that the store copies by itself are read for that only where asked."""
    return trust.digests == "sha256" or (trust.digests != "none" and output.reads_copies)


def check_kept(plan: MergePlan, written: Written, trust: Trust) -> None:
    """Raises: MergeError (LF801): putting weights into codes again changed the update by more than allowed.

    A share far above one is as bad as one far below: the error of the codes then passes for the update.
    """
    tallies = {edit.tensor: written.tallies[edit.tensor] for edit in plan.edits if edit.parts}
    share, error = total_share(tallies), total_code_error(tallies)
    if share is None or error is None or not trust.least_kept:
        return
    if abs(1 - share) > 1 - trust.least_kept:
        raise MergeError(
            f"{share:.1%} of the update survives quantizing the weights again, expected "
            f"{trust.least_kept:.1%} to {2 - trust.least_kept:.1%}; "
            f"quantization adds an error of {error:.3g} times the update",
            where="merge",
            hint="use --dequantize or --keep-quantized to keep all of it, or --least-kept SHARE to allow less",
        )


def _written_by(
    engine: FileEngine, tasks: Sequence[FileTask], there: Mapping[str, Written], journal: Journal, limits: Resources
) -> Written:
    """The figures of all files, those of the tasks from their receipts."""
    found, sizes = dict(there), {task.target: sum(map(nbytes_of, task.plan.shards[0].tensors)) for task in tasks}
    receipts = engine.run(tasks)
    try:
        for receipt in receipts:
            found[receipt.target] = receipt.written()
            journal.add(receipt.target, found[receipt.target])
            if limits.progress is not None:
                limits.progress(sizes[receipt.target])
    finally:  # now, not when the memory is cleared: no task may write into a folder that is being removed
        close = getattr(receipts, "close", None)
        if close is not None:
            close()
    for task in tasks:
        if task.target not in found:
            raise MergeError("the engine gave no receipt for this file", where=task.target)
    return all_of(found.values())


def _taken_over(
    journal: Journal, read: Map, announce: Callable[[tuple[Finding, ...]], None] | None
) -> dict[str, Written]:
    there = journal.resume(read)
    if announce is not None:
        announce((resumed(sorted(there)),))
    return there


def _output_print(output: Output, name: str, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """What the manifest says of a file: the digest of one without weights, the hash of the header of another."""
    if name in runs:
        ((_, nbytes, digest),) = runs[name]
        return {"name": name, "nbytes": nbytes, ALGORITHM: digest}
    return plain_fingerprint(fingerprint_of(output, name, whole=False))


def _write_digests(
    output: Output, runs: Mapping[str, Sequence[Run]], inputs: Sequence[Source], trust: Trust, read: Map
) -> None:
    sizes = {name: nbytes for name, nbytes in output.files().items() if name in runs}
    hashes: dict[str, str] = {}
    known: dict[str, Any] = {}
    if trust.digests == "sha256":
        hashes = dict(zip(sizes, read(lambda name: file_sha256(output, name), list(sizes)), strict=True))
        base, *adapters = [_sha256_of(one, read) for one in inputs]
        known = {"base": base, "adapters": adapters}
    put(output, DIGESTS, rendered(build_digests(sizes, runs, hashes, known)))


def _sha256_of(source: Source, read: Map) -> dict[str, str]:
    names = sorted(source.names)
    return dict(zip(names, read(lambda name: file_sha256(source.store, name), names), strict=True))


def permissions_of(inputs: Inputs, sources: Sequence[Source], plan: MergePlan, out: str) -> int:
    """The mode bits that the output `out` of a plan may have; see `storage.permissions_for`."""
    used = [(one.store, one.names) for one in sources]
    return permissions_for([(inputs.store, base_names(plan, inputs.base)), *used], out)


def _identities(source: Source) -> list[Any]:
    return [[name, *source.store.identity(name)] for name in source.names]


def _recorded(source: Source, planned: Sequence[FileFingerprint]) -> list[dict[str, Any]]:
    """What the manifest says of the files of an input: name, size and hashes, as the plan has them where it does."""
    return [_record(one) for one in planned or fingerprints_of(source.store, source.names)]


def _record(found: FileFingerprint) -> dict[str, Any]:
    name = found.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # JSON has no other bytes
    # A plan that is to leave this process hashes all bytes of adapters too; the manifest says the same without it.
    whole = None if found.header_sha256 is not None else found.sha256
    return plain_fingerprint(replace(found, name=name, sha256=whole))
