"""Finds the state dict among the dicts of a torch file, and the values next to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraformat.containers.torch_file.pickle_subset import Storage, Symbol, View
from loraformat.diagnostics import show
from loraformat.errors import ContainerError, UnsafePickle
from loraformat.model.bundle import Json

DEEPEST_WRAPPER = 3
DEEPEST = 64
MOST_VALUES = 1_000_000

# Keys under which training code keeps the weights, in the order in which one is preferred to the others.
_WRAPPERS = (
    "model_state_dict",
    "state_dict",
    "model_state",
    "model",
    "lora_state_dict",
    "lora_weights",
    "lora",
    "adapter",
    "module",
    "net",
    "weights",
    "params",
)


@dataclass(frozen=True, slots=True)
class StateDict:
    """The tensors of a torch file by name, and the rest; see `model.bundle.Tensors`."""

    tensors: Mapping[str, View]
    wrapper: tuple[str, ...]
    extras: Mapping[str, Json]


def find_state_dict(value: object, where: str) -> StateDict:
    """The dict that holds the tensors: the outermost one, or one under a key or two.

    Of several dicts with tensors, the one under a usual name of a state dict is taken (`model_state_dict`, `model`),
    and a tensor beside it is named in `extras` by its shape, as is one inside an optimizer's state.

    Raises: ContainerError: no dict, tensors in several dicts of which none has a usual name, tensors in lists.
    """
    found = value
    wrapper: list[str] = []
    plain = _Plain(where)
    extras: dict[str, Json] = {}
    while True:
        if type(found) is not dict:
            raise ContainerError(f"expected a dict of tensors, found {_kind(found)}", where=where)
        inner = _wrapped_in(found, where) if len(wrapper) < DEEPEST_WRAPPER else None
        prefix = "".join(f"{key}." for key in wrapper)
        for key, item in found.items():
            if key != inner and not (inner is None and isinstance(item, View)):
                extras[f"{prefix}{key}"] = plain.json(item)
        if inner is None:
            return StateDict(_named(found, where), tuple(wrapper), extras)
        wrapper.append(inner)
        found = found[inner]


def _named(values: dict[object, object], where: str) -> dict[str, View]:
    tensors: dict[str, View] = {}
    for key, value in values.items():
        if isinstance(value, View):
            if not isinstance(key, str):
                raise ContainerError(f"a tensor under the key {key}, which is not a string", where=where)
            tensors[key] = value
    return tensors


def _wrapped_in(values: dict[object, object], where: str) -> str | None:
    """The key under which the tensors are, or None when they are here, or nowhere."""
    here = sum(isinstance(value, View) for value in values.values())
    counter = _Counter()
    inside = {key: counter.count(value, DEEPEST_WRAPPER) for key, value in values.items() if isinstance(key, str)}
    inside = {key: count for key, count in inside.items() if count}
    usual = next((key for key in _WRAPPERS if key in inside), None)
    if usual is not None and inside[usual] > here:
        return usual
    if not inside:
        return None
    if not here and len(inside) == 1:
        return next(iter(inside))
    places = [*(["the outermost level"] if here else []), *(f'"{show(key)}"' for key in sorted(inside))]
    raise ContainerError(
        f"tensors are in several dicts: {', '.join(places[:4])}",
        where=where,
        hint="save only the state dict",
    )


class _Counter:
    """Counts the tensors of dicts; each dict once, however many others hold it."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], int] = {}

    def count(self, value: object, levels: int) -> int:
        """Tensors of a dict, or else of the dicts in it."""
        if type(value) is not dict or not levels:
            return 0
        key = (id(value), levels)  # whoever asks keeps the value alive
        if key not in self._counts:
            here = sum(isinstance(item, View) for item in value.values())
            self._counts[key] = here or sum(self.count(item, levels - 1) for item in value.values())
        return self._counts[key]


class _Plain:
    """Turns values of a pickle into JSON values, with one budget for all of them: shared values multiply."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = MOST_VALUES

    def json(self, value: object, depth: int = 0) -> Json:
        """`value` with tuples as lists and keys as strings; a tensor becomes a text with its type and shape."""
        self._left -= 1
        if self._left < 0 or depth > DEEPEST:
            raise UnsafePickle(
                f"more than {MOST_VALUES} values or {DEEPEST} levels besides the tensors", where=self._where
            )
        if value is None or isinstance(value, (str, int, float)):
            return value
        if isinstance(value, (list, tuple)):
            return [self.json(item, depth + 1) for item in value]
        if isinstance(value, dict):
            found = {str(key): self.json(item, depth + 1) for key, item in value.items()}
            if len(found) != len(value):
                raise UnsafePickle("a dict has one key both as a number and as a string", where=self._where)
            return found
        if isinstance(value, View):
            return f"tensor {value.dtype.safetensors} {list(value.shape)}"
        return show(value, 200) if isinstance(value, Symbol) else _kind(value)


def _kind(value: object) -> str:
    if isinstance(value, View):
        return "one tensor"
    if isinstance(value, Storage):
        return "a storage"
    return f"a {type(value).__name__}"
