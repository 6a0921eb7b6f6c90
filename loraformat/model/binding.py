"""The base recorded in an adapter's weight file: in safetensors metadata or GGUF settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loraformat.errors import ContainerError
from loraformat.model.adapter import AdapterConfig
from loraformat.model.bundle import Bundle, TensorFile

# Weight files with room for it, by their suffixes.
SUFFIXES = (".safetensors", ".gguf")
_NAME, _REVISION, _FINGERPRINT = (f"loraformat.base_{what}" for what in ("model", "revision", "fingerprint"))


def with_bound_base(config: AdapterConfig, bundle: Bundle) -> AdapterConfig:
    """The config, with what the metadata of the weight files says about the base."""
    found: dict[str, str] = {}
    for file in bundle.tensor_files():
        if file.name.lower().endswith(SUFFIXES):
            try:
                tensors = file.open()
            except ContainerError:  # beside the adapter, whose own files its format has read
                continue
            found.update(tensors.metadata)
            found.update({key: value for key, value in tensors.extras.items() if isinstance(value, str)})
    if not found.keys() & {_NAME, _REVISION, _FINGERPRINT}:
        return config
    name, revision = config.base_model, config.base_revision
    if _NAME in found:  # a name and its revision belong together, and the stamp is younger than the config
        name, revision = found[_NAME], found.get(_REVISION)
    fingerprint = config.base_fingerprint or found.get(_FINGERPRINT)
    return replace(config, base_model=name, base_revision=revision, base_fingerprint=fingerprint)


def binding_of(config: AdapterConfig) -> dict[str, str]:
    """What the config says about the base, as metadata; empty where it has no fingerprint."""
    if config.base_fingerprint is None:
        return {}
    facts = {_NAME: config.base_model, _REVISION: config.base_revision, _FINGERPRINT: config.base_fingerprint}
    return {key: value for key, value in facts.items() if value is not None}


def bound(file: TensorFile, facts: Mapping[str, str]) -> TensorFile:
    """A weight file that says more; its tensors stay as they are."""
    tensors = file.open()
    keys = (_NAME, _REVISION, _FINGERPRINT)
    if tensors.container == "gguf":
        said = {key: value for key, value in tensors.extras.items() if key not in keys}
        changed = replace(tensors, extras={**said, **facts})
    else:
        kept = {key: value for key, value in tensors.metadata.items() if key not in keys}
        changed = replace(tensors, metadata={**kept, **facts})
    return replace(file, open=lambda: changed)
