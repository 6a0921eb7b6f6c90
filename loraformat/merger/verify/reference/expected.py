"""What the weight files of a merge must hold: every tensor of the output, and the updates that land on its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loraformat.containers import read_rows
from loraformat.containers.quantized import SCHEMES
from loraformat.errors import MergeError
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Arithmetic, MergePlan
from loraformat.merger.verify.reference.layers import stack_of, with_layers
from loraformat.merger.verify.reference.scales import Scales, scale_used
from loraformat.merger.verify.reference.sites import (
    NotFollowed,
    Renaming,
    Run,
    Site,
    Sites,
    is_transposed,
    may_be_absent,
    renaming_of,
)
from loraformat.merger.verify.reference.sources import base_rows, headers
from loraformat.merger.verify.reference.tasks import with_head
from loraformat.merger.verify.reference.ties import Table, follows, joined, stays_one, tables_of
from loraformat.merger.verify.reference.translation import check_translation, is_followed
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType, bytes_of, row_blocks
from loraformat.model.updates import LowRank, Replace, Rows, Update

HINT = "this is a bug in loraformat: please report it"

_BLOCK_NBYTES = 4 << 20
# Two ways to make a factor of alpha and rank round at most once each.
_SAME_SCALE = 1e-9


@dataclass(frozen=True, slots=True)
class Share:
    """One update as it meets one tensor.

    Attributes:
        adapter, weight, index: which update it is.
        is_transposed: whether the tensor is stored as (in, out).
        run: which rows of it go where.
        factor: scale and strength together; strength for kinds that have no scale.
        strength: of its adapter.
        scale: without it.
    """

    adapter: int
    weight: str
    index: int
    update: Update
    is_transposed: bool
    run: Run
    factor: float
    strength: float
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor of the output.

    Attributes:
        origin, source: the base's tensor that it starts from; the name is another for a head that leaves its table.
        dtype, shape: of the output.
        shares: the updates on it, in order; () where only the dtype changes, or nothing.
        axes: how many leading axes make the rows that shares count: 2 for a stack of experts, else 1.
    """

    name: str
    origin: str
    source: StoredTensor
    dtype: DType
    shape: tuple[int, ...]
    shares: tuple[Share, ...] = ()
    axes: int = 1

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of a tensor of the base, `origin`."""
        is_like = self.dtype is self.source.dtype and self.shape == self.source.shape
        return is_like and not self.shares and not self.source.encoded

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, cols); a vector has one column, a scalar one row."""
        return math.prod(self.shape[: self.axes]), math.prod(self.shape[self.axes :])


@dataclass(frozen=True, slots=True)
class Reference:
    """All tensors of an output.

    Attributes:
        tensors: by name.
        sites: where the weights of each adapter stand.
        unfollowed: index of an adapter → why the reference cannot tell where its updates land.
        arithmetic: how the updates of several adapters become one.
        recoded: names of weights that updates land on and that are in codes all the same; their values in `tensors` are
            those before they are put into codes.
        unscaled: how many updates have a factor that no formula gives, and count as the reader has them.
        has_parted: whether names of one table go separate ways.
    """

    tensors: Mapping[str, Expected]
    sites: Sequence[_Home]
    unfollowed: Mapping[int, str]
    unscaled: int
    has_parted: bool
    recoded: frozenset[str]
    arithmetic: Arithmetic


@dataclass(frozen=True, slots=True)
class _Home:
    """Where the weights of one adapter stand in a base."""

    adapter: Adapter
    sites: Sites
    renaming: Renaming
    config: Mapping[str, Json]

    def find(self, weight: str) -> tuple[Site, bool] | None:
        """The place of a weight, and whether it is stored as (in, out)."""
        name = self.renaming(weight)
        site = None if name is None else self.sites.find(name)
        if name is None or site is None:
            return None
        chain = self.adapter.updates.get(weight, ())
        return site, is_transposed(name, chain, site, self.config, self.adapter)


