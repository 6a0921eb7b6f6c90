"""What an adapter would change in a base: W' - W against W, streamed in windows of rows, nothing written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from loraformat.arithmetic import TILE, Tally, convert, finish
from loraformat.engine import open_engine
from loraformat.errors import MergeError, UnsupportedUpdate
from loraformat.jobs.measure.tables import Rows, table_record
from loraformat.matching import match
from loraformat.merger import Opened, Preview, Resources, Survey, previews_of
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.floats import quietly
from loraformat.model.results.validation import Skipped
from loraformat.model.results.weight_figures import TableRecord
from loraformat.model.tensors import DType
from loraformat.model.updates import Replace, Update, kind_of, scale_of
from loraformat.model.updates import Rows as SomeRows

if TYPE_CHECKING:
    from loraformat.algebra import Spectrum
    from loraformat.model.floats import Floats
    from loraformat.model.tensors import Values

_DTYPES = (DType.BF16, DType.F16)
_STRIP = 64
_SAMPLED = 16  # one strip in so many goes into the histograms
_BINS = 256  # of the exponents of float32

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(slots=True)
class Change:
    """Sums over some rows of a weight, with D = W' - W.

    Attributes:
        base: Σ W².
        update: Σ D².
        kept: Σ (round(W') - W) · D, for bfloat16 and for float16.
        base_bins, update_bins: how many values of a sample of rows have which exponent of float32; empty if not asked.
        spectrum: of D, where it was asked for and its factors do not tell it.
    """

    base: float = 0.0
    update: float = 0.0
    kept: tuple[float, float] = (0.0, 0.0)
    base_bins: tuple[int, ...] = ()
    update_bins: tuple[int, ...] = ()
    spectrum: Spectrum | None = None

    def add(self, other: Change) -> None:
        """Take in the sums of more rows."""
        self.base += other.base
        self.update += other.update
        self.kept = (self.kept[0] + other.kept[0], self.kept[1] + other.kept[1])
        self.base_bins = _added(self.base_bins, other.base_bins)
        self.update_bins = _added(self.update_bins, other.update_bins)

    @property
    def relative(self) -> float | None:
        """‖D‖ / ‖W‖; None where W is zero."""
        return math.sqrt(self.update / self.base) if self.base > 0 else None

    def retained(self, which: int) -> float | None:
        """The share of D that survives rounding to bfloat16 (0) or float16 (1); None where D is zero."""
        return self.kept[which] / self.update if self.update > 0 else None


@dataclass(slots=True)
class Changes:
    """Of one adapter on one base.

    Attributes:
        weights: base weight, as the adapter calls it → its change; without those that cannot be applied.
        tables: embeddings whose rows are replaced or added.
        skipped: why some weights are left out.
    """

    weights: dict[str, Change] = field(default_factory=dict)
    tables: list[TableRecord] = field(default_factory=list)
    skipped: tuple[Skipped, ...] = ()

    def total(self, weights: Iterable[str]) -> Change:
        """The sums over some weights."""
        whole = Change()
        for name in sorted(set(weights) & self.weights.keys()):
            whole.add(self.weights[name])
        return whole


def changes_of(
    base: Checkpoint,
    adapter: Adapter,
    *,
    jobs: int = 1,
    with_spectra: bool = False,
    with_histograms: bool = False,
    progress: Progress | None = None,
) -> Changes:
    """The change of every weight that lands and fits; what does not is the rules' to report.

    Args:
        jobs: threads.
        with_spectra: decompose W' - W of weights whose update has no factors of its own (DoRA, factors, replacements);
            such a weight is in memory as a whole.
        with_histograms: count the exponents of a sample of rows.
        progress: called with (bytes read, bytes in all).

    Raises: StorageError: a read failed. NonFiniteValue (LF402): an adapter value is NaN or infinite.
    """
    usable = _usable(base, adapter)
    try:
        previews = previews_of(base, usable)
    except (MergeError, UnsupportedUpdate) as refused:
        return Changes(skipped=(Skipped(refused.code, "change-of-base", str(refused)),))
    tracks = [_track(each, with_spectra=with_spectra, with_histograms=with_histograms) for each in previews]
    limits, done = Resources(jobs=jobs), 0
    total = sum(each.matrix[0] * each.row_nbytes for each in previews)
    tasks = (task for track in tracks for task in track.tasks(limits))
    for each in open_engine(jobs).map(lambda task: task(), tasks):
        each.track.account(each)
        done += each.rows * each.track.preview.row_nbytes
        if progress is not None:
            progress(done, total)
    found = Changes()
    for track in tracks:
        track.finish(found)
    return found


@dataclass(slots=True, eq=False)
class _Track:
    """One changed tensor and what is collected of it.

    Attributes:
        opened: while windows of it are measured.
        whole: rows of D, where its spectrum is wanted.
        rows: norms of rows, where it is a table whose rows are replaced.
        left: windows to come.
    """

    preview: Preview
    with_histograms: bool
    opened: Opened | None = None
    whole: Values | None = None
    rows: Rows | None = None
    left: int = 0
    sums: dict[str, Change] = field(default_factory=dict)

    def tasks(self, limits: Resources) -> Iterator[Callable[[], _Done]]:
        """The windows, each a piece of work. The factors are read when the first begins."""
        self.opened = self.preview.open()
        blocks = self.preview.windows(limits)
        self.left = len(blocks)
        for start, stop in blocks:
            yield lambda start=start, stop=stop: _Done(self, stop - start, self._measure(start, stop))  # type: ignore[misc]

    def account(self, done: _Done) -> None:
        """Add a window that is measured; the factors go with the last."""
        for weight, change in done.changes:
            self.sums.setdefault(weight, Change()).add(change)
        self.left -= 1
        if not self.left:
            self.opened = None

    def finish(self, found: Changes) -> None:
        """Hand over the sums, and what only the whole tensor tells."""
        import numpy as np

        from loraformat.algebra import spectrum_of

        for weight, change in self.sums.items():
            found.weights.setdefault(weight, Change()).add(change)
        if self.whole is not None:
            for weight, first, last in self.preview.spans:
                found.weights[weight].spectrum = spectrum_of(self.whole[first:last].astype(np.float64))
            self.whole = None
        if self.rows is not None:
            found.tables.append(table_record(self.preview.spans[0][0], self.rows))

    @quietly
    def _measure(self, start: int, stop: int) -> list[tuple[str, Change]]:
        opened, spans = self.opened, self.preview.spans
        assert opened is not None
        if len(spans) == 1 and self.preview.is_product and not self.with_histograms:
            weight, _, last = spans[0]
            survey = opened.survey(start, min(stop, self.preview.rows_stored), _DTYPES) if last >= stop else None
            if survey is not None:
                return [(weight, change) for change in _changes_in(survey, self.preview.matrix[1])]
        base = opened.base(start, stop)
        update: Floats | None = None
        if not self.preview.is_product:
            result = opened.merged(base, start)
            update = result - base
            self._keep(start, base, result, update)
        changes: list[tuple[str, Change]] = []
        for low, high in _strips(start, min(stop, self.preview.rows_stored), spans):
            weights = [weight for weight, first, last in spans if first <= low and high <= last]
            if weights:
                here = slice(low - start, high - start)
                added = opened.product(low, high) if update is None else update[here]
                changes.extend((weight, self._change(base[here], added, low)) for weight in weights)
        return changes

    def _change(self, base: Floats, update: Floats, low: int) -> Change:
        change = _sums(base, update)
        if self.with_histograms and (low // _STRIP) % _SAMPLED == 0:
            change.base_bins, change.update_bins = _bins(base), _bins(update)
        return change

    def _keep(self, start: int, base: Floats, result: Floats, update: Floats) -> None:
        if self.rows is not None:
            self.rows.add(start, base, result)
        if self.whole is not None:
            # Rows that an update adds do not change anything.
            end = max(start, min(start + update.shape[0], self.preview.rows_stored))
            self.whole[start:end] = update[: end - start]


@dataclass(frozen=True, slots=True)
class _Done:
    """A window that is measured: how many rows, and (weight, sums) of each strip."""

    track: _Track
    rows: int
    changes: list[tuple[str, Change]]


def _usable(base: Checkpoint, adapter: Adapter) -> Adapter:
    """The adapter without weights that do not land, do not fit, or have no scale."""
    found = match(adapter, base)
    bad = {misfit.weight for misfit in found.misfits}
    updates = {
        weight: chain
        for weight, chain in adapter.updates.items()
        if weight in found.landings and weight not in bad and all(map(_has_value, chain))
    }
    return replace(adapter, updates=updates)


def _has_value(update: Update) -> bool:
    return not kind_of(update).has_scale or scale_of(update) is not None


def _track(preview: Preview, *, with_spectra: bool, with_histograms: bool) -> _Track:
    import numpy as np

    track = _Track(preview, with_histograms)
    if with_spectra and not preview.is_product:
        track.whole = np.zeros(preview.matrix, np.float32)
    if preview.is_table and any(isinstance(update, (Replace, SomeRows)) for update in preview.updates):
        track.rows = Rows.of(preview.matrix[0], preview.rows_stored)
    return track


def _strips(start: int, stop: int, spans: Sequence[tuple[str, int, int]]) -> Iterator[tuple[int, int]]:
    """(low, high) of strips of at most _STRIP rows, none of which crosses the border of a span."""
    borders = {border for _, first, last in spans for border in (first, last) if start < border < stop}
    places = sorted({*range(start, stop, _STRIP), stop, *borders}) if start < stop else []
    return pairwise(places)


def _changes_in(survey: Survey, cols: int) -> Iterator[Change]:
    """The sums of each tile, so that they do not depend on the windows in which a weight is read."""
    import numpy as np

    tile = TILE * cols * survey.dtype.itemsize
    for number, (bf16, fp16) in enumerate(zip(*survey.tallies, strict=True)):
        raw = survey.raw[number * tile : (number + 1) * tile]
        single = np.empty(raw.nbytes // survey.dtype.itemsize, np.float32)
        convert(raw, survey.dtype, single.view(np.uint8).data, DType.F32)
        values = single.astype(np.float64)
        yield Change(base=float(np.vdot(values, values)), update=bf16.whole, kept=(bf16.kept, fp16.kept))


def _sums(base: Floats, update: Floats) -> Change:
    import numpy as np

    base = np.ascontiguousarray(base)
    raw, result, written = base.reshape(-1).view(np.uint8).data, base + update, memoryview(bytearray(2 * base.size))
    bf16, fp16 = (sum(finish(raw, DType.F64, result, update, written, dtype), Tally()) for dtype in _DTYPES)
    return Change(base=float(np.vdot(base, base)), update=bf16.whole, kept=(bf16.kept, fp16.kept))


def _bins(values: Floats) -> tuple[int, ...]:
    """How many values have which exponent of float32; zeros and subnormal numbers are in bin 0."""
    import numpy as np

    exponents = (np.array(values, np.float32, order="C").view(np.uint32) >> 23) & (_BINS - 1)
    return tuple(np.bincount(exponents.reshape(-1), minlength=_BINS).tolist())


def _added(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True)) if one and other else one or other
