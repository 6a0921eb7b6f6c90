"""LoRA adapters on disk: inspect, validate, convert and merge them without loading a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from loraformat._version import __version__

# Module → its public names, resolved on first use, so that `import loraformat` imports neither torch nor anything else.
_PUBLIC: dict[str, tuple[str, ...]] = {
    # Verbs, and what they are given.
    "loraformat.jobs.algebra.combine": ("combine",),
    "loraformat.jobs.algebra.pick": ("pick",),
    "loraformat.jobs.algebra.resize": ("resize",),
    "loraformat.jobs.algebra.scale": ("scale",),
    "loraformat.jobs.card.verb": ("card",),
    "loraformat.jobs.convert": ("convert", "propose_map"),
    "loraformat.jobs.diff": ("diff",),
    "loraformat.jobs.estimate": ("estimate",),
    "loraformat.jobs.explain": ("explain",),
    "loraformat.jobs.inspect": ("View", "inspect"),
    "loraformat.jobs.merge": ("dequantize", "merge"),
    "loraformat.jobs.plot": ("plot",),
    "loraformat.jobs.validate": ("validate",),
    "loraformat.jobs.stamp": ("stamp",),
    "loraformat.jobs.verify": ("verify",),
    "loraformat.model.assumptions": ("Assumptions",),
    "loraformat.storage.publication": ("Publication",),
    "loraformat.jobs.weights.ablate": ("ablate",),
    "loraformat.jobs.weights.extract": ("extract",),
    "loraformat.jobs.weights.init": ("init",),
    "loraformat.jobs.weights.unmerge": ("unmerge",),
    # Adapters and bases.
    "loraformat.containers": ("open_checkpoint",),
    "loraformat.io": ("load_adapter", "save_adapter"),
    "loraformat.merger": ("delta",),
    "loraformat.model.adapter": ("Adapter", "AdapterConfig"),
    "loraformat.model.checkpoint": ("BaseWeight", "Checkpoint"),
    "loraformat.model.tensors": ("DType", "LazyTensor"),
    # Kinds of update.
    "loraformat.model.updates": (
        *("BiasFromWeight", "BlockAffine", "Dense", "ElementwiseScale", "FRoD", "Hadamard", "Kronecker", "LowRank"),
        *("Magnitude", "Multiplied", "Replace", "Rotated", "Rows", "Scaled", "SubtractedInit", "Update"),
        "WeightNetwork",
    ),
    # Reports.
    "loraformat.diagnostics": ("Finding", "FindingLocation", "Severity"),
    "loraformat.report": ("Report",),
    "loraformat.model.results.differences": ("DiffResult", "FieldDifference", "WeightDifference"),
    "loraformat.model.results.estimates": ("EstimateResult", "MemoryEstimate", "TargetEstimate"),
    "loraformat.model.results.factor_changes": ("FactorChange", "FactorResult"),
    "loraformat.model.results.validation": ("IgnoredFinding", "Skipped", "ValidateResult"),
    "loraformat.model.results.verbs": (
        *("CardResult", "Checked", "ConvertResult", "FileShare", "InspectResult", "MergedAdapter", "MergeResult"),
        *("PlotResult", "ProposedMap", "RenamedTensor", "Retention", "RoundTrip", "UndoneWeight", "UnmergeResult"),
        "VerifyResult",
    ),
    "loraformat.model.results.weight_figures": ("TableRecord", "WeightRecord"),
    "loraformat.model.summary": ("Summary",),
    # Errors.
    "loraformat.errors": (
        *("AdapterRefused", "AmbiguousFormat", "AssumptionContradicted", "ConfigError", "ContainerError"),
        *("EngineError", "FormatError", "GitLfsPointer", "InvalidHeader", "InvalidJson", "InvalidYaml"),
        "LoraFormatError",
        *("MergeError", "MissingExtra", "MissingFile", "NonFiniteValue", "NotATensorFile", "NothingChecked"),
        *("OutOfResources", "RoundTripFailed", "ShapeMismatch", "StorageError", "TruncatedFile", "UnknownFormat"),
        *("UnmatchedUpdate", "UnsafePickle", "UnsupportedMachine", "UnsupportedUpdate", "UsageError", "WebPage"),
    ),
}

if TYPE_CHECKING:
    from loraformat.containers import open_checkpoint
    from loraformat.diagnostics import Finding, FindingLocation, Severity
    from loraformat.errors import (
        AdapterRefused,
        AmbiguousFormat,
        AssumptionContradicted,
        ConfigError,
        ContainerError,
        EngineError,
        FormatError,
        GitLfsPointer,
        InvalidHeader,
        InvalidJson,
        InvalidYaml,
        LoraFormatError,
        MergeError,
        MissingExtra,
        MissingFile,
        NonFiniteValue,
        NotATensorFile,
        NothingChecked,
        OutOfResources,
        RoundTripFailed,
        ShapeMismatch,
        StorageError,
        TruncatedFile,
        UnknownFormat,
        UnmatchedUpdate,
        UnsafePickle,
        UnsupportedMachine,
        UnsupportedUpdate,
        UsageError,
        WebPage,
    )
    from loraformat.io import load_adapter, save_adapter
    from loraformat.jobs.algebra.combine import combine
    from loraformat.jobs.algebra.pick import pick
    from loraformat.jobs.algebra.resize import resize
    from loraformat.jobs.algebra.scale import scale
    from loraformat.jobs.card.verb import card
    from loraformat.jobs.convert import convert, propose_map
    from loraformat.jobs.diff import diff
    from loraformat.jobs.estimate import estimate
    from loraformat.jobs.explain import explain
    from loraformat.jobs.inspect import View, inspect
    from loraformat.jobs.merge import dequantize, merge
    from loraformat.jobs.plot import plot
    from loraformat.jobs.stamp import stamp
    from loraformat.jobs.validate import validate
    from loraformat.jobs.verify import verify
    from loraformat.jobs.weights.ablate import ablate
    from loraformat.jobs.weights.extract import extract
    from loraformat.jobs.weights.init import init
    from loraformat.jobs.weights.unmerge import unmerge
    from loraformat.merger import delta
    from loraformat.model.adapter import Adapter, AdapterConfig
    from loraformat.model.assumptions import Assumptions
    from loraformat.model.checkpoint import BaseWeight, Checkpoint
    from loraformat.model.results.differences import DiffResult, FieldDifference, WeightDifference
    from loraformat.model.results.estimates import EstimateResult, MemoryEstimate, TargetEstimate
    from loraformat.model.results.factor_changes import FactorChange, FactorResult
    from loraformat.model.results.validation import IgnoredFinding, Skipped, ValidateResult
    from loraformat.model.results.verbs import (
        CardResult,
        Checked,
        ConvertResult,
        FileShare,
        InspectResult,
        MergedAdapter,
        MergeResult,
        PlotResult,
        ProposedMap,
        RenamedTensor,
        Retention,
        RoundTrip,
        UndoneWeight,
        UnmergeResult,
        VerifyResult,
    )
    from loraformat.model.results.weight_figures import TableRecord, WeightRecord
    from loraformat.model.summary import Summary
    from loraformat.model.tensors import DType, LazyTensor
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
        Update,
        WeightNetwork,
    )
    from loraformat.report import Report
    from loraformat.storage.publication import Publication

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterRefused",
    "AmbiguousFormat",
    "AssumptionContradicted",
    "Assumptions",
    "BaseWeight",
    "BiasFromWeight",
    "BlockAffine",
    "CardResult",
    "Checked",
    "Checkpoint",
    "ConfigError",
    "ContainerError",
    "ConvertResult",
    "DType",
    "Dense",
    "DiffResult",
    "ElementwiseScale",
    "EngineError",
    "EstimateResult",
    "FRoD",
    "FactorChange",
    "FactorResult",
    "FieldDifference",
    "FileShare",
    "Finding",
    "FindingLocation",
    "FormatError",
    "GitLfsPointer",
    "Hadamard",
    "IgnoredFinding",
    "InspectResult",
    "InvalidHeader",
    "InvalidJson",
    "InvalidYaml",
    "Kronecker",
    "LazyTensor",
    "LoraFormatError",
    "LowRank",
    "Magnitude",
    "MemoryEstimate",
    "MergeError",
    "MergeResult",
    "MergedAdapter",
    "MissingExtra",
    "MissingFile",
    "Multiplied",
    "NonFiniteValue",
    "NotATensorFile",
    "NothingChecked",
    "OutOfResources",
    "PlotResult",
    "ProposedMap",
    "Publication",
    "RenamedTensor",
    "Replace",
    "Report",
    "Retention",
    "Rotated",
    "RoundTrip",
    "RoundTripFailed",
    "Rows",
    "Scaled",
    "Severity",
    "ShapeMismatch",
    "Skipped",
    "StorageError",
    "SubtractedInit",
    "Summary",
    "TableRecord",
    "TargetEstimate",
    "TruncatedFile",
    "UndoneWeight",
    "UnknownFormat",
    "UnmatchedUpdate",
    "UnmergeResult",
    "UnsafePickle",
    "UnsupportedMachine",
    "UnsupportedUpdate",
    "Update",
    "UsageError",
    "ValidateResult",
    "VerifyResult",
    "View",
    "WebPage",
    "WeightDifference",
    "WeightNetwork",
    "WeightRecord",
    "__version__",
    "ablate",
    "card",
    "combine",
    "convert",
    "delta",
    "dequantize",
    "diff",
    "estimate",
    "explain",
    "extract",
    "init",
    "inspect",
    "load_adapter",
    "merge",
    "open_checkpoint",
    "pick",
    "plot",
    "propose_map",
    "resize",
    "save_adapter",
    "scale",
    "stamp",
    "unmerge",
    "validate",
    "verify",
]

_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'loraformat' has no attribute {name!r}")
    if _HOMES[name] != "loraformat.errors":
        from loraformat.machine import require_little_endian

        require_little_endian()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
