"""extract: the LoRA closest to what fine-tuning changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from loraformat import formats
from loraformat.algebra.decomposition import Decomposition
from loraformat.algebra.factors import Product, values_of
from loraformat.algebra.rank_rules import RankRule
from loraformat.algebra.row_blocks import leading
from loraformat.algebra.weights.difference import Measure, measure, retained, transposed
from loraformat.diagnostics import Finding
from loraformat.engine import open_engine
from loraformat.errors import AdapterRefused, NonFiniteValue, UsageError, require_one_of
from loraformat.jobs.algebra.factoring import low_rank_of, together
from loraformat.jobs.algebra.options import OutputOptions, checked, described, dtype_of
from loraformat.jobs.algebra.output import config_of, write
from loraformat.jobs.algebra.sizes import not_met, ranks_within
from loraformat.jobs.weights.changes import (
    RESTS,
    Changed,
    changed,
    difference_of,
    handle_rest,
    nbytes_of,
    saved,
    squared_norm,
    vocabulary_of,
)
from loraformat.jobs.weights.models import config_for, open_model, origin_of_models
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.factor_changes import FactorChange, FactorResult
from loraformat.model.tensors import DType, LazyTensor, bytes_of, numbers_of
from loraformat.model.updates import LowRank, Update
from loraformat.report import Report
from loraformat.rules import doubts
from loraformat.storage import Location, Publication, Spool, open_spool, uri_of

DEFAULT_MEMORY_NBYTES = 256 << 20
PASSES = 3
_FIRST_RANKS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """How the difference of each weight is factored.

    Attributes:
        held_nbytes: of a difference that is kept between passes.
    """

    rule: RankRule
    dtype: DType
    passes: int
    seed: int
    held_nbytes: int
    jobs: int


def extract(
    base: Location,
    tuned: Location,
    out: Location,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    size: int | None = None,
    max_rank: int | None = None,
    select: Sequence[str] = (),
    drop: Sequence[str] = (),
    rest: str = "refuse",
    passes: int = PASSES,
    seed: int = 0,
    dtype: str = "float32",
    to: str = "peft",
    container: str | None = None,
    jobs: int = 1,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    dry_run: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Extract a LoRA: the closest to W' − W for every linear layer and convolution that fine-tuning changed.

    >>> import loraformat
    >>> adapters = ["fixtures/minigpt/lora_adapter"]
    >>> _ = loraformat.merge("fixtures/minigpt/base", adapters, "fine-tuned", alpha=1.0)
    >>> report = loraformat.extract("fixtures/minigpt/base", "fine-tuned", "extracted", rank=4, rest="save")
    >>> report.data.error < 1e-4, report.data.kept
    (True, ('token_embedding.weight',))

    A block Krylov space finds the leading singular vectors in three passes over blocks of 256 rows; neither `jobs` nor
    `memory_nbytes` changes a byte. The error in the report is exact, computed from the squares of what the rank leaves
    out.

    Args:
        base, tuned: folders or files of two models with the same names.
        out: folder that does not exist yet.
        rank, energy, error, size, max_rank: as for `resize`. Energy and error do not raise the rank only to store the
            rounding noise of a tuned 16-bit model.
        select: patterns of weights to extract, as for `pick`; by default all linear layers and convolutions, without
            tables and heads.
        drop: patterns of weights to leave out, changed or not.
        rest: if anything else changed (norms, biases, tables, a larger vocabulary): "refuse", "save" it in the adapter,
            or "drop" it.
        passes: passes over the rows of a difference, 2 to 8: 3 come within 0.6 % of the smallest error, 4 within 0.2 %.
        seed: random seed of the randomized SVD.
        dtype: of the factors: "float32", "bfloat16" or "float16".
        to, container: as for `resize`.
        jobs: threads, each with one weight at a time.
        memory_nbytes: memory for differences kept between passes; others are read again.
        dry_run, strict, overwrite, publication, announce, progress: as for `resize`.

    Raises: UsageError (LF021): no argument sets the rank, or something other than the layers changed and `rest` is
        "refuse". MergeError (LF801): the models have different tensor names. NonFiniteValue (LF402). UnsupportedUpdate
        (LF013): a pipeline or a GGUF file. AdapterRefused: nothing changed. StorageError, ContainerError, FormatError.
    """
    rule = checked(RankRule(rank=rank, energy=energy, error=error, size=size, max_rank=max_rank))
    if not rule.names and rule.max_rank is None:
        raise UsageError("no rank is given", where="extract", hint="pass for example --rank 32")
    require_one_of(rest, RESTS, "--rest")
    if not 2 <= passes <= 8:
        raise UsageError(f"expected 2 to 8 passes, found {passes}", where="--passes")
    wanted = _Wanted(
        rule=rule,
        dtype=dtype_of(dtype),
        passes=passes,
        seed=seed,
        held_nbytes=memory_nbytes // max(1, jobs),
        jobs=jobs,
    )
    target, uris = formats.writable(to), (uri_of(base), uri_of(tuned))
    before, after = (open_model(uri) for uri in uris)
    counter = _Counter(sum(nbytes_of(weight) for weight in after.weights.values()), progress)
    found = changed(before, after, select, drop, jobs, counter.add)
    handle_rest(found.rest, rest)
    if not found.layers:
        raise AdapterRefused(
            "none of the selected linear layers and convolutions differ between the models", where="extract"
        )
    options = OutputOptions(
        to=to,
        container=container,
        dry_run=dry_run,
        strict=strict,
        overwrite=overwrite,
        publication=publication,
        announce=announce,
        progress=None,
    )
    with open_spool(uri_of(out)) as spool:
        updates, changes = _extracted(before, after, found, wanted, spool, counter)
        extra = saved(found.rest, before, after, found.layers) if rest == "save" else {}
        chains: dict[str, tuple[Update, ...]] = {name: (update,) for name, update in updates.items()}
        chains |= {name: (update,) for name, update in extra.items()}
        lost = (*(() if rest == "save" else found.rest), *found.dropped)
        result = FactorResult(
            method=", ".join([described(rule), *([f"{passes} passes"] if passes != PASSES else [])]),
            target=target.NAME,
            adapters=(),
            models=uris,
            weights=changes,
            kept=tuple(sorted(extra)),
            left_out=tuple(sorted((*lost, *(each.weight for each in changes if not each.rank)))),
            dropped=_dropped(lost, changes, before, after),
            unchanged=found.unchanged,
            vocabulary=vocabulary_of(extra, before),
            bytes_before=sum(nbytes_of(after.weights[name]) for name in (*found.layers, *found.rest)),
        )
        config = config_for(uris[0], before, found.layers.values())
        adapter = Adapter(config=config_of(config, chains, is_fresh=True), updates=dict(sorted(chains.items())))
        return write(
            adapter,
            _with_floor(together(result)),
            origin_of_models(dict(zip(uris, (before, after), strict=True)), (*doubts(before), *doubts(after))),
            uri_of(out),
            job="extract",
            base=before,
            options=options,
            findings=tuple(not_met(changes, rule)),
        )


