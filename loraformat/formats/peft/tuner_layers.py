"""The layers of an adapter whose tuner is one of the table in `tuners`."""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.budget import Budget
from loraformat.errors import FormatError
from loraformat.formats.kit.base import Hints
from loraformat.formats.peft.config.fields import PeftConfig
from loraformat.formats.peft.keys import Sorted
from loraformat.formats.peft.layers import Built, read_rows
from loraformat.formats.peft.tuners import Source, Tuner
from loraformat.model.tensors import LazyTensor

Parts = Mapping[str, LazyTensor]

_ROOT = "base_model."
_ROWS = {"token_adapter.trainable_tokens_delta": "rows", "trainable_tokens_delta": "rows"}


def part_names(tuner: Tuner) -> dict[str, str]:
    """End of a tensor's name → what it is called here, as `keys.sort` takes them."""
    return {**{name: name for name in tuner.parts}, **_ROWS}


def split_shared(entries: Parts, tuner: Tuner) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """(tensors that belong to all modules, all others); the first stand right under `base_model.`."""
    shared: dict[str, LazyTensor] = {}
    others: dict[str, LazyTensor] = {}
    for name, tensor in entries.items():
        bare = name.removeprefix(_ROOT)
        if bare != name and _known_as(bare, tuner.shared) is not None:
            shared[bare] = tensor
        else:
            others[name] = tensor
    return shared, others


def _known_as(name: str, expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """A tensor's own name, or how the names of its family begin; None for a name that is not expected."""
    family = f"{name.partition('.')[0]}."
    return name if name in expected else family if family in expected else None


def read_tuned(tuner: Tuner, found: Sorted, shared: Parts, config: PeftConfig, hints: Hints) -> Built:
    """All adapter layers of a file. Parts of a module that lacks others become no update and stay unclaimed.

    Raises:
        FormatError (LF012): a tensor has another number of axes than its name promises, or does not fit the others.
        UnsupportedUpdate (LF013): a variant that is not read, or a shape that only the base tells and no base.
    """
    built = Built()
    layers = {
        module: {part: tensor for part, tensor in parts.items() if part in tuner.parts}
        for module, parts in found.modules.items()
    }
    for parts in (*layers.values(), shared):
        _check_axes(parts, {**tuner.parts, **tuner.shared}, tuner.empty)
    source = Source(
        raw=config.raw, shared=shared, layers=layers, weights=hints.weights, budget=hints.budget or Budget()
    )
    if tuner.check is not None:
        tuner.check(source)
    for module, parts in found.modules.items():
        claimed = read_rows(module, parts, config, built)
        chains = tuner.read(source, module, layers[module]) if layers[module] else {}
        built.others.update(chains)
        if chains:
            claimed |= layers[module].keys()
        built.unclaimed += [found.names[module, part] for part in parts if part not in claimed]
    return built


def _check_axes(parts: Parts, expected: Mapping[str, tuple[int, ...]], empty: tuple[str, ...]) -> None:
    for name, tensor in parts.items():
        known = _known_as(name, expected) or name
        counts = expected[known]
        if counts and len(tensor.shape) not in counts:
            wanted = " or ".join(str(count) for count in counts)
            raise FormatError(f"{name}: expected {wanted} axes, found shape {tensor.shape}")
        if not tensor.numel and known not in empty:
            raise FormatError(f"{name}: the tensor is empty: shape {tensor.shape}")
