"""verify: whether a merged checkpoint is still as it was written."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

from loraformat import schema
from loraformat.containers import checkpoint_of_store, open_weights, strict_json
from loraformat.containers.fingerprints import checked_spans, header_sha256
from loraformat.diagnostics import Finding, FindingLocation, counted, in_file, in_weights
from loraformat.engine import open_engine
from loraformat.errors import ConfigError, ContainerError, FormatError, MissingFile
from loraformat.jobs.measure.verify_base import tensors_unlike_base
from loraformat.merger.plan.findings import output_changed
from loraformat.merger.write.digests import is_as_rendered, runs_of
from loraformat.merger.write.manifest import MOST_NBYTES, is_as_written
from loraformat.model.bundle import DIGESTS, MANIFEST, NOT_LISTED
from loraformat.model.checkpoint import PIPELINE, StoredTensor
from loraformat.model.results.verbs import VerifyResult
from loraformat.report import Report
from loraformat.storage import (
    ALGORITHM,
    WEIGHT_SUFFIXES,
    LocalStore,
    Location,
    Run,
    Store,
    digest_of_range,
    open_store,
    uncovered,
    uri_of,
    uri_or_none,
)
from loraformat.storage.local.store import OWN_PREFIX

_BLOCK_NBYTES = 4 << 20


@dataclass(slots=True)
class _Seen:
    """What was compared of each file: name → (start, stop) of runs of bytes."""

    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, name: str, start: int, stop: int) -> None:
        self.spans.setdefault(name, []).append((start, stop))

    def missed(self, sizes: Mapping[str, int]) -> int:
        """Bytes that were not compared."""
        gaps = (gap for name, nbytes in sizes.items() for gap in uncovered(self.spans.get(name, []), nbytes))
        return sum(stop - start for start, stop in gaps)


@dataclass(frozen=True, slots=True)
class _Check:
    """Bytes of a file that must have a digest; `message` is said at `where` if they have another.

    Attributes:
        names_tensors: whether the tensors that have bytes there are named too.
    """

    file: str
    run: Run
    where: FindingLocation
    message: str
    names_tensors: bool = False


def verify(out: Location, *, base: Location | None = None, jobs: int = 1) -> Report:
    """Check the folder `out` against its manifest: names, sizes, headers, and digests of all bytes.

    >>> import loraformat
    >>> adapters = ["fixtures/minigpt/lora_adapter"]
    >>> _ = loraformat.merge("fixtures/minigpt/base", adapters, "to-verify", alpha=1.0)
    >>> loraformat.verify("to-verify", base="fixtures/minigpt/base").ok
    True

    The manifest and the list of digests each contain a digest of themselves, so changes to them are detected. Without
    the list only computed weights and files that are not weights have digests; the number of bytes that could not be
    compared is reported.

    In a pipeline every merged component is compared, and with `base` all other files as well.

    Args:
        base: the base of the merge, to compare the copied tensors with.
        jobs: threads.

    Raises: StorageError: there is no such folder; MissingFile (LF101): it has no manifest; ConfigError (LF103),
        InvalidJson (LF005): the manifest is invalid; what `open_checkpoint` raises for the base.
    """
    out, base = uri_of(out), uri_or_none(base)
    store = open_store(out)
    if PIPELINE in store.files() and MANIFEST not in store.files():
        return _verify_pipeline(out, base, jobs)
    manifest, is_intact = _manifest(store)
    outputs = {entry["name"]: entry for entry in manifest["outputs"]}
    findings = [] if is_intact else [output_changed(in_file(MANIFEST), "the manifest has changed since it was written")]
    kinds = store.kinds() if isinstance(store, LocalStore) else dict.fromkeys(store.files(), "a file")
    findings += _strangers(kinds, outputs)
    sizes = {name: nbytes for name, nbytes in store.files().items() if name in outputs and kinds[name] == "a file"}
    gone = sorted(outputs.keys() - kinds.keys())
    findings += [output_changed(in_file(name), "the file is missing") for name in gone]
    runs, faults = _runs(store)
    findings += faults
    seen, tensors = _Seen(), _Tensors(store)
    for name, nbytes in sizes.items():
        is_covered = not uncovered([(run.offset, run.end) for run in runs.get(name, ())], nbytes)
        findings.extend(_file_findings(store, outputs[name], nbytes, seen, tensors, is_covered=is_covered))
    findings.extend(_missing_weights(manifest, tensors, gone))
    checks, overlapping = _checks(manifest, runs, sizes, tensors.found)
    findings += overlapping
    findings.extend(_compared(store, checks, tensors.found, seen, jobs))
    checkpoint = None if base is None else checkpoint_of_store(open_store(base), base)
    computed = _computed(manifest, tensors.found)
    copied = [name for name in sorted(tensors.found) if name not in computed]
    if checkpoint is not None:
        changes = {key: manifest["base"].get(key) for key in ("layers", "names")}
        findings.extend(tensors_unlike_base(store, tensors.found, copied, checkpoint, **changes, jobs=jobs))
        for name in copied:
            seen.add(tensors.found[name].file, tensors.found[name].span.offset, tensors.found[name].span.end)
    total, lost = sum(sizes.values()), sum(outputs[name]["nbytes"] for name in gone)
    return Report(
        job="verify",
        subject=out,
        data=VerifyResult(
            files=len(outputs),
            weights=len(manifest["weights"]),
            bytes_read=total - seen.missed(sizes),
            bytes_total=total + lost,
            tensors_of_base=None if base is None else len(copied),
        ),
        findings=tuple(findings),
    )


class _Tensors:
    """The tensors of the output's weight files, as far as their headers can be read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.found: dict[str, StoredTensor] = {}
        self.unreadable: list[str] = []

    def add(self, name: str) -> None:
        """Read the header of a file; one that cannot be read adds nothing, its hash has told already."""
        try:
            self.found |= open_weights(self._store, [name])[1]
        except (ContainerError, FormatError):
            self.unreadable.append(name)


