"""loraformat.manifest.json: what a merged checkpoint was made of, and what must be in it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loraformat.containers.prints import FilePrint
from loraformat.merger.copies import Inputs
from loraformat.merger.plan import AdapterSource, MergePlan, Term
from loraformat.model.of_base import Carried, Projected, Recoded, Tiled
from loraformat.model.summary import kind_of, scale_of
from loraformat.model.updates import (
    Diff,
    FromBase,
    Hadamard,
    Kronecker,
    LowRank,
    Modulated,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    Update,
)
from loraformat.storage.base import Store

MANIFEST = "loraformat.manifest.json"
SCHEMA = "loraformat.manifest/1"


def build_manifest(
    plan: MergePlan,
    inputs: Inputs,
    prints: Mapping[str, Any],
    outputs: Sequence[FilePrint],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest as JSON values. The same inputs, version and options give the same one.

    Args:
        prints: "base" and "adapters", the files of each input.
        outputs: every file of the output but the manifest.
        digests: SHA-256 of each computed tensor.
    """
    edits = {edit.tensor: edit for edit in plan.edits}
    used = zip(plan.adapters, prints["adapters"], strict=True)
    return {
        "schema": SCHEMA,
        # Not an import: the root package names everything, so importing it would be importing every layer above.
        "tool": {"name": "loraformat", "version": sys.modules["loraformat"].__version__},
        "job": "merge",
        "options": {**asdict(plan.arithmetic), **asdict(plan.files)},
        "base": {"files": prints["base"]},
        "adapters": [{**_assumed(source), "files": files} for source, files in used],
        "outputs": [plain_print(one) for one in outputs],
        "weights": {
            name: {
                "dtype": edits[name].dtype,
                "sha256": digest,
                "terms": [_term(term, inputs) for term in edits[name].terms],
            }
            for name, digest in sorted(digests.items())
        },
    }


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


def plain_print(found: FilePrint) -> dict[str, Any]:
    """A print as JSON values, without what was not computed."""
    return {key: value for key, value in asdict(found).items() if value is not None}


_FORMULAS: Mapping[type[Update], str] = {
    Hadamard: "W + s*((B1@A1) * (B2@A2))",
    Kronecker: "W + s*kron(L, R)",
    Diff: "W + s*D",
    Replace: "V",
    Rows: "W with rows V",
    Scaled: "r * W * c",
    Multiplied: "W @ (I + B@A)",
    Modulated: "W * (1 + B@A)",
    Tiled: "T + (T + I) @ M of tiles T of W",
    Projected: "W + s*B @ f(A@W)",
    Recoded: "U @ C of W = U * n @ V.T",
    Carried: "b + W@c",
}


def formula_of(update: Update) -> str:
    """How an update changes its weight W; s is its scale, norms run along the axis of DoRA's magnitude m."""
    if isinstance(update, LowRank):
        return "W + s*B@A" if update.magnitude is None else "m * (W + s*B@A) / norm(W + s*B@A)"
    if isinstance(update, FromBase):
        return f"W - {update.recipe}(W)"
    if isinstance(update, Rotated):
        return "L @ W" if update.side == "left" else "W @ R"
    return _FORMULAS[type(update)]


def _term(term: Term, inputs: Inputs) -> dict[str, Any]:
    update = inputs.adapters[term.adapter].updates[term.weight][term.index]
    return {
        "adapter": term.adapter,
        "weight": term.weight,
        "kind": kind_of(update),
        "formula": formula_of(update),
        "scale": scale_of(update),
        "transposed": term.transposed,
    }


def _assumed(source: AdapterSource) -> dict[str, Any]:
    """What the caller said about an adapter, without where it was."""
    return {key: value for key, value in asdict(source).items() if key != "uri"}
