"""estimate: what an adapter would cost, from config.json or from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from loraformat.containers import checkpoint_of_store
from loraformat.containers.bundles import load_json
from loraformat.diagnostics import in_file
from loraformat.errors import ConfigError, MissingFile, UsageError
from loraformat.matching import is_linear, nearest
from loraformat.model.adapter import module_of
from loraformat.model.blueprints import blueprint
from loraformat.model.patterns.keys import is_end_of
from loraformat.model.results.estimates import EstimateResult, MemoryEstimate, TargetEstimate
from loraformat.model.results.weight_figures import module_kind
from loraformat.model.summary import layer_of
from loraformat.report import Report
from loraformat.storage import Location, listed, open_store, uri_of

ALL_LINEAR = "all-linear"
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Mixed precision with Adam, bytes for each trained parameter: Rajbhandari et al. 2020, ZeRO, section 3.1.
_COMPUTED, _GRADIENT, _OPTIMIZER = 2, 2, 12
# NF4 in blocks of 64 whose constants are 8 bits in blocks of 256: Dettmers et al. 2023, QLoRA, section 3.
_QUANTIZED_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def estimate(base: Location, *, rank: int, targets: Sequence[str]) -> Report:
    """Estimate parameters, size and training memory of a LoRA adapter for a base; no values are read.

    >>> import loraformat
    >>> loraformat.estimate("fixtures/minigpt/base", rank=8, targets=["q_proj"]).data.parameters
    2048

    Args:
        base: a config.json, a folder with one, or a checkpoint (its headers win over its config.json).
        rank: at least 1.
        targets: names or ends of module paths as in PEFT's `target_modules`, or "all-linear": every linear layer,
            including those of experts, except the output head and routers. A stack of experts is named by its
            parameter, as in `target_parameters`.

    Raises:
        UsageError (LF021): a target matches nothing.
        ConfigError (LF103): a field of config.json is invalid.
        FormatError (LF012): the weights of this architecture cannot be derived from config.json alone.
        StorageError, ContainerError: the base cannot be read.
    """
    if rank < 1:
        raise UsageError(f"rank: expected at least 1, found {rank}", where="estimate")
    base, targets = uri_of(base), listed(targets, "module names")
    source, weights, parameters = _weights(base)
    chosen = _chosen(weights, targets, base)
    result = _result(source, rank, weights, parameters, chosen)
    return Report(job="estimate", subject=base, data=result)


def parameters_of(name: str, shape: Sequence[int], rank: int) -> int:
    """Parameters of the factors of one weight: rank · (out + in · prod(kernel)), for each expert of a stack."""
    if _is_stack(name, shape):
        return shape[0] * rank * (shape[1] + shape[2])
    return rank * (shape[0] + math.prod(shape[1:]))


def _is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of three axes is a stack of experts: those are parameters of their own, kernels are weights."""
    return len(shape) == 3 and not name.endswith(".weight")


def _weights(base: str) -> tuple[str, Mapping[str, tuple[int, ...]], int]:
    """(source, name → shape, parameters of the base)."""
    store = open_store(base)
    files = store.files()
    only = next(iter(files)) if len(files) == 1 else ""
    if not only.endswith(".json"):
        try:
            checkpoint = checkpoint_of_store(store, base)
        except MissingFile:
            if "config.json" not in files:
                raise
        else:
            shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
            return "headers", shapes, checkpoint.parameters
    name = only or "config.json"
    config = load_json(store, name, files[name])
    if not isinstance(config, dict):
        raise ConfigError("expected an object", where=in_file(name))
    shapes = blueprint(config)
    return "config", shapes, sum(map(math.prod, shapes.values()))


def _chosen(weights: Mapping[str, tuple[int, ...]], targets: Sequence[str], where: str) -> dict[str, tuple[int, ...]]:
    """The weights that targets mean."""
    chosen: dict[str, tuple[int, ...]] = {}
    for target in targets:
        found = {name: shape for name, shape in weights.items() if _is_meant(name, shape, target)}
        if not found:
            kinds = sorted({module_kind(name) for name, shape in weights.items() if _can_be(shape)})
            near = nearest(target, kinds) or kinds[:12]
            raise UsageError(
                f'target "{target}" matches no weight of two or more axes', where=where, hint=f"try {', '.join(near)}"
            )
        chosen |= found
    return dict(sorted(chosen.items()))


def _is_meant(name: str, shape: tuple[int, ...], target: str) -> bool:
    if not _can_be(shape):
        return False
    if target == ALL_LINEAR:
        return len(shape) == 2 and name.endswith(".weight") and is_linear(name)
    path = module_of(name) if name.endswith(".weight") else name
    return is_end_of(target, path)


def _can_be(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2


def _result(
    source: str,
    rank: int,
    weights: Mapping[str, tuple[int, ...]],
    base_parameters: int,
    chosen: Mapping[str, tuple[int, ...]],
) -> EstimateResult:
    costs = {name: parameters_of(name, shape, rank) for name, shape in chosen.items()}
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    by_layer: Counter[int] = Counter()
    for name, shape in chosen.items():
        groups.setdefault((module_kind(name), shape), []).append(costs[name])
        layer = layer_of(name)
        if layer is not None:
            by_layer[layer] += costs[name]
    parameters = sum(costs.values())
    linear = sum(
        math.prod(shape)
        for name, shape in weights.items()
        if (len(shape) == 2 or _is_stack(name, shape)) and is_linear(name)
    )
    return EstimateResult(
        source=source,
        rank=rank,
        base_parameters=base_parameters,
        modules=tuple(
            TargetEstimate(module=module, shape=shape, weights=len(found), parameters=sum(found))
            for (module, shape), found in sorted(groups.items())
        ),
        parameters=parameters,
        parameters_by_layer=dict(sorted(by_layer.items())),
        share=parameters / (base_parameters + parameters),
        nbytes={dtype: parameters * itemsize for dtype, itemsize in _DTYPES.items()},
        memory=_memory(base_parameters, parameters, linear),
    )


def _memory(base: int, adapter: int, linear: int) -> tuple[MemoryEstimate, ...]:
    quantized = math.ceil(linear * _QUANTIZED_BITS / 8) + (base - linear) * _COMPUTED
    held = {"full": base * _COMPUTED, "lora": (base + adapter) * _COMPUTED, "qlora": quantized + adapter * _COMPUTED}
    trained = {"full": base, "lora": adapter, "qlora": adapter}
    return tuple(
        MemoryEstimate(
            method=method,
            weights=nbytes,
            gradients=trained[method] * _GRADIENT,
            optimizer=trained[method] * _OPTIMIZER,
        )
        for method, nbytes in held.items()
    )
