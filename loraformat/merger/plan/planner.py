"""The plan of a merge, from headers and configs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from loraformat.containers import CONTAINERS, Container
from loraformat.diagnostics import in_file
from loraformat.errors import MergeError, UsageError
from loraformat.matching import TIE_KEYS, tie_claim
from loraformat.merger.plan.data import (
    AdapterSource,
    Arithmetic,
    CopiedFile,
    Edit,
    FileOptions,
    MergePlan,
    PlannedTensor,
    ShardPlan,
)
from loraformat.merger.plan.dtypes import dtype_patch, in_dtype
from loraformat.merger.plan.edits import Edits, edits_of
from loraformat.merger.plan.layer_replication import as_written, layer_counts, task_settings
from loraformat.merger.plan.quantized import is_decoded, quantized_output, settings_of
from loraformat.merger.plan.reshard import resharded
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import DIGESTS, MANIFEST, Json
from loraformat.model.checkpoint import Checkpoint, StoredTensor, WeightFile
from loraformat.model.tensors import DType
from loraformat.naming import levels_of, scales_if_tied
from loraformat.storage import WEIGHT_SUFFIXES

# With it in the folder transformers takes the merged model for an adapter, and loads the base that the file names.
ADAPTER_CONFIG = "adapter_config.json"
# Files of a base that hold weights in another form: after the merge they would be stale.
_STALE_SUFFIXES = (*WEIGHT_SUFFIXES, ".h5", ".msgpack", ".onnx", ".index.json")


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    sources: Sequence[AdapterSource],
    *,
    container: str | None = None,
    dtype: DType | None = None,
    arithmetic: Arithmetic | None = None,
    max_shard_nbytes: int | None = None,
    same: Callable[[str, str], bool] | None = None,
    quantized: str | None = None,
) -> MergePlan:
    """What merging `adapters` into `base` will do, file by file. Reads nothing but two tied tables that may be equal.

    Args:
        base: headers and config.json.
        adapters: as read; their updates are applied in this order.
        sources: how to open each adapter again.
        container: "safetensors" or "torch" for every output file; None keeps the base's.
        dtype: of every floating tensor of the output; None keeps the base's.
        arithmetic: how sums are made and rounded.
        max_shard_nbytes: most bytes of tensors in an output file; None keeps the base's files.
        quantized: what becomes of the weights of a quantized base, see `quantized_output`.

    Raises: see `quantized_output`, `edits_of`; MergeError (LF801) also where a `.pt` file holds more than tensors.
    """
    base = as_written(base, adapters)
    found = edits_of(base, adapters, [source.strength for source in sources], same)
    decoded = quantized_output(base, found, quantized)
    base, found = decoded.base, decoded.found
    if dtype is not None:
        found = in_dtype(found, base, dtype, decoded.parts)
    at_home: dict[str, list[Edit]] = {}
    for edit in found.edits.values():
        at_home.setdefault(_home(edit, base), []).append(edit)
    shards = tuple(
        _shard(base, file, found, at_home.get(file.name, ()), container)
        for file in base.files.values()
        if file.name in decoded.files
    )
    _check_targets(shards)
    tokenizers = {name: number for number, adapter in enumerate(adapters) for name in adapter.tokenizer}
    _check_names(base)
    stale = {name for name in base.others if _is_stale(name, base) or not _is_text(name)}
    adapter_of_base = {ADAPTER_CONFIG} & base.others.keys()
    settings = settings_of(base, decoded, dtype)
    stale |= {*settings.left_out, *(base.files.keys() - decoded.files)}
    kept_back = stale | adapter_of_base | tokenizers.keys() | {MANIFEST, DIGESTS} | {name for name, _ in settings.files}
    copies = [CopiedFile(name) for name in base.others if name not in kept_back]
    copies += [CopiedFile(name, number) for name, number in tokenizers.items()]
    patch: tuple[tuple[tuple[str, ...], Json], ...] = (
        *_config_patch(base.config, found),
        *task_settings(base),
        *layer_counts(base),
        *(dtype_patch(base.config, dtype) if dtype is not None else ()),
        *settings.patch,
    )
    rewritten = {"config.json"} if patch or settings.removed else set()
    index = _new_index(base, shards)
    rewritten |= {name for name in (base.index, index) if name}
    if max_shard_nbytes is not None:
        _check_divisible(base)
        shards, index = resharded(shards, max_shard_nbytes)
        rewritten |= {index} if index else set()
    elif base.index and index is None and any(shard.target == shard.source for shard in shards):
        rewritten.discard(base.index)
    return MergePlan(
        base=base.uri,
        adapters=tuple(sources),
        shards=shards,
        copies=tuple(sorted((c for c in copies if c.name not in rewritten), key=lambda copied: copied.name)),
        config_patch=patch,
        index=index,
        left_out=(*sorted(stale | adapter_of_base), *(f"{name}/" for name in base.folders)),
        arithmetic=arithmetic or Arithmetic(),
        files=FileOptions(container, None if dtype is None else dtype.safetensors, max_shard_nbytes),
        config_removed=settings.removed,
        settings=settings.files,
        quantized=decoded.output,
    )


def _check_targets(shards: Sequence[ShardPlan]) -> None:
    """Raises: MergeError (LF801): two weight files of the base would have one name in the output."""
    sources: dict[str, str] = {}
    for shard in shards:
        other = sources.setdefault(shard.target, shard.source)
        if other != shard.source:
            text = f"{other} and {shard.source} would both become {shard.target}"
            raise MergeError(text, where="merge", hint="leave out --container, or rename one of the files")


def _check_names(base: Checkpoint) -> None:
    """Raises: MergeError (LF801): a weight file's name is not UTF-8, so that no index or manifest can hold it."""
    for name in base.files:
        if not _is_text(name):
            raise MergeError("the name of a weight file is not UTF-8", where=in_file(name), hint="rename the file")


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_stale(name: str, base: Checkpoint) -> bool:
    return name.lower().endswith(_STALE_SUFFIXES) and name != base.index


