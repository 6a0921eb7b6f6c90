"""The quantization settings of a base and of an output, in config.json and in separate files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint
from loraformat.naming import levels_of

CONFIG = "config.json"
_KEYS = ("quantization_config", "compression_config")
# Settings as they stand, names of modules that become dense → the settings that an output has.
Edit: TypeAlias = Callable[[Mapping[str, Json], Sequence[str]], Mapping[str, Json]]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a quantization.

    Attributes:
        file: that states them.
        key: where in that file, for messages: "quantization_config.bits".
        values: as they stand there.
    """

    file: str
    key: str
    values: Mapping[str, Json]

    @property
    def method(self) -> str:
        """The method that they name, in lower case; "" if none."""
        found = self.values.get("quant_method")
        if isinstance(found, str):
            return found.lower()
        return next((name for (file, key), name in _OF_FILES.items() if file == self.file and key in self.values), "")


# (file, a key that it must have) → the method whose tools write such a file without naming it.
_OF_FILES = {
    ("hf_quant_config.json", "quant_algo"): "modelopt",
    ("quantize_config.json", "bits"): "gptq",
    ("quant_config.json", "w_bit"): "awq",
}


def settings_of(stored: Checkpoint) -> Settings | None:
    """The first settings of a quantization: of config.json, then of the files beside it; None where there are none."""
    for path, level in levels_of(stored.config):
        for key in _KEYS:
            found = level.get(key)
            if isinstance(found, Mapping):
                return Settings(CONFIG, ".".join((*path, key)), found)
    for name, value in stored.quantization_files.items():
        if isinstance(value, Mapping):
            inner = value.get("quantization")
            if isinstance(inner, Mapping):
                return Settings(name, "quantization", inner)
            return Settings(name, "", value)
    return None


def rewritten(
    files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str], edit: Edit
) -> Mapping[str, Json | None]:
    """The files of an output that differ from those of its base: see `QuantizedScheme.described`.

    Where no weight stays quantized, nothing calls the output quantized: the key leaves config.json, and the files
    beside it go, which vLLM and others look for.
    """
    modules = [name.removesuffix(".weight") for name in dense]
    changed: dict[str, Json | None] = {}
    for name, value in files.items():
        if not isinstance(value, Mapping):
            continue
        if name == CONFIG:
            changed[name] = _in_levels(value, modules, edit if kept else None)
        elif not kept:
            changed[name] = None
        elif isinstance(inner := value.get("quantization"), Mapping):
            changed[name] = {**value, "quantization": dict(edit(inner, modules))}
        else:
            changed[name] = dict(edit(value, modules))
    return changed


def _in_levels(value: Mapping[str, Json], modules: Sequence[str], edit: Edit | None) -> dict[str, Json]:
    """A config with the settings of every level edited, or without them."""
    result: dict[str, Json] = {}
    for key, inner in value.items():
        if key in _KEYS and isinstance(inner, Mapping):
            if edit is not None:
                result[key] = dict(edit(inner, modules))
        elif key.endswith("_config") and isinstance(inner, Mapping):
            result[key] = _in_levels(inner, modules, edit)
        else:
            result[key] = inner
    return result


def with_modules(settings: Mapping[str, Json], key: str, modules: Sequence[str], default: Sequence[str] = ()) -> Json:
    """The list under a key with the full paths of more modules.

    Full paths, since loaders compare the end of a name too: a short name would mean modules of every layer.

    Args:
        default: what the list stands for where it is absent or null, which an explicit list replaces.
    """
    found = settings.get(key)
    listed: list[Json] = list(found) if isinstance(found, list) else list(default)
    return [*listed, *(module for module in modules if module not in listed)]
