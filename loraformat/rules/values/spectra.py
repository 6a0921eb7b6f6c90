"""Family 4, second part: norms and spectra of updates (`--deep`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat.diagnostics import Severity
from loraformat.model.floats import float64_of, quietly
from loraformat.model.results.weight_figures import module_kind
from loraformat.model.tensors import DType, rounded
from loraformat.model.updates import LowRank
from loraformat.rules.base import Hit, Subject, first_of, rule
from loraformat.rules.shapes import updates_of

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_LEAST_RANK = 4
_NEGLIGIBLE = 1e-4  # of the greatest singular value
_FLOAT16_MAX = 65504.0
_SAMPLED_ROWS = 64
_MOST_ELEMENTS = 1 << 26  # of a factor that is taken into memory whole


@rule("LF403", Severity.WARNING, since="0.1.0", slow=True)
def collapsed_rank(subject: Subject) -> Iterator[Hit]:
    """The effective rank of an update is far below its nominal rank.

    ## Why it matters
    Most of the factors has no effect: training collapsed to one or two directions, or the adapter was made from one of
    lower rank. It only costs memory when serving.

    ## Example
    Rank 16, with 13 singular values below a ten-thousandth of the largest.

    ## What to do
    Use a lower rank (`loraformat resize`), or check the training: learning rate, `use_rslora`, gradient clipping.

    ## Source
    Kalajdzievski 2023, arXiv 2312.03732, on the collapse of gradients at higher ranks.
    """
    assert subject.adapter is not None
    from loraformat.algebra import spectrum

    collapsed: dict[str, str] = {}
    for name, update in _plain(subject):
        found = spectrum(update)
        values = () if found is None else found.values
        rank = sum(value > _NEGLIGIBLE * values[0] for value in values)
        if len(values) >= _LEAST_RANK and 0 < rank * 4 <= len(values):
            collapsed.setdefault(name, f"effective rank {rank} of {len(values)}")
    if collapsed:
        yield Hit(first_of(list(collapsed)), next(iter(collapsed.values())))


@rule("LF404", Severity.WARNING, since="0.1.0", slow=True)
def norm_outlier(subject: Subject) -> Iterator[Hit]:
    """The norm of an update is far from those of the same module in the other layers.

    ## Why it matters
    Training diverged in one layer, or the file was combined from different runs. In the merged model that layer drowns
    the others.

    ## Example
    ‖s·BA‖ of about 2 in 31 layers, and 900 in one.

    ## What to do
    Use an earlier checkpoint; `loraformat inspect --norms` shows all norms.

    ## Source
    Iglewicz and Hoaglin 1993, the modified z-score above 3.5, of the logarithm of the norm; `inspect` marks the same.
    """
    assert subject.adapter is not None
    from loraformat.algebra import frobenius
    from loraformat.algebra.outliers import outliers

    norms = {name: (update, frobenius(update)) for name, update in _plain(subject)}
    found = outliers((name, (module_kind(name), update.shape), norm) for name, (update, norm) in norms.items())
    for name, middle in found.items():
        yield Hit(name, f"norm {norms[name][1]:.3g}, but the median of its kind is {middle:.3g}")


@rule("LF405", Severity.WARNING, since="0.1.0", slow=True)
def float16_overflow(subject: Subject) -> Iterator[Hit]:
    """An update has values outside the range of float16.

    ## Why it matters
    Loaded or merged in float16, those values become infinite, and so does everything that the layer computes.

    ## Example
    A product with an element of 70,000; the largest number of float16 is 65,504.

    ## What to do
    Merge and serve in bfloat16 or float32. Such values usually mean that training diverged.

    ## Source
    IEEE 754, binary16.
    """
    assert subject.adapter is not None
    for name, update in _plain(subject):
        largest = _largest_element(update)
        if largest > _FLOAT16_MAX and math.isfinite(largest):
            yield Hit(name, f"an element of the update is {largest:.4g}, but float16 ends at {_FLOAT16_MAX:g}")


@rule("LF406", Severity.WARNING, since="0.1.0", needs="base", slow=True)
def lost_to_rounding(subject: Subject) -> Iterator[Hit]:
    """Merged in the base's dtype, less than nine tenths of the update would survive rounding.

    ## Why it matters
    The update is small compared with the distance between neighboring values of the weight's dtype, so many elements
    round back to their old value. Measured on up to 64 rows of each weight: <W' - W, D> / <D, D>.

    ## Example
    An update of 0.1 % of the weight's norm and a base in bfloat16.

    ## What to do
    Serve the adapter without merging it, or use `loraformat merge --dtype float32` or `--rounding stochastic`.

    ## Source
    Rounding to nearest of IEEE 754; LF803 measures the same after a merge.
    """
    assert subject.adapter is not None
    assert subject.base is not None
    from loraformat.algebra.retention import is_lost
    from loraformat.matching import WHOLE

    read = subject.read_base
    if read is None:
        return
    kept = whole = 0.0
    dtypes = set()
    updates = dict(_plain(subject))
    for name, pieces in subject.matching.landings.items():
        update, piece = updates.get(name), pieces[0]
        stored = subject.base.tensors.get(piece.tensor)
        if (
            update is None
            or stored is None
            or len(pieces) > 1
            or piece.part != WHOLE
            or stored.shape != _stored_shape(update, piece.transposed)
        ):
            continue
        if not stored.dtype.is_floating or stored.strides is not None or not all(stored.shape):
            continue
        rows = read(piece.tensor, 0, min(_SAMPLED_ROWS, stored.shape[0]))
        some, all_of_it = _kept(update, piece.transposed, rows, stored.dtype)
        kept, whole = kept + some, whole + all_of_it
        dtypes.add(stored.dtype.safetensors)
    if whole > 0 and is_lost(kept / whole):
        yield Hit("", f"{kept / whole:.1%} of the update would survive rounding to {', '.join(sorted(dtypes))}")


def _stored_shape(update: LowRank, transposed: bool) -> tuple[int, ...]:
    return update.shape[::-1] if transposed else update.shape


@quietly
def _kept(update: LowRank, transposed: bool, base: Values, dtype: DType) -> tuple[float, float]:
    """<W' - W, D> and <D, D> for the first rows of a weight as it is stored."""
    up, down = float64_of(update.up), float64_of(update.down)
    if transposed:
        up, down = down.T, up.T
    delta = (update.scale or 0.0) * up[: base.shape[0]] @ down
    change = rounded(base + delta, dtype) - base.astype(delta.dtype)
    return float((change * delta).sum()), float((delta * delta).sum())


