"""LoRA variants in adapter_config.json: replicated layers, initializations that change the base, blocks.

Source: peft 0.21.2, tuners/lora/config.py; tuners/lora/variants.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from loraformat.diagnostics import FindingLocation, in_file, in_weights
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats.kit.blocks import block_columns
from loraformat.formats.kit.fields import Config, as_integer, as_object, as_texts
from loraformat.formats.peft.keys import CONFIG
from loraformat.model.bundle import Json
from loraformat.model.tensors import LazyTensor, rounded

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_MAX_LAYERS = 10_000
_MAX_PARTS = 1_000  # each is looked for in each module's name


@dataclass(frozen=True, slots=True)
class Blocks:
    """BD-LoRA: parts of module names whose lora_A or lora_B is block-diagonal, and of how many blocks."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    count: int

    def whole(self, module: str, a: LazyTensor, b: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
        """(a, b) of a module, with zeros between the blocks."""
        name = module.rpartition(".")[2]
        if any(part in name for part in self.a):
            return block_diagonal(a, self.count), b
        if any(part in name for part in self.b):
            return a, block_diagonal(b, self.count)
        return a, b


def block_diagonal(blocks: LazyTensor, count: int) -> LazyTensor:
    """The matrix (rows, cols · count) with `count` blocks on its diagonal, which stand one below the other in `blocks`.

    A tensor that cannot be cut so is kept as it is, for the rules to judge.

    Source: peft 0.21.2, tuners/lora/variants.py `BlockDiagonalLinear`.
    """
    if len(blocks.shape) != 2 or blocks.shape[0] % count or not blocks.numel:
        return blocks
    rows, cols = blocks.shape
    height = rows // count

    def read(start: int, stop: int) -> Values:
        import numpy as np

        values = blocks.read(start, stop)
        whole = np.zeros((stop - start, count, cols), values.dtype)
        numbers = np.arange(start, stop)
        whole[numbers - start, numbers // height] = values
        return whole.reshape(stop - start, count * cols)

    return LazyTensor((rows, cols * count), blocks.dtype, read)


def with_diagonal(a: LazyTensor, diagonal: LazyTensor) -> LazyTensor:
    """KaSA: diag(d) @ A. Tensors that do not fit are kept as they are, for the rules to judge."""
    if len(a.shape) != 2 or diagonal.shape != a.shape[:1]:
        return a

    def read(start: int, stop: int) -> Values:
        import numpy as np

        with np.errstate(invalid="ignore"):
            factors = diagonal.read(start, stop).astype(np.float64)[:, None]
            return rounded(a.read(start, stop).astype(np.float64) * factors, a.dtype)

    return LazyTensor(a.shape, a.dtype, read)


def layers_of(raw: Config) -> tuple[int, ...] | None:
    """`layer_replication` as a list: which layer of the base each layer of the trained stack copies.

    Raises: ConfigError (LF103).
    """
    value, where = raw.get("layer_replication"), in_file(CONFIG, "layer_replication")
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ConfigError("expected a list of pairs", where=where)
    every = (number for pair in value for number in range(*_pair(pair, where)))
    layers = tuple(islice(every, _MAX_LAYERS + 1))
    if not 0 < len(layers) <= _MAX_LAYERS:
        raise ConfigError(f"expected a total of 1 to {_MAX_LAYERS} layers", where=where)
    return layers


def _pair(value: Json, where: FindingLocation) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError("expected pairs of the first layer and the one after the last", where=where)
    start, stop = (as_integer(number, where, 0, _MAX_LAYERS) for number in value)
    return start, stop


def recipe_of(raw: Config) -> str | None:
    """What the initialization took off the base (see `SubtractedInit`), or None."""
    init = raw.get("init_lora_weights")
    if raw.get("kasa_config") is not None:
        return "kasa"
    return init.lower() if isinstance(init, str) and init.lower() in ("pissa", "olora") else None


def blocks_of(raw: Config) -> Blocks | None:
    """`use_bdlora`, or None. Raises: ConfigError (LF103)."""
    value, where = raw.get("use_bdlora"), in_file(CONFIG, "use_bdlora")
    if value is None or value is False:
        return None
    fields = as_object(value, where)
    a, b = (fields.get(name) or [] for name in ("target_modules_bd_a", "target_modules_bd_b"))
    if any(isinstance(names, list) and len(names) > _MAX_PARTS for names in (a, b)):
        raise ConfigError(f"more than {_MAX_PARTS} names", where=where)
    return Blocks(as_texts(a, where), as_texts(b, where), as_integer(fields.get("nblocks", 1), where, 1, 65_536))


def merged_parts(module: str, a: LazyTensor, b: LazyTensor, enabled: tuple[bool, ...]) -> tuple[LazyTensor, LazyTensor]:
    """(a, b) of a joined layer of which some parts are adapted, as one pair with zeros between the parts.

    B is that of a convolution in groups, (rows of all adapted parts, rank, 1); A holds the ranks of all of them.

    Raises: ConfigError (LF103): the shapes are not those of as many parts.

    Source: peft 0.2.0, tuners/lora.py `MergedLinear`, whose convolution always has two groups.
    """
    places = [number for number, is_on in enumerate(enabled) if is_on]
    count = len(places)
    rows, rank, _ = b.shape if len(b.shape) == 3 else (*b.shape[:2], 0)
    if len(a.shape) != 2 or a.shape[0] != rank * count or rows % count:
        raise ConfigError(
            f"A {a.shape} and B {b.shape} do not fit the {count} parts that enable_lora names",
            where=in_weights(module),
        )
    flat, height = b.reshape(rows, rank), rows // count
    blocks = [
        (flat.rows(order * height, (order + 1) * height), [(place * height, (place + 1) * height)])
        for order, place in enumerate(places)
    ]
    return a, block_columns(blocks, height * len(enabled))


def check_groups(module: str, a: LazyTensor, b: LazyTensor) -> None:
    """Refuse the factors of a convolution in groups, whose B has the ranks of one group only.

    Raises: UnsupportedUpdate (LF013).

    Source: peft 0.21.2, tuners/lora/layer.py `_ConvNd.update_layer`.
    """
    if len(a.shape) < 3 or len(b.shape) != len(a.shape) or not b.shape[1]:
        return
    if b.shape[1] != a.shape[0] and a.shape[0] % b.shape[1] == 0:
        groups = a.shape[0] // b.shape[1]
        raise UnsupportedUpdate(
            f"LoRA on a grouped (depthwise) convolution of {groups} groups is not supported", where=in_weights(module)
        )
