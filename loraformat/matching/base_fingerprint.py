"""The fingerprint of a base as a short text: names, shapes, and some values of every weight.

It does not depend on how the base is stored: shards, container, order of keys and a wider dtype of the same values give
the same text. Of every weight with floating values up to eight whole rows are hashed, so a base of 2 GB costs some
megabytes to read, and a change of any weight that reaches every row is seen.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.diagnostics import counted, show
from loraformat.matching.ties import ties_of
from loraformat.model.checkpoint import BaseWeight, Checkpoint
from loraformat.model.tensors import DType, rounded

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_GROUPS = 64
_ROWS = 8
_MOST_ELEMENTS = 65_536
_VERSION = "lf1"
_TEXT = re.compile(
    rf"{_VERSION}:([\w.-]{{1,60}}):([0-9a-f]{{16}}):([0-9a-f]{{32}}):([0-9a-f]{{32}}):([0-9a-f]{{32}}):((?:[0-9a-f]{{8}}){{1,{_GROUPS}}})"
)
_DENSE = "dense"
# Buffers that some checkpoints store and others do not; they say nothing about training.
_BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass(frozen=True, slots=True)
class BaseFingerprint:
    """What a stamp says about a base.

    Attributes:
        scheme: "dense", or the quantization scheme of which the decoded values were taken.
        names: hash of all names and shapes.
        values: hash of the values of all weights, whatever they are called.
        bfloat16, float16: the same of the values rounded to these dtypes.
        groups: hashes of the values of up to 64 runs of weights in the order of their names.
    """

    scheme: str
    names: str
    values: str
    bfloat16: str
    float16: str
    groups: tuple[str, ...]

    @property
    def text(self) -> str:
        """As it is written into adapters."""
        return ":".join(
            (_VERSION, self.scheme, self.names, self.values, self.bfloat16, self.float16, "".join(self.groups))
        )


def parse(text: str) -> BaseFingerprint | None:
    """The fingerprint that a text spells; None for a text of another version or another tool.

    >>> parse("sha256:0123") is None
    True
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    scheme, names, values, bfloat16, float16, runs = found.groups()
    groups = tuple(runs[at : at + 8] for at in range(0, len(runs), 8))
    return BaseFingerprint(scheme, names, values, bfloat16, float16, groups)