def _plain(subject: Subject) -> Iterator[tuple[str, LowRank]]:
    """Low-rank updates of one matrix each, whose factors fit, are finite in size and have a scale."""
    assert subject.adapter is not None
    for name, update in updates_of(subject.adapter):
        if isinstance(update, LowRank) and _is_plain(update):
            yield name, update


def _is_plain(update: LowRank) -> bool:
    up, down = update.up, update.down
    if len(up.shape) != 2 or len(down.shape) != 2 or up.shape[1] != down.shape[0] or not up.numel or not down.numel:
        return False
    is_real = up.dtype.is_floating and down.dtype.is_floating
    return is_real and update.scale is not None and not update.kernel and max(up.numel, down.numel) <= _MOST_ELEMENTS


@quietly
def _largest_element(update: LowRank) -> float:
    """The greatest |scale · up @ down|, formed only where the norms of rows and columns leave it open."""
    import numpy as np

    up, down = float64_of(update.up) * (update.scale or 0.0), float64_of(update.down)
    bound = float(np.linalg.norm(up, axis=1).max() * np.linalg.norm(down, axis=0).max())
    if not bound > _FLOAT16_MAX:
        return bound
    step = max(1, (1 << 24) // down.shape[1])
    return max(float(abs(up[start : start + step] @ down).max()) for start in range(0, up.shape[0], step))
