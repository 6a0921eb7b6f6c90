"""Directions as files: vectors in `.safetensors`, `.pt` or `.npy`, and the difference of the means of activations."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraformat.algebra.weights.difference import matrix_of
from loraformat.containers import open_tensors
from loraformat.diagnostics import in_weights, show
from loraformat.errors import NonFiniteValue, ShapeMismatch, UnsupportedUpdate, UsageError
from loraformat.model.tensors import LazyTensor, row_blocks
from loraformat.storage import Location, open_store, uri_of

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_LONE = "tensor"
_BLOCK_NBYTES = 8 << 20
# Of directions in one file: more than any model has features.
_MOST_VALUES = 1 << 26


def directions_of(vectors: Sequence[Location], pairs: Sequence[tuple[Location, Location]]) -> Floats:
    """All directions as rows: those of files, and the differences of means of pairs of files.

    Raises: UsageError (LF021): there is none, or a file has several tensors. ShapeMismatch (LF302): their lengths
        differ. NonFiniteValue (LF402); UnsupportedUpdate (LF013): a tensor that is not a vector. ContainerError.
    """
    import numpy as np

    if not vectors and not pairs:
        raise UsageError("no direction given", where="ablate", hint="use --direction FILE or --direction-from A B")
    found: list[tuple[str, Floats]] = [(uri_of(each), _vectors(uri_of(each))) for each in vectors]
    for one, other in pairs:
        first, second = uri_of(one), uri_of(other)
        means = _mean(first), _mean(second)
        if means[0].shape != means[1].shape:
            text = f"activations of {means[0].size} features, but of {means[1].size} in {second}"
            raise ShapeMismatch(text, where=first)
        found.append((f"{first} − {second}", (means[0] - means[1])[None]))
    length = found[0][1].shape[1]
    for name, rows in found:
        if rows.shape[1] != length:
            text = f"a direction of {rows.shape[1]} features, but the one of {found[0][0]} has {length}"
            raise ShapeMismatch(text, where=name)
        if not np.isfinite(rows).all():
            raise NonFiniteValue("the direction holds NaN or infinity", where=name)
        if not (np.abs(rows).max(axis=1) > 0).all():
            raise UsageError("the direction is zero", where=name, hint="a direction must not be zero")
        if len(rows) > length:
            raise UsageError(f"{len(rows)} directions of {length} features span the whole space", where=name)
    every = np.concatenate([rows for _, rows in found])
    # Squares of the largest and the smallest numbers would leave the range of float64.
    scaled: Floats = every / np.abs(every).max(axis=1)[:, None]
    return scaled


def _vectors(argument: str) -> Floats:
    """The directions of a file as rows."""
    tensor, name = _tensor(argument)
    if tensor.numel > _MOST_VALUES:
        raise UsageError(f"{tensor.numel} values are not a direction", where=argument, hint=_AVERAGED)
    shape = tensor.shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    if not 1 <= len(shape) <= 2 or not all(shape):
        raise UnsupportedUpdate(
            f"shape {list(tensor.shape)}: expected a vector (features), or vectors as rows (directions, features)",
            where=in_weights(name, file=argument),
        )
    return matrix_of(tensor.load().reshape(-1, shape[-1]))


_AVERAGED = "use --direction-from A B for the difference of the means of two files of activations"


def _mean(argument: str) -> Floats:
    """The mean of activations over all axes but the last."""
    import numpy as np

    tensor, name = _tensor(argument)
    if len(tensor.shape) < 1 or not tensor.numel:
        text = f"shape {list(tensor.shape)}: expected activations (samples, features)"
        raise UnsupportedUpdate(text, where=in_weights(name, file=argument))
    features = tensor.shape[-1]
    if len(tensor.shape) == 1:
        only: Floats = matrix_of(tensor.load()[None])[0]
        return only
    total = np.zeros(features)
    for start, stop in row_blocks(tensor.shape, 8, _BLOCK_NBYTES):
        rows = tensor.read(start, stop).reshape(-1, features).astype(np.float64)
        if not np.isfinite(rows).all():
            raise NonFiniteValue("an activation is NaN or infinite", where=in_weights(name, file=argument))
        total += rows.sum(axis=0)
    mean: Floats = total / math.prod(tensor.shape[:-1])
    return mean


def _tensor(argument: str) -> tuple[LazyTensor, str]:
    """(tensor, name) of FILE or FILE:TENSOR; a path that exists is taken as it is."""
    path, wanted = argument, ""
    if not os.path.exists(argument) and ":" in argument:
        head, _, tail = argument.rpartition(":")
        if os.path.exists(head) and tail:
            path, wanted = head, tail
    store = open_store(path)
    if not store.is_single_file:
        raise UsageError("a folder: expected one file", where=path, hint="pass FILE or FILE:TENSOR")
    entries = open_tensors(store, next(iter(store.files())), lone=_LONE).entries
    names = ", ".join(show(name, 60) for name in sorted(entries)[:6])
    if wanted and wanted not in entries:
        raise UsageError(f"there is no tensor {show(wanted, 100)}", where=path, hint=f"it holds {names}")
    if not wanted and len(entries) != 1:
        text = f"{len(entries)} tensors, expected one"
        raise UsageError(text, where=path, hint=f"choose one with FILE:TENSOR; it holds {names}" if names else "")
    name = wanted or next(iter(entries))
    if not entries[name].dtype.is_floating:
        text = f"dtype {entries[name].dtype.torch_name}: expected floating-point numbers"
        raise UnsupportedUpdate(text, where=in_weights(name, file=path))
    return entries[name], name
