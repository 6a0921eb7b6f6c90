"""verify: whether a merged checkpoint still is what its manifest says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from loraformat import schema
from loraformat.containers import open_weights, strict_json
from loraformat.containers.prints import FilePrint, print_of, tensor_sha256
from loraformat.diagnostics import Finding
from loraformat.errors import ConfigError, ContainerError, FormatError, MissingFile
from loraformat.merger.findings import output_changed
from loraformat.merger.manifest import MANIFEST, is_as_written
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.results import VerifyResult
from loraformat.report import Report
from loraformat.storage import Store, open_store

_MOST_NBYTES = 1 << 28


def verify(out: str) -> Report:
    """Compare the folder `out` with its loraformat.manifest.json: names, sizes, hashes of headers, files and weights.

    The manifest has a hash of itself, so that what it says is not believed where it was changed.

    Raises: StorageError: there is no such folder; MissingFile (LF101): it has no manifest; ConfigError (LF103),
        InvalidJson (LF005): the manifest is none.
    """
    store = open_store(out)
    manifest, is_intact = _manifest(store)
    outputs = {entry["name"]: entry for entry in manifest["outputs"]}
    missing, strange = outputs.keys() - store.files().keys(), store.files().keys() - outputs.keys() - {MANIFEST}
    findings = [] if is_intact else [output_changed(MANIFEST, "the manifest is not the one that was written")]
    findings += [output_changed(name, "the file is missing") for name in sorted(missing)]
    findings += [output_changed(name, "the manifest does not list this file") for name in sorted(strange)]
    there = [name for name in sorted(outputs) if name in store.files()]
    for name in there:
        findings.extend(_file_findings(store, outputs[name]))
    weights = manifest["weights"]
    tensors: dict[str, StoredTensor] = {}
    for name in there:
        tensors |= _tensors(store, name) if "header_sha256" in outputs[name] else {}
    for name, entry in sorted(weights.items()):
        if name not in tensors:
            findings.append(output_changed(name, "the weight is missing"))
        elif tensor_sha256(store, tensors[name]) != entry["sha256"]:
            findings.append(output_changed(name, "the values are not those that were written"))
    read = sum(tensors[name].span.nbytes for name in weights if name in tensors)
    read += sum(store.files()[name] for name in there if "sha256" in outputs[name])
    return Report(
        job="verify",
        subject=out,
        data=VerifyResult(files=len(outputs), weights=len(weights), bytes_read=read),
        findings=tuple(findings),
    )


def _manifest(store: Store) -> tuple[dict[str, Any], bool]:
    """The manifest, and whether it is as it was written."""
    if MANIFEST not in store.files():
        raise MissingFile(f"there is no {MANIFEST}", where=store.uri, hint="only what merge wrote can be verified")
    data = store.read(MANIFEST)
    value = strict_json.parse(data, MANIFEST, limit=_MOST_NBYTES)
    if not isinstance(value, dict):
        raise ConfigError("expected a JSON object", where=MANIFEST)
    fault = next(schema.check("manifest", value), None)
    if fault is not None:
        raise ConfigError(f"{fault[0]}: {fault[1]}" if fault[0] else fault[1], where=MANIFEST)
    manifest = cast("dict[str, Any]", value)
    return manifest, is_as_written(data, manifest)


def _file_findings(store: Store, entry: Mapping[str, Any]) -> Iterator[Finding]:
    name = entry["name"]
    if store.files()[name] != entry["nbytes"]:
        yield output_changed(name, f"{store.files()[name]} bytes, {entry['nbytes']} were written")
        return
    try:
        found: FilePrint = print_of(store, name, whole="sha256" in entry)
    except ContainerError as error:
        yield output_changed(name, f"the file is damaged: {error.message}")
        return
    if found.header_sha256 != entry.get("header_sha256"):
        yield output_changed(name, "the header is not the one that was written")
    elif found.sha256 != entry.get("sha256"):
        yield output_changed(name, "the bytes are not those that were written")


def _tensors(store: Store, name: str) -> Mapping[str, StoredTensor]:
    """The tensors of a weight file; none where it cannot be read, which its header's hash has told already."""
    try:
        return open_weights(store, [name])[1]
    except (ContainerError, FormatError):
        return {}
