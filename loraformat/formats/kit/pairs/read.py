"""A file with pairs of factors, to Adapter; how one pair is to be read is the format's own business."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loraformat.diagnostics import Finding, FindingLocation, in_file, in_weights
from loraformat.errors import FormatError, MissingFile
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.findings import (
    base_weights_in_file,
    foreign_name_part,
    redundant_copy,
    scale_by_definition,
    unpaired_factor,
)
from loraformat.formats.kit.folder import left_behind, other_files, tokenizer_files
from loraformat.formats.kit.pairs.rank_and_alpha import stated
from loraformat.formats.kit.pairs.spelling import Pair, Spelling, clean, pairs_of, weight_name
from loraformat.formats.kit.scaling import Scaling, agreed, scale_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, Tensors
from loraformat.model.format_files import the_file
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Replace, Update


@dataclass(frozen=True, slots=True)
class Layer:
    """An update without its scale, and the rank by which alpha is divided."""

    update: LowRank
    rank: int


# All pairs of a file, the rank that it states, what the caller knows → the layers by module path.
Build = Callable[[Mapping[str, Pair], "int | None", Hints], Mapping[str, Layer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What distinguishes one format of this kind from the others.

    Attributes:
        spellings: of its factors.
        build: its orientation.
        scale: the factor where the code fixes it, and why; else None.
        keeps_biases: whether biases beside the factors are trained ones.
        replaced: weights beside the factors that are known to replace the base's.
        settings: (rank, alpha) that stand in another file of the folder.
    """

    spellings: Sequence[Spelling]
    build: Build
    scale: tuple[float, str] | None = None
    keeps_biases: bool = False
    replaced: tuple[str, ...] = ()
    settings: tuple[int | None, float | None] = (None, None)
    settings_file: str | None = None


def read_pairs(bundle: Bundle, dialect: Dialect, hints: Hints) -> Adapter:
    """The adapter of a file with pairs of factors.

    Raises:
        MissingFile (LF101): not exactly one tensor file.
        ConfigError (LF103): shapes that do not fit, or that do not say which axis is the rank; two alphas or ranks.
        FormatError (LF012): two names mean the same tensor.
    """
    file = the_file(bundle)
    if file is None:
        raise MissingFile("expected exactly one tensor file", where=bundle.uri, hint="pass the path of the file")
    tensors, where = file.open(), in_file(file.name)
    _require_distinct(tensors, where)
    pairs, copies = pairs_of(tensors.entries, dialect.spellings)
    whole = {module: pair for module, pair in pairs.items() if pair.a is not None and pair.b is not None}
    beside = _beside(tensors, whole, copies, dialect, hints)
    rank, alpha = stated(tensors, where)
    settings = dialect.settings_file or ""
    rank = agreed(rank, dialect.settings[0], "rank", where, settings=settings)
    rank = agreed(rank, hints.rank, "rank", where)
    alpha = agreed(alpha, dialect.settings[1], "alpha", where, settings=settings)
    layers = dialect.build(whole, rank, hints)
    notes = [*_notes(pairs, copies, where), *_foreign(tensors, where), *beside.notes(where)]
    scales = _scales(layers, rank, alpha, dialect, hints, where)
    if dialect.scale is not None and not {alpha, hints.alpha, hints.scale} - {None} and layers:
        notes.append(scale_by_definition(where, *dialect.scale))
    updates: dict[str, tuple[Update, ...]] = {
        **beside.updates,
        **{f"{module}.weight": (scales[module],) for module in layers},
    }
    own = (file.name, *([dialect.settings_file] if dialect.settings_file else []))
    return Adapter(
        config=AdapterConfig(
            declared_ranks={} if rank is None else _declared(layers, rank),
            fan_in_fan_out=hints.all_transposed,
            raw=dict(tensors.extras),
        ),
        updates=dict(sorted(updates.items())),
        tokenizer=tokenizer_files(bundle),
        other_files=other_files(bundle, own),
        unclaimed={**beside.unclaimed, **_halves(tensors, pairs, whole)},
        notes=(*notes, *left_behind(bundle, own)),
    )


