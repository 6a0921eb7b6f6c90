"""What a plan refers to, opened: the base and the adapters, each through one opening of its files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraformat.containers import open_checkpoint
from loraformat.containers.fingerprints import fingerprint_of
from loraformat.containers.quantized.as_trained import Quantizer, as_trained
from loraformat.diagnostics import show
from loraformat.errors import ConfigError, ContainerError, StorageError, UnsupportedUpdate
from loraformat.io import hints_of, open_files, read_bundle
from loraformat.merger.plan.data import MergePlan, Term
from loraformat.merger.plan.layer_replication import as_written
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle, FileFingerprint, OpenedFiles
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.updates import Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a plan refers to, opened.

    Attributes:
        base: with the one opening of its files.
        adapters: as `MergePlan.adapters`.
        bundles: the files of each adapter, by the opening through which it was read; none for adapters in memory.
    """

    base: Checkpoint
    adapters: Sequence[Adapter]
    bundles: Sequence[Bundle] = ()

    @property
    def store(self) -> OpenedFiles:
        """The base's files, as they were when it was opened."""
        return self.base.store

    def bundle(self, number: int) -> Bundle | None:
        """The files of an adapter; None where it is in memory."""
        return self.bundles[number] if self.bundles else None

    def update(self, term: Term) -> Update:
        """The update that a term of the plan means."""
        return self.adapters[term.adapter].updates[term.weight][term.index]


def open_inputs(plan: MergePlan) -> Inputs:
    """Open what a plan refers to, with nothing but the plan.

    Files are compared with what they were when the plan was made: by size, the hash of the header where they hold
    weights, else of all bytes; and of all bytes of the adapters where the plan has it (`merge --dry-run`). Other values
    under an equal header of the base are not noticed.

    Raises: StorageError: a file is another one; ConfigError (LF103): the plan names an adapter, an update, a weight
        or a file that is not there; and as for reading base and adapters.
    """
    base = open_checkpoint(plan.base)
    _check_same(base.store, plan.base_files)
    if plan.quantized is not None and plan.quantized.on_loading:
        base = as_trained(base, Quantizer.parse(plan.quantized.on_loading))
    _check_scheme(base, plan)
    bundles, adapters = [], []
    for source in plan.adapters:
        bundle = open_files(source.uri)
        if bundle.opened is not None:
            _check_same(bundle.opened, source.files)
        bundles.append(bundle)
        adapter = read_bundle(bundle, format=source.format, hints=hints_of(source, base)).adapter
        adapters.append(adapter.only(source.of_component) if source.of_component else adapter)
    inputs = Inputs(base=as_written(base, adapters), adapters=adapters, bundles=bundles)
    _check_references(plan, inputs)
    return inputs


def _check_references(plan: MergePlan, inputs: Inputs) -> None:
    for shard in plan.shards:
        if shard.source not in inputs.base.files:
            raise ConfigError(f"the base has no weight file {show(shard.source, 100)}", where="plan")
        for edit in shard.edits:
            if edit.source not in inputs.base.weights:
                raise ConfigError(f"the base has no weight {show(edit.source, 100)}", where="plan")
            for term in edit.terms:
                updates = inputs.adapters[term.adapter].updates if term.adapter < len(inputs.adapters) else {}
                if term.index >= len(updates.get(term.weight, ())):
                    text = f"adapter {term.adapter} has no update {term.index} of {show(term.weight, 100)}"
                    raise ConfigError(text, where="plan")


def base_names(plan: MergePlan, base: Checkpoint) -> list[str]:
    """The base's files that the output is made from."""
    stored = base if base.quantized is None else base.quantized.stored
    names = {tensor.file for tensor in stored.tensors.values()}
    names |= {copied.name for copied in plan.copies if copied.adapter is None}
    names |= {name for name in ("config.json", base.index or "") if name in base.others}
    return sorted(names)


def fingerprints_of(store: OpenedFiles, names: Iterable[str], *, whole: bool = False) -> tuple[FileFingerprint, ...]:
    """What the files of an input are: sizes, hashes of the headers of weight files, hashes of all others.

    A file beside the adapter that is damaged has a name and a size only.

    Args:
        whole: whether all bytes of weight files are hashed too.
    """
    return tuple(_fingerprint(store, name, whole=whole) for name in sorted(names))


def _fingerprint(store: OpenedFiles, name: str, *, whole: bool) -> FileFingerprint:
    try:
        return fingerprint_of(store, name, whole=whole)
    except ContainerError:
        return FileFingerprint(name, store.size(name))


def _check_scheme(base: Checkpoint, plan: MergePlan) -> None:
    planned = "" if plan.quantized is None else plan.quantized.scheme
    found = "" if base.quantized is None else base.quantized.scheme
    if planned != found:
        raise UnsupportedUpdate(
            f'the plan expects the base to be "{planned or "dense"}", found "{found or "dense"}"',
            where=base.uri,
            hint="use the version of loraformat that made the plan",
        )


def _check_same(store: OpenedFiles, files: Iterable[FileFingerprint]) -> None:
    for planned in files:
        whole = planned.header_sha256 is not None and planned.sha256 is not None
        if _fingerprint(store, planned.name, whole=whole) != planned:
            raise StorageError(
                f"{planned.name}: the file changed after the merge was planned", where=store.uri, hint="plan it again"
            )
