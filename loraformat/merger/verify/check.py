"""The output read back before it is moved into place, and compared with the reference and with the base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from loraformat.containers import checkpoint_of_store, open_weights, read_rows
from loraformat.engine import open_engine
from loraformat.errors import MergeError
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Arithmetic, MergePlan, ShardPlan
from loraformat.merger.verify.compare import compare_rows
from loraformat.merger.verify.reference import (
    Computed,
    Expected,
    Reference,
    check_described,
    check_plan,
    reference_of,
)
from loraformat.merger.verify.safetensors_library import check_with_library
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.results.verbs import Checked
from loraformat.model.tensors import bytes_of, row_blocks
from loraformat.storage import Store, digest_of_range

# A sample: so many tensors at most, and of each so many rows; few tensors where a row needs a whole matrix.
_SAMPLES, _COSTLY_SAMPLES = 256, 16
_SAMPLE_ROWS = 3
_COPIES = 32
_COPY_NBYTES = 1 << 20
# Rows that are compared at a time stay in the cache of a processor through all that numpy does with them.
_CACHE_NBYTES = 1 << 20
_TASK_NBYTES = 32 << 20

_Task = Callable[[], None]


def check_output(
    plan: MergePlan,
    inputs: Inputs,
    output: Store,
    *,
    full: bool,
    digests: Mapping[str, str] | None = None,
    jobs: int = 1,
    reads_copies: bool = True,
) -> Checked:
    """Compare the weight files of an output with an independent reference, in blocks, by `jobs` threads.

    Which tensors change, and by which rows of which updates, is compared for all of them. Computed values may differ
    from the reference by what rounding to the output's dtype does; copied ones must be equal. A sample is some rows of
    some tensors, the same at every run.

    Args:
        full: every value; and every safetensors file is read with the safetensors library too.
        digests: of computed tensors as they were written; compared with what is read where `full`.
        reads_copies: whether values of copies are compared; a store that copies under a condition proves them itself.

    Raises: MergeError (LF801): something differs; ContainerError: a file cannot be read.
    """
    reference = reference_of(plan, inputs)
    known = check_plan(plan, reference)
    changed = {name: reference.tensors[name] for name in sorted(known) if not reference.tensors[name].is_copy}
    copied = [name for name in sorted(known) if reference.tensors[name].is_copy]
    chosen = changed if full else {name: changed[name] for name in _sampled(changed, reference, inputs)}
    copies = (
        {name: reference.tensors[name] for name in _spread(copied, len(copied) if full else _COPIES)}
        if reads_copies
        else {}
    )
    compared = _Compared(reference, chosen, copies, full=full)
    weights = {shard.target: open_weights(output, [shard.target])[1] for shard in plan.shards}
    files = {name: file for file, tensors in weights.items() for name in tensors}
    checks = _checks(plan, inputs, output, compared, digests or {}, weights)
    checks = chain(checks, _recoded_checks(compared, inputs, output))
    for _ in open_engine(jobs).map(lambda task: task(), checks):
        pass
    check_described(plan, inputs, output, reference, files)
    names = {name for shard in plan.shards for name in (*(one.name for one in shard.tensors), *shard.aliases)}
    names -= {part.name for edit in plan.edits for part in edit.parts}
    return Checked(
        changed=len(changed) + len(names - known),
        followed=len(changed),
        compared=len(chosen),
        copied=len(copied),
        copies_compared=len(copies),
        unscaled=reference.unscaled,
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """What is compared: tensors that change, and copies, in full or in part."""

    reference: Reference
    changed: Mapping[str, Expected]
    copies: Mapping[str, Expected]
    full: bool


def _spread(names: Sequence[str], count: int) -> Sequence[str]:
    return names[:: max(1, -(-len(names) // max(1, count)))]


def _sampled(changed: Mapping[str, Expected], reference: Reference, inputs: Inputs) -> Iterator[str]:
    """As many tensors as a sample has, from first to last; few of those of which a row needs a whole matrix."""
    costly = [name for name, expected in changed.items() if Computed(expected, reference, inputs).needs_all_rows]
    yield from _spread(costly, _COSTLY_SAMPLES)
    yield from _spread([name for name in changed if name not in set(costly)], _SAMPLES)


def _checks(
    plan: MergePlan,
    inputs: Inputs,
    output: Store,
    compared: _Compared,
    digests: Mapping[str, str],
    weights: Mapping[str, Mapping[str, StoredTensor]],
) -> Iterator[_Task]:
    for shard in plan.shards:
        tensors = weights[shard.target]
        _check_header(shard, tensors)
        if compared.full and shard.container == "safetensors":
            yield lambda shard=shard, tensors=tensors: check_with_library(output, shard, tensors)  # type: ignore[misc]
        for name, stored in tensors.items():
            if compared.full and name in digests:
                yield _hash_check(output, stored, digests[name], name)
            if name in compared.reference.recoded:
                continue  # codes under the name of their weight: `_recoded_checks`
            if name in compared.changed:
                computed = Computed(compared.changed[name], compared.reference, inputs)
                yield from _value_checks(computed, output, stored, plan.arithmetic, full=compared.full)
            elif name in compared.copies:
                yield from _copy_checks(compared.copies[name], inputs, output, stored, full=compared.full)


def _recoded_checks(compared: _Compared, inputs: Inputs, output: Store) -> Iterator[_Task]:
    names = sorted(compared.reference.recoded & compared.changed.keys())
    if not names:
        return
    from loraformat.merger.verify.recoded import recoded_checks

    written = checkpoint_of_store(output, output.uri).quantized
    for name in names:
        if written is None or name not in written.weights:
            raise MergeError(f"{name}: it is not quantized in the output", where=output.uri)
        computed = Computed(compared.changed[name], compared.reference, inputs)
        yield from recoded_checks(computed, written, None if compared.full else _some_rows(computed))


def _check_header(shard: ShardPlan, tensors: Mapping[str, StoredTensor]) -> None:
    found = {name: (tensor.dtype.safetensors, tensor.shape) for name, tensor in tensors.items()}
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    wanted |= {alias: wanted[name] for alias, name in shard.aliases.items()}
    if found != wanted:
        name = next(name for name in (*wanted, *found) if wanted.get(name) != found.get(name))
        raise MergeError(f"{name}: found {found.get(name)}, planned {wanted.get(name)}", where=shard.target)


def _hash_check(output: Store, stored: StoredTensor, digest: str, name: str) -> _Task:
    def check() -> None:
        if stored.strides is None and digest_of_range(output, stored.file, *stored.span) != digest:
            raise MergeError(
                f"{name}: the bytes in the file differ from those that were written",
                where=stored.file,
                hint="the disk or the memory of this machine may be faulty",
            )

    return check


def _value_checks(
    computed: Computed, output: Store, stored: StoredTensor, arithmetic: Arithmetic, *, full: bool
) -> Iterator[_Task]:
    unit, (rows, cols) = computed.unit, computed.expected.matrix
    height = max(1, _CACHE_NBYTES // (8 * max(1, cols)) // unit) * unit

    def check(start: int, stop: int) -> None:
        for low in range(start, stop, height):
            compare_rows(computed, output, stored, (low, min(low + height, stop)), arithmetic)

    def check_some() -> None:
        for start in _some_rows(computed):
            check(start, min(start + unit, rows))

    if not full:
        yield check_some
        return
    step = max(1, _TASK_NBYTES // (8 * max(1, cols)) // height) * height
    for start in range(0, rows, step):
        yield lambda start=start: check(start, min(start + step, rows))  # type: ignore[misc]


def _some_rows(computed: Computed) -> list[int]:
    """The first rows of the units that the tensor's name picks: in one of its updates each, where it has any."""
    expected, rows = computed.expected, computed.expected.matrix[0]
    spans = [(share.run.at, share.run.count) for share in expected.shares] or [(0, rows)]
    picked = set()
    for number in range(_SAMPLE_ROWS if rows else 0):
        digest = hashlib.sha256(f"{number} {expected.name}".encode()).digest()
        which, where = (int.from_bytes(digest[half : half + 8], "little") for half in (0, 8))
        at, count = spans[which % len(spans)]
        picked.add(min(at + where % max(1, count), rows - 1) // computed.unit * computed.unit)
    return sorted(picked)


def _copy_checks(one: Expected, inputs: Inputs, output: Store, stored: StoredTensor, *, full: bool) -> Iterator[_Task]:
    if one.source.strides is not None or stored.strides is not None:
        yield lambda: _compare_views(one, inputs, output, stored, full=full)
        return
    nbytes = stored.span.nbytes if full else min(stored.span.nbytes, _COPY_NBYTES)
    for start in range(0, nbytes, _TASK_NBYTES):
        yield lambda start=start: _compare_bytes(one, inputs, output, stored, start, min(start + _TASK_NBYTES, nbytes))  # type: ignore[misc]


def _compare_bytes(one: Expected, inputs: Inputs, output: Store, stored: StoredTensor, start: int, stop: int) -> None:
    source = one.source
    for low in range(start, stop, _COPY_NBYTES):
        nbytes = min(_COPY_NBYTES, stop - low)
        before = inputs.store.read(source.file, source.span.offset + low, nbytes)
        if output.read(stored.file, stored.span.offset + low, nbytes) != before:
            raise _differs(one.name, stored)


def _compare_views(one: Expected, inputs: Inputs, output: Store, stored: StoredTensor, *, full: bool) -> None:
    """Rows of a tensor that is not stored in the order of its elements in one of the files."""
    blocks = list(row_blocks(one.source.shape, one.source.dtype.itemsize, _COPY_NBYTES))
    for start, stop in blocks if full else blocks[:1]:
        before, after = (
            read_rows(store, tensor, start, stop) for store, tensor in ((inputs.store, one.source), (output, stored))
        )
        if bytes_of(before, one.source.dtype) != bytes_of(after, stored.dtype):
            raise _differs(one.name, stored)


def _differs(name: str, stored: StoredTensor) -> MergeError:
    return MergeError(f"{name}: the copy differs from the base", where=stored.file)
