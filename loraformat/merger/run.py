"""A merge from its plan to a checked folder: weight files, other files, manifest, journal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loraformat.containers.prints import print_of
from loraformat.engine import open_engine
from loraformat.errors import ContainerError
from loraformat.merger.copies import Inputs
from loraformat.merger.execute import Written, write_weights
from loraformat.merger.folder import file_names, write_others
from loraformat.merger.journal import Journal, fingerprint_of
from loraformat.merger.manifest import build_manifest, plain_print, write_manifest
from loraformat.merger.plan import MergePlan, nbytes_of
from loraformat.merger.verify import check_output
from loraformat.merger.windows import Limits
from loraformat.model.bundle import Bundle, OpenedFiles
from loraformat.storage import LocalStore

Map: TypeAlias = Callable[[Callable[[str], Any], Iterable[str]], Iterable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a merge does so that its output can be relied on.

    Attributes:
        verify: "none", "sample" or "full": how much of the output is read back and compared before it gets its name.
        hash_files: whether the manifest has the SHA-256 of whole weight files too.
        resume: whether an interrupted run's complete files are used.
    """

    verify: str = "sample"
    hash_files: bool = False
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one input: where they are and which were used."""

    store: OpenedFiles
    names: Sequence[str]


def source_of(bundle: Bundle) -> Source:
    """The files of an adapter, by the opening through which it was read."""
    assert bundle.opened is not None
    return Source(bundle.opened, tuple(bundle.files))


def run_merge(
    plan: MergePlan, inputs: Inputs, sources: Sequence[Source], output: LocalStore, limits: Limits, trust: Trust
) -> Written:
    """Write everything of a plan into an output folder.

    Args:
        sources: the adapters' files, in the order of `plan.adapters`.

    Raises: as `write_weights`, `write_others` and `check_output`.
    """
    base = Source(inputs.store, _base_names(plan, inputs))
    version: str = sys.modules["loraformat"].__version__
    journal = Journal(output, fingerprint_of(plan, [_identities(one) for one in (base, *sources)], version))
    there = journal.resume() if trust.resume else {}
    if limits.progress is not None:
        limits.progress(sum(nbytes_of(tensor) for one in plan.shards if one.target in there for tensor in one.tensors))
    write_others(plan, inputs, output)
    written = write_weights(plan, inputs, output, limits, on_written=journal.add, there=there)
    if trust.verify != "none":
        is_full = trust.verify == "full"
        check_output(plan, inputs, output, full=is_full, digests=written.digests, jobs=limits.jobs)
    read = open_engine(limits.jobs).map
    base_prints, *adapters = [_prints(one, trust, read) for one in (base, *sources)]
    outputs = list(read(lambda name: print_of(output, name, whole=trust.hash_files), file_names(plan)))
    prints = {"base": base_prints, "adapters": adapters}
    write_manifest(output, build_manifest(plan, inputs, prints, outputs, written.digests))
    return written


def _base_names(plan: MergePlan, inputs: Inputs) -> list[str]:
    """The base's files that the output is made from."""
    names = {tensor.file for tensor in inputs.base.tensors.values()}
    names |= {copied.name for copied in plan.copies if copied.adapter is None}
    names |= {name for name in ("config.json", inputs.base.index or "") if name in inputs.base.others}
    return sorted(names)


def _identities(source: Source) -> list[Any]:
    store = source.store
    return [[name, *(store.identity(name) if isinstance(store, LocalStore) else ())] for name in source.names]


def _prints(source: Source, trust: Trust, read: Map) -> list[dict[str, Any]]:
    return list(read(lambda name: _print(source.store, name, trust), sorted(source.names)))


def _print(store: OpenedFiles, name: str, trust: Trust) -> dict[str, Any]:
    """Name, size and hashes of a file; a file beside the adapter that is damaged has a name and a size only."""
    try:
        return plain_print(print_of(store, name, whole=trust.hash_files))
    except ContainerError:
        return {"name": name, "nbytes": store.files()[name]}
