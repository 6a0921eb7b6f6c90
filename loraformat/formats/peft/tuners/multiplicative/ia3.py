"""IA3: a factor for each output of a layer, bias included, or for each input of a feed-forward layer.

Source: peft 0.21.2, tuners/ia3/layer.py `Linear.merge`, `_ConvNd.merge`; tuners/ia3/model.py
`_check_target_module_feedforward`.
"""

from __future__ import annotations

from loraformat.diagnostics import in_file, show
from loraformat.errors import ConfigError
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner
from loraformat.model.updates import Scaled


def _read(source: Source, module: str, parts: Parts) -> Chains:
    factors = parts.get("ia3_l")
    if factors is None:
        return {}
    vector = factors.reshape(factors.numel)
    if _is_feedforward(source, module, factors.shape):
        return {f"{module}.weight": (Scaled(None, vector),)}
    return {f"{module}.weight": (Scaled(vector),), f"{module}.bias": (Scaled(vector, is_bias=True),)}


def _is_feedforward(source: Source, module: str, shape: tuple[int, ...]) -> bool:
    """(out, 1) is for outputs, (1, in) for inputs; a convolution has (1, n, 1, …) for both, and the config decides."""
    if len(shape) == 2 and shape[0] != shape[1]:
        return shape[0] == 1
    if source.feedforward is not None:
        matches = source.feedforward.fullmatch(module)
        if matches is None:
            message = f"the pattern is not evaluated for {show(module)}, so the side that it scales is unknown"
            where = in_file(CONFIG, "feedforward_modules")
            raise ConfigError(message, where=where, hint="write full module names")
        return matches
    return bool(source.feedforward_names.of(module))


IA3 = Tuner(
    parts={"ia3_l": (2, 4, 5)},
    read=_read,
    settings=("feedforward_modules", "init_ia3_weights"),
)