def reference_of(plan: MergePlan, inputs: Inputs) -> Reference:
    """What the output of a merge must be, from the headers of its inputs.

    Args: plan: of which only what the caller asked for is looked at: adapters, strengths, dtype.

    Raises: MergeError (LF801): an update has another factor than the formula of its format gives.
    """
    tensors = dict(headers(inputs))
    for stack in {stack_of(adapter) for adapter in inputs.adapters} - {None}:
        tensors = with_layers(tensors, stack or ())
    if inputs.base.task is not None:
        tensors = with_head(tensors, inputs.base.task.name, inputs.base.config, inputs.adapters)
    homes, unfollowed, tables = _homes(inputs, tensors)
    shares: dict[str, list[Share]] = {}
    unscaled = 0
    for number, home in enumerate(homes):
        if number not in unfollowed:
            source = plan.adapters[number]
            scales = Scales(home.adapter.origin or home.adapter, source, inputs.bundle(number))
            _check_origin(home.adapter, scales)
            for share, is_stated in _shares(number, home, scales, source.strength):
                shares.setdefault(share.run.tensor, []).append(share)
                unscaled += not is_stated
    expected, has_parted = {name: _expected(name, name, (), tensors) for name in tensors}, False
    for table in joined(tables, lambda one, other: _is_one(one, other, inputs, tensors)):
        has_parted = has_parted or _parts(table, shares)
        expected |= {one.name: one for one in _of_table(table, shares, tensors)}
    expected |= {name: _expected(name, name, found, tensors) for name, found in shares.items()}
    expected |= {one.name: one for one in _longer_biases(expected)}
    if plan.files.dtype is not None or plan.quantized is not None:
        expected = {name: replace(one, dtype=_dtype_of(one, plan, inputs)) for name, one in expected.items()}
    recoded: frozenset[str] = frozenset()
    if plan.quantized is not None and not plan.quantized.is_dense:
        expected, recoded = _partly_in_codes(expected, inputs, is_recoded=plan.quantized.is_recoded)
    return Reference(expected, homes, unfollowed, unscaled, has_parted, recoded, plan.arithmetic)


def _dtype_of(one: Expected, plan: MergePlan, inputs: Inputs) -> DType:
    """The dtype in the output: the one that was asked for, else that of the base, or of a dense weight there."""
    is_single = bool(inputs.base.settings) and len(one.shape) < 2  # llama.cpp has all vectors in float32
    if plan.files.dtype is not None and one.dtype.is_floating and not is_single:
        return DType[plan.files.dtype]
    quantized = inputs.base.quantized
    return quantized.weights[one.source.encoded].dtype if quantized is not None and one.source.encoded else one.dtype


def _partly_in_codes(
    expected: Mapping[str, Expected], inputs: Inputs, *, is_recoded: bool
) -> tuple[dict[str, Expected], frozenset[str]]:
    """(tensors of an output in which quantized weights that no update reaches are copied as they are stored, weights
    that are put into codes again).

    Which other weights a runtime loads together with those that become dense is taken from the scheme.
    """
    quantized = inputs.base.quantized
    assert quantized is not None
    coded = {name: one for name, one in expected.items() if one.source.encoded}
    touched = {one.source.encoded for name, one in coded.items() if one.shares or name != one.origin}
    others = frozenset() if is_recoded else SCHEMES[quantized.scheme].together(touched, quantized.weights.keys())
    dense = touched | others
    kept = {part for name, weight in quantized.weights.items() if name not in dense for part in weight.parts}
    if is_recoded:
        from loraformat.containers.quantized.recoding import parts_of

        kept |= {part for name in touched for part in quantized.weights[name].parts} - {
            part for name in touched for part in parts_of(quantized.weights[name])
        }
    copies = {part: quantized.stored.tensors[part] for part in sorted(kept)}
    found = {
        **{name: one for name, one in expected.items() if name not in coded or one.source.encoded in dense},
        **{name: Expected(name, name, stored, stored.dtype, stored.shape) for name, stored in copies.items()},
    }
    if not is_recoded:
        return found, frozenset()
    # Before they are put into codes, values are float32.
    return found | {name: replace(found[name], dtype=DType.F32) for name in touched}, frozenset(touched)