def _manifest(store: Store) -> tuple[dict[str, Any], bool]:
    """The manifest, and whether it is as it was written."""
    if MANIFEST not in store.files():
        raise MissingFile(f"there is no {MANIFEST}", where=store.uri, hint="only the output of merge can be verified")
    data = store.read(MANIFEST)
    value = strict_json.parse(data, MANIFEST, limit=MOST_NBYTES)
    if not isinstance(value, dict):
        raise ConfigError("expected a JSON object", where=in_file(MANIFEST))
    fault = next(schema.check("manifest", value), None)
    if fault is not None:
        raise ConfigError(fault[1], where=in_file(MANIFEST, *fault[0]))
    manifest = cast("dict[str, Any]", value)
    return manifest, is_as_written(data, manifest)


def _runs(store: Store) -> tuple[Mapping[str, tuple[Run, ...]], list[Finding]]:
    """The digests beside the output, by file; none where there is no list of them, or not the one that was written."""
    if DIGESTS not in store.files():
        return {}, []
    data = store.read(DIGESTS)
    try:
        record = strict_json.parse(data, DIGESTS, limit=MOST_NBYTES)
    except ContainerError as error:
        return {}, [output_changed(in_file(DIGESTS), f"the list of digests is damaged: {error.message}")]
    is_sound = isinstance(record, dict) and next(schema.check("digests", record), None) is None
    if not is_sound or not is_as_rendered(data, cast("dict[str, Any]", record)):
        return {}, [output_changed(in_file(DIGESTS), "the list of digests has changed since it was written")]
    runs = runs_of(cast("dict[str, Any]", record))
    for found in runs.values():
        if any(one.end > other.offset for one, other in pairwise(found)):
            return {}, [
                output_changed(in_file(DIGESTS), "the digests cover overlapping bytes, or are in another order")
            ]
    return runs, []


def _strangers(kinds: Mapping[str, str], outputs: Mapping[str, Any]) -> list[Finding]:
    """What is in the folder and was not written: files, folders, links, leftovers; and links where files were."""
    known = {*outputs, MANIFEST, DIGESTS, *NOT_LISTED}
    findings = []
    for name, kind in kinds.items():
        if name.startswith(OWN_PREFIX):
            findings.append(output_changed(in_file(name), f"{kind} left behind by an unfinished run"))
        elif name not in known:
            text = "this file" if kind == "a file" else f"it: {kind}"
            findings.append(output_changed(in_file(name), f"the manifest does not list {text}"))
        elif kind != "a file":
            findings.append(output_changed(in_file(name), f"there is {kind} where a file was written"))
    return findings


