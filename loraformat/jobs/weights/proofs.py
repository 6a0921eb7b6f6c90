"""Proof of an unmerge without the base: which tensors are as the merge wrote them, and which are the base's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraformat.containers.fingerprints import file_sha256
from loraformat.diagnostics import counted
from loraformat.formats.kit.folder import TOKENIZER_FILES
from loraformat.jobs.verify import verify
from loraformat.matching import tie_claim
from loraformat.model.bundle import DIGESTS, MANIFEST
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.verbs import VerifyResult
from loraformat.naming import tied_names
from loraformat.storage import CHECKPOINT_SUFFIXES

# How the weights are spread over files says nothing of their values.
_LAYOUT = ".index.json"


def doubt_of(manifest: Mapping[str, Any], merged: Checkpoint, uri: str, edited: Iterable[str], jobs: int) -> str:
    """Why a model is not proved to be what its manifest says, or has more than the base with adapters; else "".

    Args:
        edited: the tensors that the adapters change, as found now.
    """
    stated = set(manifest["weights"])
    doubt = _doubt_of_files(manifest, merged) or _doubt_of_ties(stated, merged)
    if not doubt and stated != set(edited):
        doubt = "the changed tensors in the manifest are not those that the adapters change"
    return doubt or _doubt_of_bytes(uri, jobs)


def _doubt_of_files(manifest: Mapping[str, Any], merged: Checkpoint) -> str:
    """Whether the files beside the weights are those of the base: a merge may change config.json.

    The manifest does not say whether a tokenizer that came with an adapter replaced one of the base: it stays, and
    nothing is claimed of it.
    """
    before = {entry["name"]: entry for entry in manifest["base"]["files"] if _is_beside(entry["name"])}
    found = {name for name in merged.others if _is_beside(name)} - {MANIFEST, DIGESTS}
    for name in sorted(before.keys() | found):
        if name not in before:
            if name not in TOKENIZER_FILES:
                return f"{name} is not from the base"
        elif name not in found:
            return f"{name} of the base is missing"
        elif file_sha256(merged.store, name) != before[name]["sha256"]:
            return f"{name} differs from the base"
    return ""


def _is_beside(name: str) -> bool:
    return not name.lower().endswith((*CHECKPOINT_SUFFIXES, _LAYOUT))


def _doubt_of_ties(changed: set[str], merged: Checkpoint) -> str:
    """Whether a table that config.json ties has two copies of which one was changed: the base may have had one."""
    if tie_claim(merged.config) is False:
        return ""
    for name, other in (tied_names(merged.config) or {}).items():
        if changed & {name, other} and {name, other} <= merged.tensors.keys():
            one, two = merged.tensors[name], merged.tensors[other]
            if one.storage is None or one.storage != two.storage:
                return f"config.json ties {name} to {other}, and the merge may have untied them"
    return ""


def _doubt_of_bytes(uri: str, jobs: int) -> str:
    """Whether every byte of the folder has a digest, and the right one."""
    report = verify(uri, jobs=jobs)
    assert isinstance(report.data, VerifyResult)
    if report.findings:
        first, more = report.findings[0], len(report.findings) - 1
        place = first.location.tensor or first.location.file
        return f"{place}: {first.message}" + (f"; {counted(more, 'more finding')}" if more else "")
    missed = report.data.bytes_total - report.data.bytes_read
    return f"copied tensors have no digests ({counted(missed, 'byte')}; merge --no-hash)" if missed else ""
