"""A base model, opened by reading headers: which files hold its weights, and which tensors are in which file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from loraformat.containers.base_weights import BaseWeights, ComponentWeights
from loraformat.containers.bundles import load_json
from loraformat.containers.weight_files import container_of
from loraformat.diagnostics import show
from loraformat.errors import ConfigError, FormatError, MissingFile
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import PIPELINE, Checkpoint, StoredTensor, WeightFile
from loraformat.storage import CHECKPOINT_SUFFIXES, Location, Source, open_store, uri_of

# Torch files that a trainer leaves beside the weights.
_NOT_WEIGHTS = ("optimizer", "scheduler", "rng_state", "training_args", "scaler")
# Source: NVIDIA ModelOpt 0.47.0 `hf_quant_config.json`; AutoGPTQ `quantize_config.json`; AutoAWQ `quant_config.json`.
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# The same weights in another dtype or format: `model.fp16.safetensors` beside `model.safetensors`.
# Source: transformers 5.23.0, utils/hub.py `_add_variant`.
_VARIANT = re.compile(r"(?:(?:diffusion_)?pytorch_)?model\.[\w-]+?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
# Source: transformers 5.23.0, utils/__init__.py `WEIGHTS_NAME`; diffusers 0.42.1, utils/constants.py `WEIGHTS_NAME`.
_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")


@dataclass(frozen=True, slots=True)
class _Choice:
    """The weight files of a folder, and the index that lists them."""

    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None


def open_checkpoint(uri: Location) -> Checkpoint:
    """Open a base model, a folder or one weight file; only headers are read, and its files stay open for later reads.

    A folder with a model_index.json is a diffusers pipeline: the weights of all of its components, with the component
    as the prefix of each name: "unet.down_blocks.0…".

    >>> import loraformat
    >>> base = loraformat.open_checkpoint("fixtures/minigpt/base")
    >>> weight = base.weights["token_embedding.weight"]
    >>> weight.shape, weight.dtype.safetensors
    ((96, 64), 'F32')

    Safetensors files take precedence over `.bin`, and those over `.pt`. If there is an index, its shards are the
    weights.

    Raises:
        MissingFile (LF101): no weights, or a shard that the index names and the folder lacks.
        ConfigError (LF103): an invalid index or config.json.
        FormatError (LF012): an adapter instead of a base; the index and a shard disagree; a tensor in two files.
        ContainerError and its subclasses: a weight file is damaged. StorageError: the path does not exist.
    """
    text = uri_of(uri)
    return checkpoint_of_store(open_store(text), text)


def checkpoint_of_store(store: Source, uri: str) -> Checkpoint:
    """As `open_checkpoint`, for files that are open already; `uri` is for messages."""
    sizes = store.files()
    single = store.is_single_file
    if PIPELINE in sizes and not single:
        return _pipeline(store, sizes, uri)
    choice = _Choice(tuple(sizes)) if single else _choose(store, sizes, uri)
    files, tensors = open_weights(store, choice.files)
    if choice.weight_map is not None:
        _check_index(choice, tensors)
    others = {name: nbytes for name, nbytes in sizes.items() if name not in files}
    is_gguf = any(file.container == "gguf" for file in files.values())
    # A GGUF file says itself what the model is, in its own words; config.json beside it is about other files.
    config = {} if single or is_gguf else _config(store, sizes)
    stored = Checkpoint(
        store.uri,
        files,
        tensors,
        choice.index,
        config,
        others,
        store.folders(),
        quantization_files={} if single else _quantization_files(store, sizes),
        weights=BaseWeights(store, tensors),
        opened=store,
        settings=_settings(store, files),
    )
    from loraformat.containers.quantized import decoded

    return decoded(stored)


def _pipeline(store: Source, sizes: Mapping[str, int], uri: str) -> Checkpoint:
    """All components of a diffusers pipeline that have weights, as one base: names begin with their folders.

    Source: diffusers 0.42.1, pipelines/pipeline_utils.py `DiffusionPipeline.load_config`: model_index.json names the
    components, each in a folder of its name.
    """
    index = load_json(store, PIPELINE, sizes[PIPELINE])
    if not isinstance(index, dict):
        raise ConfigError("expected an object", where=PIPELINE)
    components: dict[str, Checkpoint] = {}
    for name in store.folders():
        if name not in index:
            continue
        inner = open_store(f"{store.uri.rstrip('/')}/{name}")
        if any(_is_base_weight(file) for file in inner.files()):
            components[name] = checkpoint_of_store(inner, f"{uri}/{name}")
    if not components:
        raise MissingFile(
            "this pipeline has no component with weights", where=uri, hint="expected unet/, transformer/ …"
        )
    return Checkpoint(
        store.uri,
        {f"{name}/{file}": each for name, one in components.items() for file, each in one.files.items()},
        {
            f"{name}.{weight}": replace(tensor, file=f"{name}/{tensor.file}")
            for name, one in components.items()
            for weight, tensor in one.tensors.items()
        },
        config=index,
        others=dict(sizes),
        folders=store.folders(),
        weights=ComponentWeights({name: one.weights for name, one in components.items()}),
        opened=store,
        components=components,
    )


def open_weights(store: Source, names: Iterable[str]) -> tuple[dict[str, WeightFile], dict[str, StoredTensor]]:
    """Weight files of a store, and all their tensors; headers only.

    Raises: FormatError (LF012): a tensor in two files; ContainerError and its subclasses: a file is damaged.
    """
    sizes = store.files()
    files: dict[str, WeightFile] = {}
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        files[name], found = container_of(store, name).open(store, name, sizes[name])
        _check_disjoint(tensors, found)
        tensors.update(found)
    return files, tensors


def _choose(store: Source, sizes: Mapping[str, int], uri: str) -> _Choice:
    weights = [name for name in sizes if _is_base_weight(name)]
    if not weights and "adapter_config.json" in sizes:
        raise FormatError("this is an adapter, not a base model", where=uri, hint="pass the folder of the base model")
    for suffix in _INDEX_SUFFIXES:
        index = _index_name(sizes, suffix)
        if index is not None:
            return _indexed(store, index, sizes)
        names = [name for name in weights if name.lower().endswith(suffix.removesuffix(".index.json"))]
        if names:
            return _Choice(_without_index(names, uri))
    names = [name for name in weights if name.lower().endswith((".pt", ".pth"))]
    names = names or [name for name in weights if name.lower().endswith(".gguf")]
    if "model.pt" in names:
        return _Choice(("model.pt",))
    if len(names) == 1:
        return _Choice((names[0],))
    if names:
        raise _several(names, uri)
    raise MissingFile(
        "no model weights found", where=uri, hint="expected *.safetensors, pytorch_model.bin, *.pt or *.gguf"
    )


def _is_base_weight(name: str) -> bool:
    lower = name.lower()
    if not lower.endswith(CHECKPOINT_SUFFIXES) or lower.startswith(("adapter_model", "adapters.", *_NOT_WEIGHTS)):
        return False
    return not lower.endswith(".bin") or lower.startswith(("pytorch_model", "diffusion_pytorch_model"))


def _index_name(sizes: Mapping[str, int], suffix: str) -> str | None:
    """The index of a folder: the usual one, or the only one."""
    found = [name for name in sizes if name.lower().endswith(suffix)]
    usual = [name for name in found if name in [f"{stem}{suffix}" for stem in _STEMS]]
    if len(found) > 1 and len(usual) != 1:
        raise FormatError(f"several indexes: {', '.join(map(show, found[:4]))}", where=found[0])
    return next(iter(usual or found), None)


def _without_index(names: list[str], uri: str) -> tuple[str, ...]:
    """`model*.safetensors`, `pytorch_model*.bin` and diffusers' without their variants, or else the only file."""
    usual = [name for name in names if name.lower().startswith(_STEMS)]
    plain = [name for name in usual if not _VARIANT.fullmatch(name.lower())]
    usual = plain or usual
    if usual:
        return tuple(usual)
    if len(names) > 1:
        raise _several(names, uri)
    return tuple(names)


