"""loraformat.manifest.json: what a merged checkpoint was made of, and what must be in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from loraformat import schema
from loraformat._version import __version__
from loraformat.containers import strict_json
from loraformat.errors import InvalidJson, StorageError
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import AdapterSource, Arithmetic, MergePlan, Term
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import CARD, DIGESTS, MANIFEST, FileFingerprint, OpenedFiles
from loraformat.model.tensors import row_blocks
from loraformat.model.updates import (
    formula_of,
    kind_of,
    scale_of,
    tensors,
)
from loraformat.storage import Store, new_hash, open_store

SCHEMA = "loraformat.manifest/1"
MOST_NBYTES = 1 << 28  # of a manifest that is read
_BLOCK_NBYTES = 8 << 20


def build_manifest(
    plan: MergePlan,
    inputs: Inputs,
    prints: Mapping[str, Any],
    outputs: Sequence[Mapping[str, Any]],
    digests: Mapping[str, str],
    history: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The manifest as JSON values. The same inputs, version and options give the same one.

    Args:
        prints: "base" and "adapters", the files of each input.
        outputs: every file of the output but the manifest and the list of digests.
        digests: of each computed tensor.
        history: what was merged into the base before, see `history_of`.
    """
    edits = {name: edit for edit in plan.edits for name in edit.written}
    dtypes = {part.name: part.dtype for edit in plan.edits for part in edit.parts}
    used = zip(plan.adapters, inputs.adapters, prints["adapters"], strict=True)
    base: dict[str, Any] = {"layers": list(inputs.base.layers)} if inputs.base.layers else {}
    if inputs.base.task is not None and inputs.base.task.renamed:
        base["names"] = {new: old for old, new in inputs.base.task.renamed.items()}
    if plan.quantized is not None:
        said = asdict(plan.quantized).items()
        base["quantized"] = {key: value for key, value in said if value or key == "is_dense"}
    return {
        "schema": SCHEMA,
        "tool": {"name": "loraformat", "version": __version__},
        "job": "merge" if plan.adapters else "copy" if plan.quantized is None else "dequantize",
        "options": {**_arithmetic(plan.arithmetic), **asdict(plan.files)},
        "base": {"files": prints["base"], **base},
        "adapters": [
            {**_assumed(source), "files": files, "digest": adapter_digest(adapter)} for source, adapter, files in used
        ],
        "history": list(history),
        "outputs": [dict(one) for one in outputs],
        "weights": {
            name: {
                "dtype": dtypes.get(name, edits[name].dtype),
                "blake3": digest,
                "terms": [_term(term, inputs) for term in edits[name].terms],
            }
            for name, digest in sorted(digests.items())
        },
    }


def _arithmetic(arithmetic: Arithmetic) -> dict[str, Any]:
    """Its settings; those of a method only where there is one."""
    of_methods = () if arithmetic.method else ("method", "density", "sign")
    return {key: value for key, value in asdict(arithmetic).items() if key not in of_methods}


def write_manifest(output: Store, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into an output folder, with its own hash."""
    data = _rendered({**manifest, "sha256": _sha256(manifest)})
    with output.create(MANIFEST, len(data)) as writer:
        writer.write(data)


def is_as_written(data: bytes, manifest: Mapping[str, Any]) -> bool:
    """Whether the bytes of a manifest, and the values in it, are those that `write_manifest` wrote."""
    return data == _rendered(manifest) and manifest.get("sha256") == _sha256(manifest)


def _sha256(manifest: Mapping[str, Any]) -> str:
    values = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(_rendered(values)).hexdigest()


def _rendered(manifest: Mapping[str, Any]) -> bytes:
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def plain_fingerprint(found: FileFingerprint) -> dict[str, Any]:
    """A fingerprint as JSON values, without what was not computed."""
    return {key: value for key, value in asdict(found).items() if value is not None}


def adapter_digest(adapter: Adapter) -> str:
    """What tells an adapter from others: a digest of its updates, whatever files and spelling they stand in.

    Tensors that are computed when they are read (shared random projections, say) count with their shape alone; what
    they are computed from is in the rest.
    """
    total = new_hash()
    for weight, updates in sorted(adapter.updates.items()):
        for update in updates:
            facts = [weight, kind_of(update).name, scale_of(update)]
            total.update(json.dumps(facts).encode())
            for name, tensor in tensors(update):
                total.update(json.dumps([name, tensor.dtype.safetensors, tensor.shape]).encode())
                for start, stop in row_blocks(tensor.shape, tensor.dtype.itemsize, _BLOCK_NBYTES):
                    total.update(b"" if tensor.raw is None else tensor.raw(start, stop))
    return total.hexdigest()


def read_manifest(store: OpenedFiles) -> dict[str, Any] | None:
    """The manifest of a folder that a merge wrote; None where there is none, or not as it was written.

    Raises: StorageError: it cannot be read.
    """
    if MANIFEST not in store.files():
        return None
    if store.size(MANIFEST) > MOST_NBYTES:
        return None
    data = store.read(MANIFEST)
    try:
        value = strict_json.parse(data, MANIFEST, limit=MOST_NBYTES)
    except InvalidJson:
        return None
    is_sound = isinstance(value, dict) and next(schema.check("manifest", value), None) is None
    manifest = cast("dict[str, Any]", value)
    return manifest if is_sound and is_as_written(data, manifest) else None


def names_written(uri: str) -> set[str]:
    """Names of the files that a merge wrote into the folder at a URI, as its manifest says; none where it has none."""
    try:
        manifest = read_manifest(open_store(uri))
    except StorageError:
        return set()
    return set() if manifest is None else {MANIFEST, DIGESTS, CARD, *(entry["name"] for entry in manifest["outputs"])}


def history_of(manifest: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """The merges that made a base, oldest first, as its manifest names them: (tool, options, adapters) of each."""
    if manifest is None:
        return ()
    last = {key: manifest[key] for key in ("tool", "options", "adapters")}
    return (*manifest["history"], last)


def _term(term: Term, inputs: Inputs) -> dict[str, Any]:
    update = inputs.adapters[term.adapter].updates[term.weight][term.index]
    return {
        "adapter": term.adapter,
        "weight": term.weight,
        "kind": kind_of(update).name,
        "formula": formula_of(update),
        "scale": scale_of(update),
        "transposed": term.transposed,
    }


def _assumed(source: AdapterSource) -> dict[str, Any]:
    """What the caller said about an adapter, without where it was."""
    return {key: value for key, value in asdict(source).items() if key != "uri"}
