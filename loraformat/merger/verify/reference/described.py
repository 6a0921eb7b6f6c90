"""What config.json and the index of an output must say about its weights.

Source: transformers 5.23.0, configuration_utils.py, for the keys and for what is meant where one is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loraformat.containers import checkpoint_of_store
from loraformat.errors import MergeError
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import MergePlan
from loraformat.merger.verify.reference.expected import HINT, Reference
from loraformat.model.bundle import Json, OpenedFiles
from loraformat.model.checkpoint import Quantized
from loraformat.model.tensors import DType
from loraformat.strict_json import parse

_CONFIG = "config.json"
_INDEX = ".index.json"
_MOST_NBYTES = 100_000_000
_TIES = ("tie_word_embeddings", "weight_tying")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DTYPES = ("dtype", "torch_dtype")


def check_described(
    plan: MergePlan, inputs: Inputs, output: OpenedFiles, reference: Reference, found: Mapping[str, str]
) -> None:
    """Compare what the files beside the weights say about them with what is in them.

    Args: found: tensor → weight file of the output, by the headers that were read back.

    Raises: MergeError (LF801): a size, a tie, a count of layers or a dtype in config.json is another one; the index
        does not name the files that the tensors are in; a tokenizer file is not the adapter's.
    """
    if inputs.base.quantized is not None:
        _check_codes(inputs.base.quantized, output, reference)
    for name in output.files():
        if name.endswith(_INDEX) and _object(output, name).get("weight_map") != found:
            raise _error(name, "it does not name the files that hold the tensors")
    if inputs.base.config:
        written, wanted = _object(output, _CONFIG), dict(_wanted(plan, inputs, reference))
        for path, value in wanted.items():
            if _at(written, path) != value:
                text = f"{'.'.join(path)} is {_at(written, path)!r}, it must be {value!r}"
                raise _error(_CONFIG, text)
    tokenizers = {name: file for one in inputs.adapters for name, file in one.tokenizer.items()}
    for name, file in tokenizers.items():
        if output.read(name) != file.read():
            raise _error(name, "it is not the adapter's")


def _check_codes(quantized: Quantized, output: OpenedFiles, reference: Reference) -> None:
    """Read the output as a base: its scheme must find those weights in codes that must be so, with their shapes.

    Raises: MergeError (LF801): it finds others, or calls an output quantized that is dense.
    """
    written = checkpoint_of_store(output, output.uri).quantized
    found = {} if written is None else {name: weight.shape for name, weight in written.weights.items()}
    kept = {
        name: weight.shape
        for name, weight in quantized.weights.items()
        if name in reference.recoded
        or all(part in reference.tensors and reference.tensors[part].is_copy for part in weight.parts)
    }
    if found != kept or (written is None) is not (not kept):
        differ = sorted(name for name in found.keys() | kept.keys() if found.get(name) != kept.get(name))
        raise _error(
            differ[0] if differ else _CONFIG,
            "the output's config and weights disagree about which weights are quantized",
        )


def _wanted(plan: MergePlan, inputs: Inputs, reference: Reference) -> Iterator[tuple[tuple[str, ...], Json]]:
    """Paths of keys in config.json → what must stand there."""
    resized = [one for one in reference.tensors.values() if one.shape[:1] != one.source.shape[:1]]
    sizes = {one.source.shape[0]: one.shape[0] for one in resized}
    is_tied: list[tuple[str, ...]] = []
    for path, level in _levels(inputs.base.config):
        size = level.get("vocab_size")
        if isinstance(size, int) and not reference.unfollowed:
            yield (*path, "vocab_size"), sizes.get(size, size)
        if plan.files.dtype is not None:
            for key in _DTYPES:
                if level.get(key) is not None:
                    yield (*path, key), DType[plan.files.dtype].torch_name
        for key in _COUNTS if inputs.base.layers else ():
            if key in level:
                yield (*path, key), len(inputs.base.layers)
        is_tied += [(*path, key) for key in _TIES if isinstance(level.get(key), bool)]
    if reference.has_parted:
        # In these classes the key means that the head's input is scaled, and no longer that there is one table.
        # Source: transformers 5.23.0, models/t5/configuration_t5.py `__post_init__`.
        is_kept = inputs.base.config.get("model_type") in ("t5", "mt5", "umt5", "longt5", "switch_transformers")
        for claim in is_tied or ([] if is_kept else [("tie_word_embeddings",)]):
            yield claim, _at(inputs.base.config, claim) if is_kept else False


def _levels(config: Mapping[str, Json]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Json]]]:
    yield (), config
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        yield ("text_config",), nested


def _object(output: OpenedFiles, name: str) -> Mapping[str, Any]:
    value = parse(output.read(name), name, limit=_MOST_NBYTES) if name in output.files() else None
    if not isinstance(value, dict):
        raise _error(name, "it is not a JSON object")
    return value


def _at(value: Any, path: tuple[str, ...]) -> Any:  # noqa: ANN401 - as it was read
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _error(name: str, message: str) -> MergeError:
    return MergeError(f"{name}: {message}", where="verify", hint=HINT)
