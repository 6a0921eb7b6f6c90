"""The weight file of a PEFT folder, or the parts of one that was saved in several.

Source: peft 0.21.2, utils/save_and_load.py `load_peft_weights`; huggingface_hub, `split_torch_state_dict_into_shards`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loraformat.diagnostics import in_file, show
from loraformat.errors import ConfigError, FormatError, MissingFile
from loraformat.formats.peft.keys import WEIGHTS
from loraformat.model.bundle import Bundle, JsonFile, TensorFile, Tensors
from loraformat.model.tensors import DType, LazyTensor

_PART = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_INDEXES = ("adapter_model.safetensors.index.json", "adapter_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """The tensors of an adapter.

    Attributes:
        name: of the file, or of its first part, for messages.
        parts: all files that belong to it, an index too.
    """

    name: str
    parts: tuple[str, ...]
    files: tuple[TensorFile, ...]

    def open(self) -> Tensors:
        """The headers as one; FormatError (LF012): a tensor in two parts."""
        first, *others = (file.open() for file in self.files)
        entries: dict[str, LazyTensor] = dict(first.entries)
        for file, tensors in zip(self.files[1:], others, strict=True):
            twice = next((name for name in tensors.entries if name in entries), None)
            if twice is not None:
                raise FormatError(f"{show(twice, 200)} is in two parts of the adapter", where=in_file(file.name))
            entries.update(tensors.entries)
        return Tensors(first.container, entries, first.metadata, first.wrapper, first.extras)


_EIGHT_BITS = (DType.F8_E4M3, DType.F8_E5M2)


def upcast(entries: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors, those in 8-bit floating point as float32: their values are numbers, which PEFT upcasts.

    Source: peft 0.21.2, tuners/tuners_utils.py `cast_adapter_dtype`.
    """
    return {name: _wide(one) if one.dtype in _EIGHT_BITS else one for name, one in entries.items()}


def _wide(tensor: LazyTensor) -> LazyTensor:
    return tensor.to(DType.F32)


def weights_of(bundle: Bundle) -> AdapterWeights:
    """The file that PEFT would load, safetensors before the pickle; else all parts of one.

    Raises:
        MissingFile (LF101): neither is there, or a part is missing.
        FormatError (LF012), ConfigError (LF103): the index and the parts disagree.
    """
    for name in WEIGHTS.values():
        file = bundle.files.get(name)
        if isinstance(file, TensorFile):
            return AdapterWeights(name, (name,), (file,))
    parts = _parts(bundle)
    if not parts:
        hint = "they may be in a checkpoint folder of the training run, or a download may be incomplete"
        raise MissingFile(f"neither {' nor '.join(WEIGHTS.values())} is present", where=bundle.uri, hint=hint)
    found = AdapterWeights(parts[0].name, tuple(file.name for file in parts), tuple(parts))
    index = next((bundle.files[name] for name in _INDEXES if name in bundle.files), None)
    if not isinstance(index, JsonFile):
        return found
    _check_index(index, parts)
    return AdapterWeights(found.name, (*found.parts, index.name), found.files)


def _parts(bundle: Bundle) -> list[TensorFile]:
    """The parts in order, safetensors before pickles."""
    named = {name: match for name in bundle.files if (match := _PART.fullmatch(name))}
    for suffix in ("safetensors", "bin"):
        numbers = {int(match[1]): name for name, match in named.items() if match[3] == suffix}
        counts = sorted({int(match[2]) for match in named.values() if match[3] == suffix})
        if not numbers:
            continue
        if len(counts) > 1:
            raise FormatError(
                f"parts of several adapters: some are of {counts[0]}, others of {counts[1]}", where=bundle.uri
            )
        missing = next((number for number in range(1, counts[0] + 1) if number not in numbers), None)
        if missing is not None or len(numbers) != counts[0]:
            lost = f"adapter_model-{missing or 0:05}-of-{counts[0]:05}.{suffix}"
            raise MissingFile(f"{lost}: this part of the adapter is missing", where=bundle.uri)
        files = [bundle.files[numbers[number]] for number in sorted(numbers)]
        return [file for file in files if isinstance(file, TensorFile)]
    return []


def _check_index(index: JsonFile, parts: list[TensorFile]) -> None:
    value = index.load()
    listed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(listed, Mapping):
        raise ConfigError("weight_map: expected an object of tensor names and file names", where=in_file(index.name))
    there = {name: file.name for file in parts for name in file.open().entries}
    odd = next((name for name in sorted({*listed, *there}) if listed.get(name) != there.get(name)), None)
    if odd is not None:
        here, said = there.get(odd) or "no part", show(str(listed.get(odd) or "nothing"), 80)
        raise FormatError(f"{show(odd, 200)} is in {here}, but the index says {said}", where=in_file(index.name))
