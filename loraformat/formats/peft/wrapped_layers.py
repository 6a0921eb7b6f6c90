"""Layers inside wrapped layers: parameters of stacked experts (`target_parameters`) and MultiheadAttention.

Source: peft 0.21.2, tuners/lora/layer.py `ParamWrapper`, `MultiheadAttention`; utils/save_and_load.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from loraformat.diagnostics import FindingLocation, in_file, in_weights
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats.peft.config.fields import PeftConfig
from loraformat.formats.peft.keys import CONFIG, Sorted
from loraformat.formats.peft.patterns import Ends
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_WRAPPED = ".base_layer"

# In which order modules register their stacked parameters: PEFT wraps the first one innermost.
# Source: transformers 5.23.0, `*Experts.__init__` of models/*/modeling_*.py.
_REGISTERED = ("gate_up_proj", "up_proj", "down_proj")

# PEFT adds the update of out_proj twice, in training and in its merge.
# Source: peft 0.15.0 to 0.21.2, tuners/lora/layer.py `MultiheadAttention.merge`; peft pull request 3774.
_OUT_PROJ_TIMES = 2.0


class Nested(NamedTuple):
    """What a module path of the file means.

    Attributes:
        weight: the base weight.
        scaled_as: the name by which `rank_pattern` and `alpha_pattern` know it.
        is_parameter: whether it is one of `target_parameters`.
        times: how often PEFT adds the update.
    """

    weight: str
    scaled_as: str
    is_parameter: bool = False
    times: float = 1.0


def nested_layers(
    found: Sorted, config: PeftConfig, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Nested]:
    """Module path as in the file → what it means, for all that are not plain layers.

    Args:
        shapes: of the base's tensors, which tell several parameters of one module apart.

    Raises: UnsupportedUpdate (LF013): a wrapped layer whose parameter neither name nor shape tells.
    """
    layers: dict[str, Nested] = {}
    for path in found.modules:
        if path.endswith(f"{_WRAPPED}.out_proj"):
            outer = path.removesuffix(f"{_WRAPPED}.out_proj")
            layers[path] = Nested(f"{outer}.out_proj.weight", f"{outer}.out_proj", times=_OUT_PROJ_TIMES)
            layers[outer] = Nested(f"{outer}.in_proj_weight", outer)
    targets = _Targets(config)
    for path in [path for path in found.modules if path not in layers] if config.parameters else ():
        parameter = _parameter(path, targets, found.modules, shapes or {})
        if parameter is not None and any(parameter == other.weight for other in layers.values()):
            raise UnsupportedUpdate(f"two adapter layers of one module fit {parameter}", where=in_weights(path))
        if parameter is not None:
            layers[path] = Nested(parameter, parameter, is_parameter=True)
    for path in found.modules:
        if _WRAPPED in path and path not in layers and f"{_WRAPPED}." in f"{path}.":
            raise UnsupportedUpdate("an adapter layer inside an unknown wrapped layer", where=in_weights(path))
    return layers


class _Targets:
    """`target_parameters` and `target_modules`, ready for lookup."""

    def __init__(self, config: PeftConfig) -> None:
        self._owned: dict[str, list[str]] = {}
        for target in config.parameters:
            owner, _, name = target.rpartition(".")
            self._owned.setdefault(owner, []).append(name)
        self._owners = Ends(owner for owner in self._owned if owner)
        self._modules = Ends(config.targets if isinstance(config.targets, tuple) else ())

    def parameters_of(self, module: str, *, is_stack: bool) -> list[str]:
        """Names of the parameters of a module that are targeted.

        A target without a module means the parameter of that name wherever it is; which modules have one the file does
        not say, so it counts only for stacks of experts, and for them only where no target names them.
        """
        owned = [name for owner in self._owners.of(module) for name in self._owned[owner]]
        return list(dict.fromkeys(owned or (self._owned.get("", []) if is_stack else [])))

    def has_module(self, module: str) -> bool:
        """Whether the module itself is targeted, by a name."""
        return bool(self._modules.of(module))


def _parameter(
    path: str,
    targets: _Targets,
    paths: Mapping[str, Mapping[str, LazyTensor]],
    shapes: Mapping[str, tuple[int, ...]],
) -> str | None:
    """The parameter that a module path stands for: its depth in wrappers says which of those that are targeted."""
    module = path
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    depth = (len(path) - len(module)) // len(_WRAPPED)
    is_stack = module.rpartition(".")[2] == "experts" or module + _WRAPPED in paths
    names = targets.parameters_of(module, is_stack=is_stack)
    if not names or (depth == 0 and targets.has_module(module)):
        return None
    if len(names) > 1 and not set(names) <= set(_REGISTERED):
        fitting = [name for name in names if _fits(paths[path], shapes.get(f"{module}.{name}", ()))]
        if len(fitting) == 1:
            return f"{module}.{fitting[0]}"
        raise UnsupportedUpdate(
            f"several parameters of one module are targeted, and the order of {', '.join(sorted(names))} "
            "in it is unknown",
            where=in_weights(module),
            hint="" if shapes else "pass --base to tell them apart by their shapes",
        )
    ordered = sorted(names, key=lambda name: -_REGISTERED.index(name) if len(names) > 1 else 0)
    if depth >= len(ordered):
        raise ConfigError(f"target_parameters does not explain {path}", where=in_file(CONFIG, "target_parameters"))
    return f"{module}.{ordered[depth]}"


def _fits(parts: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> bool:
    """Whether the factors of a parameter are those of one of this shape, as it is stored or transposed."""
    if not {"A", "B"} <= parts.keys() or len(shape) not in (2, 3):
        return False
    sizes = (parts["B"].shape[0], parts["A"].shape[-1])
    count = shape[0] if len(shape) == 3 else 1
    return shape[-2:] in (sizes, sizes[::-1]) and parts["A"].shape[0] % count == 0


def stacked(a: LazyTensor, b: LazyTensor, rank: int, scale: float | None, recent: Recent) -> LowRank:
    """The update of a parameter: a matrix, or a stack of one for each expert.

    Args:
        a: (experts · rank, in), the experts one after the other.
        b: (out, rank · experts), the ranks one after the other.
        rank: as the config has it; the number of experts follows from it.
        recent: keeps the last factors in memory, since each expert needs a part of every row of `b`.

    Factors of other shapes are kept as they are, for the rules to judge.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] in (0, rank) or a.shape[0] % rank:
        return LowRank(b, a, scale)
    experts = a.shape[0] // rank
    if b.shape[1] != a.shape[0]:
        return LowRank(b, a, scale)
    rows, cols = b.shape[0], a.shape[1]

    def up(start: int, stop: int) -> Values:
        stack: Values = recent.load(b).reshape(rows, rank, experts)[:, :, start:stop].transpose(2, 0, 1)
        return stack

    def down(start: int, stop: int) -> Values:
        return a.read(start * rank, stop * rank).reshape(stop - start, rank, cols)

    return LowRank(
        LazyTensor((experts, rows, rank), b.dtype, up), LazyTensor((experts, rank, cols), a.dtype, down), scale
    )