def _shard(
    base: Checkpoint, file: WeightFile, found: Edits, at_home: Sequence[Edit], container: str | None
) -> ShardPlan:
    """The plan of a file, with those of the edits whose tensors go into it."""
    wanted = container or file.container
    kind = CONTAINERS[wanted]
    _check_convertible(file, wanted)
    if file.has_extras and found.edits:
        raise MergeError(
            f"{file.name}: holds more than tensors, and the merged file would lose the rest",
            where="merge",
            hint="save only its state dict, or use --container safetensors" if wanted == file.container else "",
        )
    names = [name for name in file.names if name in base.tensors]
    new = [edit.tensor for edit in at_home if not edit.parts and edit.tensor not in base.tensors]
    parts = {part.name: part for edit in at_home for part in edit.parts}
    aliases = _aliases(base, names, found) if kind.shares_storage else {}
    planned = (parts.get(name) or _planned(name, base, found) for name in (*names, *new) if name not in aliases)
    tensors = tuple(planned)
    edits = tuple(edit for edit in at_home if edit.tensor not in aliases)
    unchanged = all(_is_like(edit, base) for edit in edits) and not new
    is_whole = len(names) == len(file.names) and not base.layers and not _is_other(file.name, base)
    is_whole = is_whole and not is_decoded(file, base)
    verbatim = wanted == file.container and not kind.depends_on_values and unchanged and is_whole
    return ShardPlan(
        source=file.name,
        target=file.name if wanted == file.container else kind.file_name(file.name),
        container=wanted,
        verbatim=verbatim,
        tensors=tensors,
        aliases=aliases,
        wrapper=file.wrapper if wanted == file.container else (),
        metadata=_metadata(file, kind),
        edits=edits,
    )


