"""Which tensors of two models differ, and what to do with those that do not become LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from loraformat.algebra.weights.difference import Difference, matrix_of
from loraformat.diagnostics import counted, listed, show
from loraformat.engine import open_engine
from loraformat.errors import MergeError, UnsupportedUpdate, UsageError
from loraformat.jobs.algebra.selection import chosen_of, matching
from loraformat.jobs.weights.models import Layout, layout_of, refuse_others
from loraformat.matching import is_linear, is_vocabulary, nearest, ties_of
from loraformat.model.adapter import module_of
from loraformat.model.checkpoint import BaseWeight, Checkpoint
from loraformat.model.tensors import LazyTensor, has_equal_values, row_blocks
from loraformat.model.updates import Replace, Update

RESTS = ("refuse", "save", "drop")
# What transformers computes and releases before 4.31 stored: a mask, what is written under it, and frequencies.
_MASK, _UNDER_MASK, _FREQUENCIES = ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"
_BLOCK_NBYTES = 4 << 20

Progress: TypeAlias = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """How two models differ.

    Attributes:
        layers: weight → how it is adapted: those that become LoRA.
        rest: other tensors that changed, or that only the tuned model has; a tied table once.
        dropped: those that the caller left out.
        unchanged: how many tensors are equal in both.
    """

    layers: Mapping[str, Layout]
    rest: tuple[str, ...]
    dropped: tuple[str, ...]
    unchanged: int


def changed(
    base: Checkpoint, tuned: Checkpoint, select: Sequence[str], drop: Sequence[str], jobs: int, advance: Progress
) -> Changed:
    """Compare two models tensor by tensor.

    Args:
        select: patterns of the weights that become LoRA; all linear layers and convolutions where there are none.
        drop: patterns of what is left out.
        advance: called with the bytes of each tensor that is equal.

    Raises: MergeError (LF801): the tuned model lacks tensors of the base, or has other names. UsageError (LF021): a
        pattern matches nothing. UnsupportedUpdate (LF013): it matches only what no adapter changes.
    """
    names = _names_of(base, tuned)
    common = [name for name in names if name in base.tensors]

    def is_equal(name: str) -> bool:
        return is_unchanged(base.weights[name], tuned.weights[name])

    equal = set()
    for name, same in zip(common, open_engine(jobs).map(is_equal, common), strict=True):
        if same:
            equal.add(name)
            advance(nbytes_of(tuned.weights[name]))
    differing = [name for name in names if name not in equal]
    layouts = {
        name: layout
        for name in common
        if (layout := layout_of(name, base.tensors[name].shape, base.config)) is not None and _is_matrix(name, base)
    }
    for pattern in select:
        if not matching(pattern, tuple(layouts)):
            refuse_others(pattern, base, "--select")
    selected = chosen_of(tuple(layouts), select, (), "the base") if select else tuple(filter(is_linear, layouts))
    kept = set(chosen_of(tuple(names), (), drop, "the models"))
    layers = {
        name: layouts[name]
        for name in sorted(selected)
        if name in differing and name in kept and base.tensors[name].shape == tuned.tensors[name].shape
    }
    return Changed(
        layers=layers,
        rest=tuple(sorted(name for name in differing if name in kept and name not in layers)),
        dropped=tuple(sorted(name for name in differing if name not in kept)),
        unchanged=len(equal),
    )


def is_unchanged(before: BaseWeight, after: BaseWeight) -> bool:
    """Whether a weight has the values of the base, rounded to its own dtype where that is another.

    Saving in another dtype, or with a base that is quantized in one of the two, does not make a change of a weight.
    """
    if before.dtype is after.dtype or not (before.dtype.is_floating and after.dtype.is_floating):
        return has_equal_values(before, after)
    cast = LazyTensor(before.shape, before.dtype, before.read).to(after.dtype)
    return has_equal_values(cast, after)


def _is_matrix(name: str, base: Checkpoint) -> bool:
    return base.tensors[name].dtype.is_floating


def _names_of(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """The tensors of the tuned model that are compared: a tied table once, and buffers where both models store them.

    Raises: MergeError (LF801).
    """
    one = {name for name in base.tensors if name in tuned.tensors or not _is_buffer(name, base)}
    other = {name for name in tuned.tensors if name in base.tensors or not _is_buffer(name, tuned)}
    copies = set()
    for each in (base, tuned):
        for tie in ties_of(each):
            copies |= {name for name in tie.names if name != tie.stored and _is_copy(name, tie.stored, tuned)}
    one -= copies
    missing = sorted(one - other)
    if missing:
        if not one & other:
            near = nearest(missing[0], sorted(other))
            known = f"; it has {', '.join(near[:3])}" if near else ""
            text = f"no tensor has its name from the base, first {show(missing[0], 200)}{known}"
        else:
            verb = "is" if len(missing) == 1 else "are"
            text = f"{counted(len(missing), 'tensor')} of the base {verb} missing: {listed(missing)}"
        raise MergeError(
            text, where=tuned.uri, hint="is this a fine-tuned version of that base, saved with the same names?"
        )
    return sorted(other - copies)


def _is_buffer(name: str, model: Checkpoint) -> bool:
    """Whether a tensor is a causal mask or what else some checkpoints store and others do not; no bias of a layer."""
    tensor = model.tensors[name]
    if name.endswith(_MASK):
        return len(tensor.shape) > 2 or not tensor.dtype.is_floating
    return name.endswith(_FREQUENCIES) or (name.endswith(_UNDER_MASK) and not tensor.shape)


def _is_copy(name: str, stored: str, tuned: Checkpoint) -> bool:
    """Whether a name of a tied table says nothing beside the one that it is tied to."""
    if name not in tuned.tensors:
        return True
    return stored in tuned.tensors and has_equal_values(tuned.weights[name], tuned.weights[stored])


def handle_rest(rest: Sequence[str], how: str) -> None:
    """Raises: UsageError (LF021): something changed that does not become LoRA, and nobody said what to do with it."""
    if not rest or how != "refuse":
        return
    hint = "use --rest save to keep their new values in the adapter, --rest drop to leave them out"
    if any(map(is_vocabulary, rest)):
        hint += ", or --select to adapt a table with LoRA"
    text = f"{counted(len(rest), 'tensor')} changed but would not be part of the LoRA: {listed(rest, 6)}"
    raise UsageError(text, where="--rest", hint=hint)


def saved(rest: Sequence[str], base: Checkpoint, tuned: Checkpoint, layers: Iterable[str]) -> dict[str, Update]:
    """The new values of what changed beside the layers, as an adapter carries them.

    A bias of a layer whose weight is not saved is a trained bias; a table that is tied to another follows the tie; any
    other module is saved as a whole, with those of its tensors that did not change.

    Raises: UnsupportedUpdate (LF013): a tensor that does not hold real numbers.
    """
    ties = [tie for each in (base, tuned) for tie in ties_of(each)]
    # A head that went its own way in the tuned model is a copy of its own, and so is the table that it left.
    tied = {name for tie in ties if all(_is_copy(one, tie.stored, tuned) for one in tie.names) for name in tie.names}
    wholes = {module_of(name) for name in rest if not _is_bias_of_layer(name, rest, layers, tuned) and name not in tied}
    found: dict[str, Update] = {}
    for name in tuned.tensors:
        if name not in rest and module_of(name) not in wholes:
            continue
        weight = tuned.weights[name]
        if not weight.dtype.is_floating:
            text = f"{name} changed and has the dtype {weight.dtype.safetensors}, which an adapter cannot hold"
            raise UnsupportedUpdate(text, where="--rest save", hint="use --drop to leave it out")
        found[name] = Replace(lazy_of(weight), follows_tie=module_of(name) not in wholes)
    return found


def vocabulary_of(kept: Mapping[str, Update], base: Checkpoint) -> int | None:
    """How many rows tables of tokens among the new values have, where the base has another number; None elsewhere."""
    for name, update in kept.items():
        if is_vocabulary(name) and name in base.tensors and isinstance(update, Replace):
            rows = update.value.shape[0]
            if rows != base.tensors[name].shape[0]:
                return rows
    return None


def _is_bias_of_layer(name: str, rest: Sequence[str], layers: Iterable[str], tuned: Checkpoint) -> bool:
    weight = f"{module_of(name)}.weight"
    if not name.endswith(".bias") or weight in rest or weight not in tuned.tensors:
        return False
    return weight in layers or len(tuned.tensors[weight].shape) > 1


def lazy_of(weight: BaseWeight) -> LazyTensor:
    """A weight of a model as a tensor of an adapter."""
    return LazyTensor(weight.shape, weight.dtype, weight.read, weight.raw if weight.is_copyable else None)


def nbytes_of(weight: BaseWeight) -> int:
    """Bytes of all values."""
    return math.prod(weight.shape) * weight.dtype.itemsize


def squared_norm(name: str, base: Checkpoint, tuned: Checkpoint) -> float:
    """Σ (W' − W)² of a tensor; of rows that the base lacks Σ W'², and of a tensor that has another shape, too."""
    import numpy as np

    after = tuned.weights[name]
    before = base.weights[name] if name in base.tensors else None
    if before is None or before.shape[1:] != after.shape[1:] or not after.shape:
        before = None
    squares = []
    for start, stop in row_blocks(after.shape, 8, _BLOCK_NBYTES):
        rows = matrix_of(np.atleast_1d(after.read(start, stop)))
        end = start if before is None else max(start, min(stop, before.shape[0]))
        if before is not None and end > start:
            rows[: end - start] -= matrix_of(before.read(start, end))
        squares.append(float(np.square(rows).sum()))
    return math.fsum(squares)


def difference_of(name: str, base: Checkpoint, tuned: Checkpoint) -> Difference:
    """W' − W of a weight that both have in one shape."""
    return Difference(base.weights[name], tuned.weights[name])