def fingerprint_of(base: Checkpoint) -> BaseFingerprint:
    """The fingerprint of a base.

    >>> import loraformat
    >>> base = loraformat.open_checkpoint("fixtures/minigpt/base")
    >>> parse(fingerprint_of(base).text) == fingerprint_of(base)
    True

    Raises: StorageError, ContainerError: a weight cannot be read.
    """
    weights = _weights(base)
    digests = {name: _digests(weight) for name, weight in weights.items()}
    shapes = [f"{name} {'x'.join(map(str, weights[name].shape))}" for name in digests]
    exact = [f"{name} {one}" for name, (one, *_) in digests.items()]
    together = [_hash(sorted(several), 16) for several in zip(*digests.values(), strict=True)] or [_hash([], 16)] * 3
    values, bfloat16, float16 = together
    return BaseFingerprint(
        _DENSE if base.quantized is None else re.sub(r"[^\w.-]", "-", base.quantized.scheme)[:60],
        _hash(shapes, 8),
        values,
        bfloat16,
        float16,
        tuple(_hash(exact[start:stop], 4) for start, stop in _runs(len(exact))),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a base compares with the one that an adapter was stamped with.

    Attributes:
        is_other: whether it is another base; else the same one in another form.
        message: in words.
    """

    is_other: bool
    message: str


def compare(stamped: BaseFingerprint, base: Checkpoint) -> Verdict | None:
    """None where `base` is what the adapter was stamped with."""
    found = fingerprint_of(base)
    if found == stamped:
        return None
    has_names = found.names == stamped.names
    if found.values == stamped.values and found.scheme == stamped.scheme:
        text = "this is the base that the adapter was trained on, with other tensor names"
        return Verdict(is_other=False, message=text)
    if found.scheme != stamped.scheme and has_names:
        text = f"the adapter was trained on this base with {_form(stamped)}; here it has {_form(found)}"
        return Verdict(is_other=False, message=text)
    if has_names and (found.bfloat16 == stamped.bfloat16 or found.float16 == stamped.float16):
        text = "this is the base that the adapter was trained on, rounded to another dtype"
        return Verdict(is_other=False, message=text)
    if has_names and len(found.groups) == len(stamped.groups):
        return Verdict(is_other=True, message=_differences(stamped, found, sorted(_weights(base))))
    return Verdict(is_other=True, message="the adapter was trained on another base: names or shapes differ")


def _form(one: BaseFingerprint) -> str:
    return "dense weights" if one.scheme == _DENSE else f"weights quantized by {show(one.scheme, 60)}"


def _differences(stamped: BaseFingerprint, found: BaseFingerprint, names: list[str]) -> str:
    runs = _runs(len(names))
    pairs = zip(runs, found.groups, stamped.groups, strict=True)
    differing = [run for run, one, other in pairs if one != other]
    if not differing:  # the same hashes of every group, and another hash of them all: the text was changed
        return "the adapter's fingerprint of its base contradicts itself: stamp it again"
    start, stop = differing[0]
    first = show(names[start], 120)
    if len(runs) == len(names):
        count = f"{len(differing)} of {counted(len(names), 'weight')}"
        return f"the adapter was trained on another base: {count} differ, first {first}"
    count = f"{len(differing)} of {len(runs)} groups of weights"
    return f"the adapter was trained on another base: {count} differ, first {first} to {show(names[stop - 1], 120)}"


def _runs(count: int) -> list[tuple[int, int]]:
    """(start, stop) of up to 64 groups of the sorted weights, of as equal length as can be."""
    groups = max(1, min(_GROUPS, count))
    return [(count * number // groups, count * (number + 1) // groups) for number in range(groups)]


def _weights(base: Checkpoint) -> dict[str, BaseWeight]:
    """The weights with floating values by canonical name, sorted: one table that has two names counts once."""
    tied: dict[str, str] = {}
    for tie in ties_of(base):
        tied.update(dict.fromkeys(tie.names, min(tie.names)))
    found: dict[str, BaseWeight] = {}
    for name in sorted(base.weights):
        weight = base.weights[name]
        if weight.dtype.is_floating and all(weight.shape) and not name.endswith(_BUFFERS):
            found.setdefault(tied.get(name, name), weight)
    return dict(sorted(found.items()))


def _digests(weight: BaseWeight) -> tuple[str, str, str]:
    """Hashes of the shape and of chosen values: as they are, and rounded to bfloat16 and to float16."""
    import numpy as np

    hashes = [hashlib.blake2b(repr(weight.shape).encode(), digest_size=16) for _ in range(3)]
    for values in _chosen(weight):
        # Adding zero makes -0 to 0; every float dtype fits into float64 exactly. NaN carries nothing.
        wide = np.where(np.isnan(values), np.nan, values.astype(np.float64)) + 0.0
        forms = (wide, rounded(wide, DType.BF16), rounded(wide, DType.F16))
        for one, form, stored in zip(hashes, forms, ("<f8", "<f4", "<f4"), strict=True):
            one.update(np.ascontiguousarray(form.astype(stored) + 0.0, stored).data)
    exact, bfloat16, float16 = (one.hexdigest() for one in hashes)
    return exact, bfloat16, float16


def _chosen(weight: BaseWeight) -> Iterator[Values]:
    """Rows at equal distances, the first and the last among them, by the shape alone."""
    if len(weight.shape) < 2:
        yield weight.read(0, min(weight.rows, _MOST_ELEMENTS))
        return
    matrix = weight.as_matrix(2) if len(weight.shape) == 3 else weight
    width = math.prod(matrix.shape[1:])
    count = min(matrix.rows, _ROWS, max(1, _MOST_ELEMENTS // max(1, width)))
    for number in range(count):
        row = number * (matrix.rows - 1) // max(1, count - 1)
        yield matrix.read(row, row + 1)


def _hash(lines: list[str], nbytes: int) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=nbytes).hexdigest()