class _Counter:
    """Bytes of the tuned model that are done, for the bar."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _extracted(
    base: Checkpoint, tuned: Checkpoint, found: Changed, wanted: _Wanted, spool: Spool, counter: _Counter
) -> tuple[dict[str, Update], tuple[FactorChange, ...]]:
    """The updates, whose factors lie in the spool, and a record of each.

    Raises: AdapterRefused: rules leave no rank. NonFiniteValue (LF402).
    """
    ranks = _ranks_by_size(base, tuned, found, wanted) if wanted.rule.size is not None else {}

    def one(name: str) -> tuple[LowRank | None, FactorChange]:
        update, change = _factored(name, base, tuned, found, wanted, ranks.get(name))
        return (None if update is None else _put_aside(update, spool)), change

    updates: dict[str, Update] = {}
    changes = []
    names = list(found.layers)
    for name, (update, change) in zip(names, open_engine(wanted.jobs).map(one, names), strict=True):
        changes.append(change)
        if update is not None:
            updates[name] = update
        counter.add(nbytes_of(tuned.weights[name]))
    if not updates:
        raise AdapterRefused("the options reduce every update to rank 0: nothing is left to write", where="extract")
    return updates, tuple(changes)


def _factored(
    name: str, base: Checkpoint, tuned: Checkpoint, found: Changed, wanted: _Wanted, rank: int | None
) -> tuple[LowRank | None, FactorChange]:
    """The update of one weight, None at rank 0, and its record."""
    layout = found.layers[name]
    measured, best = _decomposed(name, base, tuned, found, wanted, wanted.rule)
    rule = replace(wanted.rule, floor=measured.floor)
    rank = rule.least(best) if rank is None else min(rank, best.rank)
    full = min(best.shape)
    if not rank:
        empty = FactorChange(weight=name, rank_before=full, rank=0, norm=measured.norm, error=1.0, energy=0.0)
        return None, empty
    update, change = low_rank_of(name, [best], rank, full, layout.form, wanted.dtype)
    factors = Product(values_of(update.up), values_of(update.down))
    stored = Product(factors.right.T, factors.left.T) if layout.is_transposed else factors
    kept, squares = retained(base.weights[name], stored, base.tensors[name].dtype)
    return update, replace(change, floor=measured.floor / measured.norm, retained=kept / squares if squares else None)


def _decomposed(
    name: str, base: Checkpoint, tuned: Checkpoint, found: Changed, wanted: _Wanted, rule: RankRule
) -> tuple[Measure, Decomposition]:
    """What one weight changed by, as its update has it: (out, in). Raises: NonFiniteValue (LF402)."""
    difference = difference_of(name, base, tuned)
    measured, source = measure(difference, wanted.held_nbytes)
    if not measured.is_finite:
        raise NonFiniteValue(
            "one of the models holds NaN or infinity", where=name, hint="the training run may have diverged"
        )
    best = leading(
        source,
        replace(rule, floor=measured.floor),
        wanted.passes,
        seed=wanted.seed,
        held_nbytes=wanted.held_nbytes,
    )
    return measured, transposed(best) if found.layers[name].is_transposed else best


def _ranks_by_size(base: Checkpoint, tuned: Checkpoint, found: Changed, wanted: _Wanted) -> dict[str, int]:
    """Ranks for which the weight file takes at most `rule.size`; more singular values are computed where they count."""
    size = wanted.rule.size
    assert size is not None
    shapes = {name: (base.tensors[name].shape[0], math.prod(base.tensors[name].shape[1:])) for name in found.layers}
    each = sum(sum(shape) for shape in shapes.values()) * wanted.dtype.itemsize
    most = max(_FIRST_RANKS, 2 * size // each)
    while True:
        rule = RankRule(max_rank=min(most, wanted.rule.max_rank or most))

        def spectrum(name: str, rule: RankRule = rule) -> Sequence[Decomposition]:
            return [_decomposed(name, base, tuned, found, wanted, rule)[1]]

        ranks = ranks_within(wanted.rule, wanted.dtype, {name: partial(spectrum, name) for name in shapes}, [])
        if all(rank < min(rule.max_rank or most, *shapes[name]) for name, rank in ranks.items()):
            return ranks
        if most >= (wanted.rule.max_rank or max(map(max, shapes.values()))):
            return ranks
        most *= 2


def _put_aside(update: LowRank, spool: Spool) -> LowRank:
    """The update with its factors in the spool."""
    return replace(update, up=_spooled(update.up, spool), down=_spooled(update.down, spool))


def _spooled(tensor: LazyTensor, spool: Spool) -> LazyTensor:
    shape, dtype = tensor.shape, tensor.dtype
    offset, row = spool.add(bytes_of(tensor.load(), dtype)), math.prod(shape[1:])

    def raw(start: int, stop: int) -> bytearray:
        return spool.read(offset + start * row * dtype.itemsize, (stop - start) * row * dtype.itemsize)

    return LazyTensor(shape, dtype, lambda a, b: numbers_of(raw(a, b), dtype).reshape(b - a, *shape[1:]), raw)


def _dropped(names: Sequence[str], changes: Sequence[FactorChange], base: Checkpoint, tuned: Checkpoint) -> float:
    """The share of Σ‖W' − W‖² over all that changed that stands in tensors that are left out."""
    lost = math.fsum(squared_norm(name, base, tuned) for name in names)
    lost += math.fsum(each.norm**2 for each in changes if not each.rank)
    whole = lost + math.fsum(each.norm**2 for each in changes if each.rank)
    return lost / whole if whole else 0.0


def _with_floor(result: FactorResult) -> FactorResult:
    """The result with the floor and the retained share of all updates together."""
    known = [each for each in result.weights if each.floor is not None]
    floor = math.hypot(*((each.floor or 0.0) * each.norm for each in known))
    squares = [(each.energy or 0.0) * each.norm**2 for each in known]  # of what was written
    kept = math.fsum((each.retained or 0.0) * square for each, square in zip(known, squares, strict=True))
    whole = math.fsum(squares)
    if not whole:
        return result
    return replace(result, floor=floor / result.norm if result.norm else None, retained=kept / whole)