def _file_findings(
    store: Store, entry: Mapping[str, Any], nbytes: int, seen: _Seen, tensors: _Tensors, *, is_covered: bool
) -> Iterator[Finding]:
    """What size and header of a file say; the checksums of a `.pt` file where there are no better digests."""
    name = entry["name"]
    if nbytes != entry["nbytes"]:
        yield output_changed(in_file(name), f"{nbytes} bytes, but {entry['nbytes']} were written")
    if "header_sha256" not in entry:
        return
    tensors.add(name)
    try:
        if header_sha256(store, name) != entry["header_sha256"]:
            yield output_changed(in_file(name), "the header has changed since it was written")
        elif not is_covered:
            for start, stop in checked_spans(store, name):
                seen.add(name, start, stop)
    except ContainerError as error:
        yield output_changed(in_file(name), f"the file is damaged: {error.message}")


def _missing_weights(manifest: Mapping[str, Any], tensors: _Tensors, gone: Sequence[str]) -> Iterator[Finding]:
    """Computed weights that are not there; where a file cannot be read, how many those are that it may have held.

    Args: gone: missing files, whose findings stand for the weights that they held.
    """
    missing = sorted(manifest["weights"].keys() - tensors.found.keys())
    if missing and tensors.unreadable:
        count = counted(len(missing), "computed weight", "was")
        yield output_changed(in_file(tensors.unreadable[0]), f"cannot be read, and {count} not found elsewhere")
        return
    if any(name.lower().endswith(WEIGHT_SUFFIXES) for name in gone):
        return
    for name in missing:
        yield output_changed(name, "the weight is missing")


def _checks(
    manifest: Mapping[str, Any],
    runs: Mapping[str, tuple[Run, ...]],
    sizes: Mapping[str, int],
    tensors: Mapping[str, StoredTensor],
) -> tuple[list[_Check], list[Finding]]:
    """All digests that are known, those of the manifest first; and weights in bytes that partly are another's too."""
    checks: list[_Check] = []
    overlapping: list[Finding] = []
    last = Run(0, 0, "")
    for place, name, digest in sorted(_weights(manifest, tensors)):
        file, run = place[0], Run(*place[1:], digest)
        is_same = run[:2] == last[:2]
        if checks and checks[-1].file == file and run.offset < last.end and not is_same:
            overlapping.append(output_changed(name, "it shares some of its bytes with another weight"))
            continue
        checks.append(_Check(file, run, in_weights(name), "the values have changed since they were written"))
        last = run
    for entry in manifest["outputs"]:
        if ALGORITHM in entry and sizes.get(entry["name"]) == entry["nbytes"]:
            run = Run(0, entry["nbytes"], entry[ALGORITHM])
            checks.append(
                _Check(entry["name"], run, in_file(entry["name"]), "the bytes have changed since they were written")
            )
    for name, found in runs.items():
        for run in found if name in sizes else ():
            message = f"bytes {run.offset} to {run.end} have changed since they were written"
            checks.append(_Check(name, run, in_file(name), message, names_tensors=True))
    return [check for check in checks if check.run.end <= sizes.get(check.file, 0)], overlapping


def _weights(
    manifest: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[tuple[str, int, int], str, str]]:
    """Each computed tensor: (file, offset, bytes), name and digest."""
    for name, entry in manifest["weights"].items():
        if name in tensors:
            yield (tensors[name].file, *tensors[name].span), name, entry[ALGORITHM]