def _several(names: list[str], uri: str) -> FormatError:
    return FormatError(
        f"several weight files: {', '.join(map(show, names[:4]))}", where=uri, hint="pass the path of one of them"
    )


def _indexed(store: Source, index: str, sizes: Mapping[str, int]) -> _Choice:
    weight_map = _weight_map(load_json(store, index, sizes[index]), index)
    shards = tuple(sorted(set(weight_map.values())))
    for shard in shards:
        if shard not in sizes:
            raise MissingFile(f'the shard "{show(shard)}" is missing', where=index)
    return _Choice(shards, index, weight_map)


def _weight_map(value: Json, where: str) -> dict[str, str]:
    found = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(found, dict) or not found:
        raise ConfigError("weight_map: expected an object of tensor names and file names", where=where)
    checked: dict[str, str] = {}
    for tensor, shard in found.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            place = f'weight_map["{show(tensor, 200)}"]'
            raise ConfigError(f'{place}: expected a file name without folders, found "{show(shard, 200)}"', where=where)
        checked[tensor] = shard
    return checked


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")


def _check_disjoint(known: Mapping[str, StoredTensor], found: Mapping[str, StoredTensor]) -> None:
    for name, tensor in found.items():
        if name in known:
            raise FormatError(f"{show(name, 200)} is also in {show(known[name].file)}", where=tensor.file)


def _check_index(choice: _Choice, tensors: Mapping[str, StoredTensor]) -> None:
    weight_map, index = choice.weight_map or {}, choice.index or ""
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise FormatError(f"{show(name, 200)} is listed in {index}, but the file does not hold it", where=shard)
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise FormatError(f"{show(name, 200)} is in the file, but {index} does not list it", where=tensor.file)


def _settings(store: Source, files: Mapping[str, WeightFile]) -> Mapping[str, Json]:
    """What the header of a GGUF file says of the model."""
    if not any(file.container == "gguf" for file in files.values()):
        return {}
    from loraformat.containers.gguf.header import read_header
    from loraformat.containers.gguf.tensors import plain_settings

    (name,) = files
    return plain_settings(read_header(store, name))


def _quantization_files(store: Source, sizes: Mapping[str, int]) -> Mapping[str, Json]:
    return {name: load_json(store, name, sizes[name]) for name in _QUANTIZATION_FILES if name in sizes}


def _config(store: Source, sizes: Mapping[str, int]) -> Mapping[str, Json]:
    if "config.json" not in sizes:
        return {}
    value = load_json(store, "config.json", sizes["config.json"])
    if not isinstance(value, dict):
        raise ConfigError("expected an object", where="config.json")
    return value
