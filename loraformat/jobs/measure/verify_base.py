"""Compares the copied tensors of a merge with the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loraformat.containers import weight_of
from loraformat.diagnostics import Finding
from loraformat.engine import open_engine
from loraformat.matching import replicated
from loraformat.merger.plan.findings import output_changed
from loraformat.model.checkpoint import BaseWeight, Checkpoint, StoredTensor
from loraformat.model.tensors import bytes_of, row_blocks
from loraformat.storage import Store

_BLOCK_NBYTES = 4 << 20


def tensors_unlike_base(
    output: Store,
    tensors: Mapping[str, StoredTensor],
    copied: Sequence[str],
    base: Checkpoint,
    layers: Sequence[int] | None = None,
    names: Mapping[str, str] | None = None,
    *,
    jobs: int = 1,
) -> Iterator[Finding]:
    """LF804 for each copied tensor whose bytes are not the base's, or that the base does not have.

    Args:
        tensors: all of the output.
        copied: names of those that were copied.
        names: where the merge renamed weights: name in the output → name in the base.
        layers: where the merge replicated layers: the base's layer that each of the output's copies.
    """
    checkpoint = replicated(base, None if layers is None else tuple(layers))

    def fault(name: str) -> str:
        source = checkpoint.as_stored.weights.get((names or {}).get(name, name))
        written = weight_of(output, name, tensors[name])
        if source is None:
            return "the base has no such tensor"
        if (source.dtype, source.shape) != (written.dtype, written.shape):
            found = f"{written.dtype.safetensors} {list(written.shape)}"
            return f"it is {found}, but in the base {source.dtype.safetensors} {list(source.shape)}"
        return "" if _are_equal(source, written) else "the values differ from the base"

    for name, message in zip(copied, open_engine(jobs).map(fault, copied), strict=True):
        if message:
            yield output_changed(name, message)


def _are_equal(one: BaseWeight, other: BaseWeight) -> bool:
    are_raw = one.is_copyable and other.is_copyable
    for start, stop in row_blocks(one.shape, one.dtype.itemsize, _BLOCK_NBYTES):
        if are_raw:
            is_same = one.raw(start, stop) == other.raw(start, stop)
        else:
            is_same = bytes_of(one.read(start, stop), one.dtype) == bytes_of(other.read(start, stop), other.dtype)
        if not is_same:
            return False
    return True