def _declared(layers: Mapping[str, Layer], rank: int) -> dict[str, int]:
    """As many times the stated rank as an update has parts."""
    return {
        f"{module}.weight": rank * max(1, layers[module].update.rank // max(1, layers[module].rank))
        for module in sorted(layers)
    }


def _require_distinct(tensors: Tensors, where: FindingLocation) -> None:
    seen: dict[str, str] = {}
    for name in tensors.entries:
        other = seen.setdefault(clean(name), name)
        if other != name:
            raise FormatError(f"{name} and {other} mean the same tensor", where=where, hint="keep only one of them")


def _scales(
    layers: Mapping[str, Layer],
    rank: int | None,
    alpha: float | None,
    dialect: Dialect,
    hints: Hints,
    where: FindingLocation,
) -> dict[str, LowRank]:
    fixed = None if dialect.scale is None else dialect.scale[0]
    found = {}
    for module, layer in layers.items():
        divisor = rank if rank is not None else layer.rank
        scale = scale_of(alpha, divisor, Scaling(), hints, where) if divisor else None
        found[module] = replace(layer.update, scale=fixed if scale is None else scale)
    return found


def _halves(tensors: Tensors, pairs: Mapping[str, Pair], whole: Mapping[str, Pair]) -> dict[str, LazyTensor]:
    return {name: tensors.entries[name] for module, pair in pairs.items() if module not in whole for name in pair.names}


def _notes(pairs: Mapping[str, Pair], copies: Mapping[str, str], where: FindingLocation) -> list[Finding]:
    notes = []
    for module, pair in pairs.items():
        if (pair.a is None) != (pair.b is None):
            present, absent = ("B", "A") if pair.a is None else ("A", "B")
            notes.append(unpaired_factor(in_weights(module, file=where.file), present, absent))
    if copies:
        notes.append(redundant_copy(where, sorted(copies), "copies of the adapted weights"))
    return notes


def _foreign(tensors: Tensors, where: FindingLocation) -> list[Finding]:
    changed = [name for name in tensors.entries if clean(name) != name]
    return [foreign_name_part(where, "a wrapper's prefix", len(changed))] if changed else []


@dataclass(slots=True)
class _Beside:
    """What stands beside the factors and the copies of the weights that they adapt."""

    updates: dict[str, tuple[Update, ...]] = field(default_factory=dict)
    unclaimed: dict[str, LazyTensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def notes(self, where: FindingLocation) -> list[Finding]:
        return [base_weights_in_file(where, sorted(self.left_out))] if self.left_out else []


def _beside(
    tensors: Tensors, pairs: Mapping[str, Pair], copies: Mapping[str, str], dialect: Dialect, hints: Hints
) -> _Beside:
    """A whole model's other weights are the base's, frozen by LoRA training; with a base they are compared with it."""
    is_whole_model = bool(copies) and set(copies.values()) == pairs.keys()
    taken = {name for pair in pairs.values() for name in pair.names} | copies.keys()
    modules = list(pairs)
    before, after = prefix_in(modules, hints)
    found = _Beside()
    for name, tensor in tensors.entries.items():
        if name in taken or _is_half(name, dialect):
            continue
        weight = weight_name(name, modules)
        known = weight.startswith(before) and after + weight[len(before) :] in (hints.weights or {})
        is_bias = dialect.keeps_biases and not is_whole_model and weight.endswith(".bias")
        if known or is_bias or weight in dialect.replaced:
            found.updates[weight] = (Replace(tensor),)
        elif is_whole_model and (hints.weights is None or not tensor.dtype.is_floating):
            found.left_out.append(name)
        else:
            found.unclaimed[name] = tensor
    return found


def _is_half(name: str, dialect: Dialect) -> bool:
    return clean(name).endswith(tuple(end for spelling in dialect.spellings for end in (spelling.a, spelling.b)))


def prefix_in(modules: Sequence[str], hints: Hints) -> tuple[str, str]:
    """(prefix, what the base has in its place), where all adapted weights are in the base so; twice "" for none.

    The first of them decides which prefixes are tried; the matcher takes the same one for all names of the adapter.
    """
    weights = [f"{module}.weight" for module in modules]
    if not hints.weights or not weights or any(weight in hints.weights for weight in weights):
        return "", ""
    first = weights[0]
    longer = [("", name.removesuffix(first)) for name in hints.weights if name.endswith(f".{first}")]
    parts = first.split(".")
    shorter = [(".".join(parts[:cut]) + ".", "") for cut in range(1, len(parts) - 1)]
    fitting = [
        (before, after)
        for before, after in (*longer, *shorter)
        if all(w.startswith(before) and after + w[len(before) :] in hints.weights for w in weights)
    ]
    return fitting[0] if len(fitting) == 1 else ("", "")


def base_shape(module: str, pair: Pair, hints: Hints) -> tuple[int, ...] | None:
    """The shape of the weight that a pair adapts, from the base or from a copy in the file; None for unknown."""
    stored = (hints.weights or {}).get(f"{module}.weight")
    return pair.base_shape if stored is None else stored