def _homes(inputs: Inputs, tensors: Mapping[str, StoredTensor]) -> tuple[list[_Home], dict[int, str], list[Table]]:
    """(where the weights of each adapter stand, why that cannot be told of some, tables with several names)."""
    homes: list[_Home] = []
    unfollowed: dict[int, str] = {}
    every: list[Table] = []
    for number, adapter in enumerate(inputs.adapters):
        tables = tables_of(tensors, inputs.base.config, adapter.updates)
        sites, renaming = Sites(tensors, inputs.base.config, tables), Renaming()
        try:
            renaming = _renaming(adapter, sites, inputs)
        except NotFollowed as reason:
            unfollowed[number] = str(reason)
        homes.append(_Home(adapter, sites, renaming, inputs.base.config))
        every += tables
    return homes, unfollowed, every


def _renaming(adapter: Adapter, sites: Sites, inputs: Inputs) -> Renaming:
    """The prefix by which names differ; none where an adapter has llama.cpp's names, which are compared with its own.

    Raises: NotFollowed: see `renaming_of`; a weight that the reference knows no name of in llama.cpp.
    """
    if adapter.origin is None:
        return renaming_of(adapter, sites)
    strange = next((weight for weight in adapter.origin.updates if not is_followed(weight)), None)
    if strange is not None:
        raise NotFollowed(f"the independent computation does not know the position of {strange} in llama.cpp")
    check_translation(adapter, inputs.base.settings)
    return Renaming()


def _shares(number: int, home: _Home, scales: Scales, strength: float) -> Iterator[tuple[Share, bool]]:
    """Every update of an adapter on every tensor that it reaches, and whether a formula gave its factor."""
    for weight, chain in home.adapter.updates.items():
        found = home.find(weight)
        if found is None and may_be_absent(chain):
            continue
        if found is None:
            raise MergeError(f"{weight}: the reference finds no tensor that it lands on", where="verify", hint=HINT)
        site, transposed = found
        for index, update in enumerate(chain):
            # The scales of a translated adapter were compared under its own names.
            is_own = home.adapter.origin is None
            factor, is_stated = _factor(weight, update, scales) if is_own else (_as_read(update), True)
            for run in site.runs or _whole(site, update):
                share = Share(number, weight, index, update, transposed, run, factor * strength, strength, factor)
                yield share, is_stated


def _as_read(update: Update) -> float:
    """The factor of an update as the reader has it; 1 for kinds that have none."""
    is_scaled, used = scale_used(update)
    return 1.0 if not is_scaled or used is None else used


def _check_origin(adapter: Adapter, scales: Scales) -> None:
    """Compare the scales of an adapter that was translated with the formula of its format, under its own names."""
    for weight, chain in adapter.origin.updates.items() if adapter.origin is not None else ():
        for update in chain:
            _factor(weight, update, scales)


def _factor(weight: str, update: Update, scales: Scales) -> tuple[float, bool]:
    is_scaled, used = scale_used(update)
    if not is_scaled:
        return 1.0, True
    stated = scales.of(weight, update)
    if used is None:
        raise MergeError(f"{weight}: merged without a scale", where="verify", hint=HINT)
    if stated is not None and not math.isclose(used, stated, rel_tol=_SAME_SCALE):
        raise MergeError(
            f"{weight}: merged with the scale {used:.17g}, and by the formula of its format it is {stated:.17g}",
            where="verify",
            hint=HINT,
        )
    return (used, False) if stated is None else (stated, True)


