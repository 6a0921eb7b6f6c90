"""Folds all low-rank updates into one rank and one scale, for formats and engines that need it; changes dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.diagnostics import Finding
from loraformat.errors import NonFiniteValue, UnsupportedUpdate
from loraformat.formats.kit.losses import dropped_metadata, folded_scale, padded_ranks, reduced_precision
from loraformat.formats.kit.update_slots import is_stated, low_ranks_of, most_common, unstated_fields
from loraformat.model.adapter import Adapter, module_of
from loraformat.model.floats import ROUNDOFF
from loraformat.model.tensors import DType, LazyTensor, rounded
from loraformat.model.updates import Dense, LowRank, Update, map_tensors

if TYPE_CHECKING:
    from loraformat.model.tensors import Values


# Settings of a source that say how alpha becomes the factor; after this there is one rule.
_RULES = ("use_rslora", "scaling", "alpha_pattern", "alpha_exceptions", "rank_pattern", "rank_exceptions")


def uniform(adapter: Adapter) -> tuple[Adapter, tuple[Finding, ...]]:
    """The adapter with one rank and one scale, and what that changed (LF701, LF707).

    The scale is the most common one; the others are worked into `up` in float64 and rounded once. The rank is the
    largest one; the others are filled up with zeros. Updates without a scale stay as they are.
    """
    low_ranks = low_ranks_of(adapter)
    known = [update.scale for update in low_ranks.values() if update.scale is not None]
    if not known:
        return adapter, ()
    scale = most_common([each for each in known if each], default=0.0)
    rank = max(update.rank for update in low_ranks.values())
    updates = {
        weight: tuple(_uniform(weight, update, scale, rank, low_ranks) for update in chain)
        for weight, chain in adapter.updates.items()
    }
    folded = [weight for weight, update in low_ranks.items() if update.scale not in (None, scale)]
    padded = [weight for weight, update in low_ranks.items() if update.rank != rank and not update.is_stack]
    findings = []
    if folded:
        findings.append(folded_scale("", folded, max(folding_error(low_ranks[weight], scale) for weight in folded)))
    if padded:
        findings.append(padded_ranks("", padded, rank))
    raw = {name: value for name, value in adapter.config.raw.items() if name not in _RULES}
    declared = {weight: rank for weight in adapter.config.declared_ranks if weight in low_ranks}
    config = replace(adapter.config, raw=raw, declared_ranks={**adapter.config.declared_ranks, **declared})
    return replace(adapter, updates=updates, config=config), tuple(findings)


def _uniform(weight: str, update: Update, scale: float, rank: int, low_ranks: Mapping[str, LowRank]) -> Update:
    if isinstance(update, LowRank):
        return padded(_folded(update, scale), rank)
    layer = low_ranks.get(f"{module_of(weight)}.weight")
    if isinstance(update, Dense) and layer is not None and update.scale is not None and update.scale == layer.scale:
        return Dense(multiplied(update.delta, update.scale / scale), scale)
    return update


def _folded(update: LowRank, scale: float) -> LowRank:
    if update.scale is None or update.scale == scale:
        return update
    return replace(update, up=multiplied(update.up, update.scale / scale), scale=scale)


def folding_error(update: LowRank, scale: float) -> float:
    """Bound of the relative error of a folded value; 0 where the factor is a power of two."""
    assert update.scale is not None
    is_power = abs(math.frexp(update.scale / scale)[0]) == 0.5 or not update.scale
    return 0.0 if is_power else ROUNDOFF.get(update.up.dtype, 1.0)


def multiplied(tensor: LazyTensor, factor: float) -> LazyTensor:
    """`factor` times the values, in float64, rounded once to their dtype.

    Raises: UnsupportedUpdate (LF013): they are complex numbers. When loaded: NonFiniteValue (LF402).
    """
    if factor == 1.0:
        return tensor
    if tensor.dtype is DType.C64:
        raise UnsupportedUpdate("a tensor holds complex numbers, which are not supported")

    def read(start: int, stop: int) -> Values:
        import numpy as np

        values = tensor.read(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            product = values.astype(np.float64) * factor
        return _checked(values, rounded(product, tensor.dtype), tensor.dtype)

    return LazyTensor(tensor.shape, tensor.dtype, read)


def padded(update: LowRank, rank: int) -> LowRank:
    """The update with zeros up to a rank; a stack as it is."""
    if update.rank == rank or update.is_stack or len(update.up.shape) != 2 or len(update.down.shape) != 2:
        return update
    up, down, own = update.up, update.down, update.rank

    def columns(start: int, stop: int) -> Values:
        import numpy as np

        return np.pad(up.read(start, stop), ((0, 0), (0, rank - own)))

    def rows(start: int, stop: int) -> Values:
        import numpy as np

        there = down.read(min(start, own), min(stop, own))
        return np.pad(there, ((0, stop - start - there.shape[0]), (0, 0)))

    return replace(
        update,
        up=LazyTensor((up.shape[0], rank), up.dtype, columns),
        down=LazyTensor((rank, down.shape[1]), down.dtype, rows),
    )


def cast(adapter: Adapter, dtype: DType) -> tuple[Adapter, tuple[Finding, ...]]:
    """The adapter with all its floating values in `dtype`, and LF704 where that rounds."""
    wider: dict[str, None] = {}

    def narrowed(tensor: LazyTensor) -> LazyTensor:
        if not tensor.dtype.is_floating or tensor.dtype is dtype:
            return tensor
        if not _holds(dtype, tensor.dtype):
            wider[tensor.dtype.torch_name] = None

        def read(start: int, stop: int) -> Values:
            values = tensor.read(start, stop)
            return _checked(values, rounded(values, dtype), dtype)

        return LazyTensor(tensor.shape, dtype, read)

    updates = {
        weight: tuple(map_tensors(update, narrowed) for update in chain) for weight, chain in adapter.updates.items()
    }
    losses = (reduced_precision("", ", ".join(sorted(wider)), dtype.torch_name, ROUNDOFF[dtype]),) if wider else ()
    return replace(adapter, updates=updates), losses


def _holds(target: DType, source: DType) -> bool:
    """Whether every value of `source` is one of `target`."""
    inner = {DType.F64: tuple(ROUNDOFF), DType.F32: (DType.F16, DType.BF16, DType.F32)}
    return source in inner.get(target, (target,))


def _checked(before: Values, after: Values, dtype: DType) -> Values:
    import numpy as np

    if not np.isfinite(after).all() and np.isfinite(before).all():
        raise NonFiniteValue(
            f"a value is too large for {dtype.torch_name}", where="convert", hint="choose another --dtype"
        )
    return after


def stripped(adapter: Adapter) -> tuple[Adapter, tuple[Finding, ...]]:
    """The adapter without what no loader needs: free settings, files carried along, paths of a file system.

    Names of the base as the Hub has them, and tokenizer files, stay.
    """
    config = adapter.config
    raw = {name: value for name, value in config.raw.items() if is_stated(name)}
    left_out = [name for name in unstated_fields(config.raw) if name not in raw] + sorted(adapter.other_files)
    base = config.base_model
    if base is not None and _is_path(base):
        left_out.append("base model (a path)")
        base = None
    losses = (dropped_metadata("", left_out),) if left_out else ()
    bare = replace(config, raw=raw, base_model=base, base_revision=config.base_revision if base else None)
    return replace(adapter, config=bare, other_files={}), losses


def _is_path(name: str) -> bool:
    """Whether a base's name is a place in a file system: not `owner/name`."""
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or "\\" in name or name[1:2] == ":"
