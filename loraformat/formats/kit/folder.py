"""The files of an adapter's folder that are not its format's: found when reading, added when writing."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping

from loraformat.diagnostics import Finding, FindingLocation
from loraformat.formats.kit.findings import file_left_behind
from loraformat.formats.kit.losses import dropped_metadata, unclaimed_tensor_lost
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import DIGESTS, MANIFEST, Bundle, File, Json, JsonFile, RawFile, TensorFile, Tensors
from loraformat.model.tensors import LazyTensor

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".distcp")

_TRAINING_STATE = (
    *("optimizer", "scheduler", "scaler", "sampler", "rng_state", "random_states", "trainer_state", "training_args"),
    *("zero_pp_rank", "mp_rank", "bf16_zero_pp_rank"),
)


# Where DeepSpeed keeps the state of one step. Source: DeepSpeed edaa722, runtime/engine.py `save_checkpoint`.
_STATE_FOLDER = re.compile(r"global_step\d+")


def is_training_state(name: str) -> bool:
    """Whether a file has the name of what a trainer keeps to go on: optimizer, scheduler, random state, arguments."""
    return name.lower().startswith(_TRAINING_STATE)


def tokenizer_files(bundle: Bundle) -> dict[str, RawFile]:
    """The tokenizer files of the folder, by name."""
    return {name: _raw(file) for name, file in bundle.files.items() if name in TOKENIZER_FILES and _is_raw(file)}


def other_files(bundle: Bundle, own: Collection[str]) -> dict[str, RawFile]:
    """The other files that are copied along: no hidden files, no pickles, no optimizer state, no tensor files.

    Args:
        own: names that the format reads itself.
    """
    return {
        name: _raw(file)
        for name, file in bundle.files.items()
        if name not in (*own, *TOKENIZER_FILES, MANIFEST, DIGESTS) and _is_raw(file) and _is_harmless(name)
    }


def left_behind(bundle: Bundle, own: Collection[str]) -> Iterator[Finding]:
    """LF222 for the files that are neither read nor carried, and DeepSpeed's folders; nothing for hidden ones."""
    taken = {*own, *tokenizer_files(bundle), *other_files(bundle, own)}
    names = [f"{name}/" for name in bundle.folders if _STATE_FOLDER.fullmatch(name)]
    names += [name for name in bundle.files if name not in taken and not name.startswith(".")]
    if names:
        yield file_left_behind(FindingLocation(subject=bundle.uri), names)


def _is_raw(file: File) -> bool:
    return not isinstance(file, TensorFile)


def _raw(file: File) -> RawFile:
    assert not isinstance(file, TensorFile)
    return RawFile(file.name, file.nbytes, file.read)


def _is_harmless(name: str) -> bool:
    lower = name.lower()
    return not (lower.startswith(".") or lower.endswith(_PICKLES) or is_training_state(name))


def json_file(name: str, value: dict[str, Json]) -> JsonFile:
    """A config to be written: sorted keys, two spaces, a line end, so that equal values give equal bytes."""
    content = (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
    return JsonFile(name, len(content), lambda: content, lambda: value)


def yaml_file(name: str, value: Mapping[str, Json]) -> JsonFile:
    """Settings to be written as YAML: a line a key, sorted; values in JSON's spelling, which YAML reads as the same.

    A float with an exponent gets the point without which YAML 1.1 takes it for a text.
    """
    lines = [f"{key}: {_yaml(item)}\n" for key, item in sorted(value.items())]
    content = "".join(lines).encode()
    return JsonFile(name, len(content), lambda: content, lambda: dict(value))


def _yaml(value: Json) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_yaml(item)}" for key, item in sorted(value.items())) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    text = json.dumps(value, allow_nan=False)
    mantissa, mark, exponent = text.partition("e")
    is_bare = isinstance(value, float) and mark and "." not in mantissa
    return f"{mantissa}.0e{exponent}" if is_bare else text


def tensor_file(
    name: str,
    container: str,
    entries: Mapping[str, LazyTensor],
    framework: str = "pt",
    wrapper: tuple[str, ...] = (),
) -> TensorFile:
    """A tensor file to be written, entries sorted by name; `nbytes` counts the values only.

    Args:
        framework: whose tensors these are, as the metadata of a safetensors file says.
        wrapper: keys of the dicts around the state dict of a torch file, outermost first.
    """
    metadata = {"format": framework} if container == "safetensors" else {}
    tensors = Tensors(container, dict(sorted(entries.items())), metadata, wrapper)
    return TensorFile(name, sum(entry.nbytes for entry in entries.values()), lambda: tensors)


def bundle_of(files: list[File], adapter: Adapter) -> Bundle:
    """The folder to be written: the format's own files, and what the adapter carries under other names."""
    own: dict[str, File] = {file.name: file for file in files}
    return Bundle("", dict(sorted({**adapter.other_files, **adapter.tokenizer, **own}.items())))


def lost_beside(adapter: Adapter, dropped: list[str], own: Collection[str]) -> Iterator[Finding]:
    """What is lost beside the updates: LF706 for tensors that nobody understood, LF703 for the rest.

    Args:
        dropped: settings that the format has no place for.
        own: files that it needs for itself, whatever the adapter carries under their names.
    """
    if adapter.unclaimed:
        yield unclaimed_tensor_lost("", sorted(adapter.unclaimed))
    if dropped:
        yield dropped_metadata("", dropped)
    names = sorted({*adapter.other_files, *adapter.tokenizer}.intersection(own))
    if names:
        yield dropped_metadata("", names)
