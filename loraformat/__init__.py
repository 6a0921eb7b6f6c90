"""LoRA adapters on disk: inspect, validate, convert and merge them without loading a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from loraformat._version import __version__

# Public name → module; resolved on first use, so that `import loraformat` imports neither torch nor anything else.
_HOMES = {
    "Adapter": "loraformat.model.adapter",
    "AdapterConfig": "loraformat.model.adapter",
    "BiasFromWeight": "loraformat.model.updates",
    "BlockAffine": "loraformat.model.updates",
    "Dense": "loraformat.model.updates",
    "ElementwiseScale": "loraformat.model.updates",
    "FRoD": "loraformat.model.updates",
    "Finding": "loraformat.diagnostics",
    "Hadamard": "loraformat.model.updates",
    "Kronecker": "loraformat.model.updates",
    "LazyTensor": "loraformat.model.tensors",
    "LoraFormatError": "loraformat.errors",
    "LowRank": "loraformat.model.updates",
    "Magnitude": "loraformat.model.updates",
    "Multiplied": "loraformat.model.updates",
    "Replace": "loraformat.model.updates",
    "Report": "loraformat.report",
    "Rotated": "loraformat.model.updates",
    "Rows": "loraformat.model.updates",
    "Scaled": "loraformat.model.updates",
    "Severity": "loraformat.diagnostics",
    "SubtractedInit": "loraformat.model.updates",
    "WeightNetwork": "loraformat.model.updates",
    "convert": "loraformat.jobs.convert",
    "inspect": "loraformat.jobs.inspect",
    "load_adapter": "loraformat.io",
    "merge": "loraformat.jobs.merge",
    "save_adapter": "loraformat.io",
    "validate": "loraformat.jobs.validate",
}

if TYPE_CHECKING:
    from loraformat.diagnostics import Finding, Severity
    from loraformat.errors import LoraFormatError
    from loraformat.io import load_adapter, save_adapter
    from loraformat.jobs.convert import convert
    from loraformat.jobs.inspect import inspect
    from loraformat.jobs.merge import merge
    from loraformat.jobs.validate import validate
    from loraformat.model.adapter import Adapter, AdapterConfig
    from loraformat.model.tensors import LazyTensor
    from loraformat.model.updates import (
        BiasFromWeight,
        BlockAffine,
        Dense,
        ElementwiseScale,
        FRoD,
        Hadamard,
        Kronecker,
        LowRank,
        Magnitude,
        Multiplied,
        Replace,
        Rotated,
        Rows,
        Scaled,
        SubtractedInit,
        WeightNetwork,
    )
    from loraformat.report import Report

__all__ = [
    "Adapter",
    "AdapterConfig",
    "BiasFromWeight",
    "BlockAffine",
    "Dense",
    "ElementwiseScale",
    "FRoD",
    "Finding",
    "Hadamard",
    "Kronecker",
    "LazyTensor",
    "LoraFormatError",
    "LowRank",
    "Magnitude",
    "Multiplied",
    "Replace",
    "Report",
    "Rotated",
    "Rows",
    "Scaled",
    "Severity",
    "SubtractedInit",
    "WeightNetwork",
    "__version__",
    "convert",
    "inspect",
    "load_adapter",
    "merge",
    "save_adapter",
    "validate",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'loraformat' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