@dataclass(slots=True)
class Recent:
    """The values of the tensors that were loaded last, so that one is not read again for each of its parts."""

    count: int = 4
    _values: OrderedDict[int, Values] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def load(self, lazy: LazyTensor) -> Values:
        """The values of `lazy`, which must live as long as this object."""
        with self._lock:
            value = self._values.pop(id(lazy), None)
            if value is None:
                value = lazy.load()
            self._values[id(lazy)] = value
            while len(self._values) > self.count:
                self._values.popitem(last=False)
            return value


def check_layout(layer: LowRank, version: str | None, where: FindingLocation) -> None:
    """Refuse square experts of the one version that turned them the other way round.

    Raises: UnsupportedUpdate (LF013).

    Source: peft 0.19.0 and 0.19.1, tuners/lora/layer.py `ParamWrapper`.
    """
    if layer.is_stack and layer.shape[1] == layer.shape[2] and version == "0.19.0":
        raise UnsupportedUpdate(
            "square experts trained with PEFT 0.19.0, which swapped their inputs and outputs, are not supported",
            where=where,
        )


def transposes_square_experts(version: str | None) -> bool | None:
    """Whether the factors of a square parameter give its transpose as it is stored, in the PEFT that trained them.

    PEFT up to 0.18 took every stack for (experts, in, out); None for "as the architecture has it".

    Source: peft 0.17.0, 0.18.1, 0.21.2, tuners/lora/layer.py `ParamWrapper.get_delta_weight`.
    """
    numbers = (version or "").split(".")[:2]
    return True if numbers in (["0", "17"], ["0", "18"]) else None