def _check_divisible(base: Checkpoint) -> None:
    """Raises: UsageError (LF021): a GGUF file is not divided."""
    if base.settings:
        hint = "split the merged file with llama-gguf-split"
        raise UsageError("a GGUF output cannot be split into shards", where="--max-shard-size", hint=hint)


def _check_convertible(file: WeightFile, wanted: str) -> None:
    """Raises: UsageError (LF021): names and settings of a GGUF file are other ones than in other containers."""
    if wanted != file.container and "gguf" in (wanted, file.container):
        text = f"{file.name} cannot be written as {wanted}: GGUF has its own names and settings"
        raise UsageError(
            text, where="--container", hint="leave --container out; to make GGUF files use llama.cpp's own converter"
        )


def _is_other(file: str, base: Checkpoint) -> bool:
    """Whether the head of a task changes which tensors a file holds, or their names."""
    return base.task is not None and file in base.task.rewritten


def _is_like(edit: Edit, base: Checkpoint) -> bool:
    """Whether what an edit writes has the dtypes and shapes of what stands there in the base."""
    made = edit.parts or (PlannedTensor(edit.source, edit.dtype, edit.shape),)
    stored = {one.name: base.tensors[one.name] for one in made}
    return all((one.dtype, one.shape) == (stored[one.name].dtype.safetensors, stored[one.name].shape) for one in made)


def _metadata(file: WeightFile, kind: Container) -> dict[str, str]:
    if not kind.has_metadata:
        return {}
    return dict(file.metadata) if CONTAINERS[file.container].has_metadata else {"format": "pt"}


def _home(edit: Edit, base: Checkpoint) -> str:
    """The base file beside whose tensors an edited tensor goes."""
    if edit.parts:
        return base.tensors[edit.parts[0].name].file
    stored = base.tensors.get(edit.tensor) or base.tensors[edit.source]
    return stored.file


def _planned(name: str, base: Checkpoint, found: Edits) -> PlannedTensor:
    edit = found.edits.get(name)
    if edit is not None:
        return PlannedTensor(name, edit.dtype, edit.shape)
    stored = base.tensors[name]
    return PlannedTensor(name, stored.dtype.safetensors, stored.shape)


def _aliases(base: Checkpoint, names: Sequence[str], found: Edits) -> dict[str, str]:
    """Names that were one tensor in a `.pt` file and still are: name → the first of them."""
    broken = {name for names in found.untied for name in names}
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name in names:
        key = _storage_key(base.tensors[name])
        if key is None or name in broken:
            continue
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases


def _storage_key(tensor: StoredTensor) -> tuple[object, ...] | None:
    if tensor.storage is None:
        return None
    return (tensor.file, tensor.storage, tensor.offset, tensor.shape, tensor.strides, tensor.dtype)


def _new_index(base: Checkpoint, shards: Sequence[ShardPlan]) -> str | None:
    """The name of the index to write, or None where the base's is still right or there is none."""
    if base.index is None:
        return None
    renamed = any(shard.source != shard.target for shard in shards)
    added = (
        any(tensor.name not in base.tensors for shard in shards for tensor in shard.tensors) or base.task is not None
    )
    resized = any(not shard.verbatim for shard in shards)
    if not (renamed or added or resized):
        return None
    if not renamed:
        return base.index
    return CONTAINERS[shards[0].container].index_name


def _config_patch(config: Mapping[str, Json], found: Edits) -> tuple[tuple[tuple[str, ...], int | bool], ...]:
    patch: list[tuple[tuple[str, ...], int | bool]] = []
    for path, level in levels_of(config):
        for old, new in found.resized.values():
            if level.get("vocab_size") == old and ((*path, "vocab_size"), new) not in patch:
                patch.append(((*path, "vocab_size"), new))
        if found.untied and not scales_if_tied(config):
            patch.extend(((*path, key), False) for key in TIE_KEYS if level.get(key) is True)
    if found.untied and config and tie_claim(config) is None and not scales_if_tied(config):
        patch.append((("tie_word_embeddings",), False))
    return tuple(patch)