def _whole(site: Site, update: Update) -> Iterator[Run]:
    """The rows of a weight that is a tensor of its own; for a stack those of each expert."""
    shape = site.shape
    if isinstance(update, LowRank) and update.is_stack and len(shape) == 3:
        yield from (Run(site.tensor, shape[1], at=shape[1] * number, expert=number) for number in range(shape[0]))
        return
    is_one = isinstance(update, LowRank) and not update.kernel and len(shape) == 3
    yield Run(site.tensor, math.prod(shape[: 2 if is_one else 1]))


def _expected(name: str, origin: str, shares: Sequence[Share], tensors: Mapping[str, StoredTensor]) -> Expected:
    source = tensors[origin]
    shape, axes = source.shape, 2 if source.encoded and len(source.shape) == 3 else 1
    for share in shares:
        update = share.update
        if len(shape) == 3 and isinstance(update, LowRank) and not update.kernel:
            axes = 2
        if isinstance(update, Replace):
            shape = update.shape
        elif isinstance(update, Rows):
            shape = (max(shape[0], *(row + 1 for row in update.indices)), *shape[1:])
    if shape[:1] != source.shape[:1]:  # what lands on the whole table lands on all of its new rows
        shares = [replace(share, run=replace(share.run, count=shape[0])) for share in shares]
    return Expected(name, origin, source, source.dtype, shape, tuple(shares), axes)


def _parts(table: Table, shares: Mapping[str, list[Share]]) -> bool:
    """Whether updates reach a table that has several names, and do not follow it."""
    updated = [shares[name] for name in table.names if shares.get(name)]
    return bool(updated) and not stays_one([[share.update for share in several] for several in updated])


def _longer_biases(expected: Mapping[str, Expected]) -> Iterator[Expected]:
    """A bias with a value for each token, as long as the tables are now; new values are zero."""
    grown = {one.source.shape[0]: one.shape[0] for one in expected.values() if one.shape[:1] != one.source.shape[:1]}
    for name, one in expected.items():
        is_bias = name.split(".")[-1] == "final_logits_bias" and len(one.shape) == 2 and one.shape[0] == 1
        if is_bias and one.shape[1] in grown:
            yield replace(one, shape=(1, grown[one.shape[1]]), axes=2)


def _of_table(table: Table, shares: dict[str, list[Share]], tensors: Mapping[str, StoredTensor]) -> Iterator[Expected]:
    """The names of a table that updates reach: together while all follow it, else each for itself.

    A name that leaves takes with it what the others are replaced by, where that follows the table.

    Args: shares: of every tensor; those of the table are taken out.
    """
    found = {name: shares.pop(name, []) for name in table.names}
    updated = [several for several in found.values() if several]
    if not updated:
        return
    if stays_one([[share.update for share in several] for several in updated]):
        for name in table.names:
            if name in tensors:
                yield _expected(name, name, updated[0], tensors)
        return
    for name, own in found.items():
        others = [share for other, several in found.items() if other != name for share in several]
        has_values = any(isinstance(share.update, (Replace, Rows)) for share in own)
        every = own if has_values else [*(share for share in others if follows(share.update)), *own]
        if every or name not in tensors:
            yield _expected(name, name if name in tensors else table.stored, every, tensors)


def _is_one(stored: str, name: str, inputs: Inputs, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a name of a table has its values: it has no others, or equal ones."""
    one, other = tensors[stored], tensors.get(name)
    if other is None or other == one:  # the same bytes: one storage of a `.pt` file
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    for rows in row_blocks(one.shape, one.dtype.itemsize, _BLOCK_NBYTES):
        if one.encoded or other.encoded:
            if base_rows(inputs, one, *rows).tobytes() != base_rows(inputs, other, *rows).tobytes():
                return False
            continue
        before, after = (bytes_of(read_rows(inputs.store, each, *rows), each.dtype) for each in (one, other))
        if before != after:
            return False
    return True
