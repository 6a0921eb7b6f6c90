"""A merge by several processes: each writes its share of the weight files, and one finishes the output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace

from loraformat.diagnostics import Finding
from loraformat.engine import open_engine
from loraformat.merger.compute.windows import Resources
from loraformat.merger.inputs import Inputs
from loraformat.merger.kinds import check_kinds
from loraformat.merger.plan.data import MergePlan, nbytes_of
from loraformat.merger.plan.findings import resumed
from loraformat.merger.write.receipts import Facts, Receipts, facts_of
from loraformat.merger.write.run import (
    Source,
    Trust,
    base_source,
    check_kept,
    complete,
    digests_copies,
    write_described,
)
from loraformat.merger.write.weights import Written, all_of, write_weights
from loraformat.storage import MARKER, OWN_PREFIX, Output


@dataclass(frozen=True, slots=True)
class Share:
    """Which share of the weight files a process writes.

    Attributes:
        rank: from 0.
        world: how many shares there are.
    """

    rank: int
    world: int


def shares_of(plan: MergePlan, world: int) -> tuple[tuple[str, ...], ...]:
    """The weight files of each share; see `divided`."""
    return divided(sizes_of(plan), world)


def sizes_of(plan: MergePlan) -> dict[str, int]:
    """Weight file → bytes of its tensors."""
    return {shard.target: sum(map(nbytes_of, shard.tensors)) for shard in plan.shards}


def divided(sizes: Mapping[str, int], world: int) -> tuple[tuple[str, ...], ...]:
    """Names in `world` shares, each in exactly one; the bytes of all are as equal as whole files allow.

    The largest first, each to the share that has least; more shares than files leave some of them empty.
    """
    filled = min(world, len(sizes))
    files: list[list[str]] = [[] for _ in range(filled)]
    loads = [(0, 0, rank) for rank in range(filled)]  # bytes and files of each share; sorted, so a heap
    for target in sorted(sizes, key=lambda name: (-sizes[name], name)):
        nbytes, count, least = loads[0]
        files[least].append(target)
        heapreplace(loads, (nbytes + sizes[target], count + 1, least))
    return (*(tuple(sorted(one)) for one in files), *[()] * (world - filled))


def facts_of_merge(plan: MergePlan, inputs: Inputs, sources: Sequence[Source], trust: Trust) -> Facts:
    """See `receipts.facts_of`."""
    base, *adapters = [(one.store, one.names) for one in (base_source(plan, inputs), *sources)]
    return facts_of(plan, base, adapters, trust.digests)


def run_share(
    plan: MergePlan,
    inputs: Inputs,
    output: Output,
    limits: Resources,
    trust: Trust,
    share: Share,
    facts: Facts,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    mine: Collection[str] | None = None,
) -> Written:
    """Write one share of the weight files into an output that other processes write too, with a receipt for each.

    Files that receipts prove are not written again.

    Args:
        output: see `storage.join`.
        facts: see `facts_of_merge`.
        announce: called with what was there already, if anything was.
        mine: the weight files of the share; None for those of `shares_of`.

    Raises: as `write_weights`.
    """
    check_kinds(inputs.adapters)
    mine = set(shares_of(plan, share.world)[share.rank] if mine is None else mine)
    part = replace(plan, shards=tuple(shard for shard in plan.shards if shard.target in mine))
    receipts = Receipts(output, facts)
    there = receipts.known(sorted(mine), open_engine(limits.jobs).map, limits.processor)
    if there and announce is not None:
        announce((resumed(sorted(there)),))
    if limits.progress is not None:
        limits.progress(sum(nbytes_of(tensor) for one in part.shards if one.target in there for tensor in one.tensors))
    if len(there) == len(mine):
        return all_of(there.values())
    return write_weights(
        part,
        inputs,
        output,
        limits,
        on_written=lambda target, written: receipts.add(target, written, share.rank, share.world, limits.processor),
        there=there,
        digests=digests_copies(trust, output),
    )


def finish_merge(
    plan: MergePlan,
    inputs: Inputs,
    sources: Sequence[Source],
    output: Output,
    limits: Resources,
    trust: Trust,
    facts: Facts,
    shares: Callable[[int], Sequence[Sequence[str]]] | None = None,
) -> Written:
    """Make an output of which ranks have written all weight files, as `run_merge` would have made it.

    Args:
        output: the unfinished output of all ranks, see `storage.stage`.
        facts: see `facts_of_merge`.
        shares: number of ranks → the weight files of each; None for `shares_of`.

    Raises: MergeError (LF801): a share is missing, of another run, or not what its rank wrote; and as `run_merge`.
    """
    read = open_engine(limits.jobs).map
    receipts = Receipts(output, facts)
    targets = [shard.target for shard in plan.shards]
    entries = receipts.all_of(targets, shares or (lambda world: shares_of(plan, world)))
    for name in output.names():
        if name not in entries and name != MARKER and not name.startswith(OWN_PREFIX):
            output.remove(name)
    written = all_of(entry.written for entry in entries.values())
    check_kept(plan, written, trust)
    runs = write_described(plan, inputs, output)
    output.seal(targets)
    receipts.check_bytes(entries, read)
    if limits.progress is not None:
        limits.progress(sum(nbytes_of(tensor) for shard in plan.shards for tensor in shard.tensors))
    return complete(plan, inputs, sources, output, limits, trust, written, runs)
