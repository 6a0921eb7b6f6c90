"""The files of a merged checkpoint that are not weights: config.json, index, tokenizer, all the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from loraformat.diagnostics import in_file
from loraformat.errors import ConfigError
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import MergePlan, nbytes_of
from loraformat.model.bundle import Json, OpenedFiles
from loraformat.storage import Copy, Run, Store, copy_blocks, digest_of, new_hash


def write_others(plan: MergePlan, inputs: Inputs, output: Store) -> dict[str, tuple[Run, ...]]:
    """Write everything of the plan but the weight files: patched config, new index, copied files.

    Returns: name → the digest of all bytes of the file.

    Raises: StorageError; ConfigError (LF103) where config.json or the index of the base is not a JSON object.
    """
    runs: dict[str, tuple[Run, ...]] = {}
    for copied in plan.copies:
        if copied.adapter is None:
            runs[copied.name] = _copy(inputs, copied.name, output)
        else:
            data = inputs.adapters[copied.adapter].tokenizer[copied.name].read()
            runs[copied.name] = put(output, copied.name, data)
    for name, value in plan.settings:
        runs[name] = put(output, name, _json(value))
    if plan.config_patch or plan.config_removed:
        runs["config.json"] = put(output, "config.json", _json(_patched(inputs.store, plan)))
    if plan.index is not None:
        runs[plan.index] = put(output, plan.index, _json(_index(inputs, plan)))
    return runs


def put(output: Store, name: str, data: bytes) -> tuple[Run, ...]:
    """Write a whole file, and tell its digest."""
    with output.create(name, len(data)) as writer:
        writer.write(data)
    return (Run(0, len(data), digest_of(data)),)


def _copy(inputs: Inputs, name: str, output: Store) -> tuple[Run, ...]:
    inputs.store.check_inside(name)
    size, total = inputs.base.others[name], new_hash()
    with output.create(name, size, (Copy(0, size, inputs.store, name, 0),)) as writer:
        copy_blocks(writer, inputs.store, name, 0, 0, size, total.update)
    return (Run(0, size, total.hexdigest()),)


def weight_nbytes(plan: MergePlan) -> int:
    """Bytes of tensor data that the weight files will hold."""
    return sum(nbytes_of(tensor) for shard in plan.shards for tensor in shard.tensors)


def file_names(plan: MergePlan) -> tuple[str, ...]:
    """Names of all files of the output, sorted."""
    names = {copied.name for copied in plan.copies} | {shard.target for shard in plan.shards}
    names |= {"config.json"} if plan.config_patch or plan.config_removed else set()
    names |= {name for name, _ in plan.settings}
    names |= {plan.index} if plan.index else set()
    return tuple(sorted(names))


def _patched(store: OpenedFiles, plan: MergePlan) -> dict[str, Any]:
    config = _object(store, "config.json")
    for path, value in plan.config_patch:
        level = config
        for key in path[:-1]:
            level = cast("dict[str, Any]", level[key])
        level[path[-1]] = value
    for path in plan.config_removed:
        level = config
        for key in path[:-1]:
            level = cast("dict[str, Any]", level[key])
        del level[path[-1]]
    return config


def _index(inputs: Inputs, plan: MergePlan) -> dict[str, Any]:
    """Files and sizes of the plan; what else stands in the base's index, if it has one, is kept."""
    index = _object(inputs.store, inputs.base.index) if inputs.base.index is not None else {}
    metadata = index.get("metadata")
    known: Mapping[str, Any] = metadata if isinstance(metadata, dict) else {}
    names = [
        (name, shard.target) for shard in plan.shards for name in (*(t.name for t in shard.tensors), *shard.aliases)
    ]
    return {
        **index,
        "metadata": {**known, "total_size": weight_nbytes(plan)},
        "weight_map": dict(sorted(names)),
    }


def _object(store: OpenedFiles, name: str) -> dict[str, Any]:
    """A JSON object of the base in the order of its keys; it was parsed strictly when the base was opened."""
    value = json.loads(store.read(name).decode("utf-8"))
    if not isinstance(value, dict):
        raise ConfigError("expected a JSON object", where=in_file(name))
    return value


def _json(value: Json | Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