class _Places:
    """Which tensors have bytes where, for messages."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._starts: dict[str, list[tuple[int, int, str]]] = {}
        for name, tensor in tensors.items():
            self._starts.setdefault(tensor.file, []).append((tensor.span.offset, tensor.span.end, name))
        for several in self._starts.values():
            several.sort()

    def inside(self, file: str, run: Run) -> str:
        """The first tensor with bytes in a run, and how many more there are."""
        starts = self._starts.get(file, [])
        first, stop = bisect_right(starts, (run.offset, 0, "")), bisect_left(starts, (run.end, 0, ""))
        names = [name for _, end, name in starts[max(0, first - 1) : stop] if end > run.offset]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f" ({names[0]}{more})" if names else ""


def _compared(
    store: Store, checks: Iterable[_Check], tensors: Mapping[str, StoredTensor], seen: _Seen, jobs: int
) -> Iterator[Finding]:
    """Read every range once, whatever knows a digest of it; one finding for each range that is not what it was."""
    ranges: dict[tuple[str, int, int], list[_Check]] = {}
    for check in checks:
        ranges.setdefault((check.file, check.run.offset, check.run.nbytes), []).append(check)

    places = _Places(tensors)

    def found(place: tuple[str, int, int]) -> str:
        return digest_of_range(store, *place)

    hashed: Callable[..., Iterable[str]] = open_engine(jobs).map
    for place, digest in zip(ranges, hashed(found, ranges), strict=True):
        name, offset, nbytes = place
        seen.add(name, offset, offset + nbytes)
        bad = next((check for check in ranges[place] if check.run.digest != digest), None)
        if bad is not None:
            named = places.inside(name, bad.run) if bad.names_tensors else ""
            yield output_changed(bad.where, bad.message + named)


def _computed(manifest: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Tensors that were computed, by any of their names."""
    places = {(tensors[name].file, tensors[name].span) for name in manifest["weights"] if name in tensors}
    return {name for name, tensor in tensors.items() if (tensor.file, tensor.span) in places and tensor.span.nbytes}


def _verify_pipeline(out: str, base: str | None, jobs: int) -> Report:
    """As `verify`, component by component. Raises: MissingFile (LF101): no component has a manifest."""
    root = open_store(out)
    names = [name for name in root.folders() if MANIFEST in open_store(os.path.join(out, name)).files()]
    if not names:
        raise MissingFile(f"no component has a {MANIFEST}", where=out, hint="only the output of merge can be verified")
    findings: list[Finding] = []
    results: list[VerifyResult] = []
    for name in names:
        report = verify(os.path.join(out, name), base=None if base is None else os.path.join(base, name), jobs=jobs)
        assert isinstance(report.data, VerifyResult)
        results.append(report.data)
        findings += [replace(one, location=_below(name, one.location)) for one in report.findings]
    others = {"": root.files()}
    others |= {name: open_store(os.path.join(out, name)).files() for name in root.folders() if name not in names}
    compared = 0
    for folder in others if base is not None else ():
        assert base is not None
        faults, nbytes = _unlike(os.path.join(out, folder), os.path.join(base, folder), folder)
        findings += faults
        compared += nbytes
    copied = [one.tensors_of_base for one in results if one.tensors_of_base is not None]
    return Report(
        job="verify",
        subject=out,
        data=VerifyResult(
            files=sum(one.files for one in results),
            weights=sum(one.weights for one in results),
            bytes_read=sum(one.bytes_read for one in results) + compared,
            bytes_total=sum(one.bytes_total for one in results) + sum(sum(one.values()) for one in others.values()),
            tensors_of_base=sum(copied) if copied else None,
        ),
        findings=tuple(findings),
    )


def _below(folder: str, location: FindingLocation) -> FindingLocation:
    """A place in a component as one of the pipeline."""
    if location.file:
        return replace(location, file=f"{folder}/{location.file}")
    return replace(location, tensor=f"{folder}.{location.tensor}") if location.tensor else location


def _unlike(out: str, base: str, folder: str) -> tuple[list[Finding], int]:
    """The files of a folder of a pipeline that differ from the base's, and how many bytes were compared."""
    found, wanted = open_store(out), open_store(base)
    findings, compared = [], 0
    for name, nbytes in found.files().items():
        where = in_file(f"{folder}/{name}" if folder else name)
        if wanted.files().get(name) != nbytes:
            findings.append(output_changed(where, "the base has no such file of this size"))
            continue
        compared += nbytes
        blocks = ((start, min(start + _BLOCK_NBYTES, nbytes)) for start in range(0, nbytes, _BLOCK_NBYTES))
        if any(found.read(name, a, b - a) != wanted.read(name, a, b - a) for a, b in blocks):
            findings.append(output_changed(where, "its bytes differ from the base"))
    findings += [
        output_changed(in_file(f"{folder}/{name}" if folder else name), "the file is missing")
        for name in sorted(wanted.files().keys() - found.files().keys() - {MANIFEST, DIGESTS})
    ]
    return findings, compared
