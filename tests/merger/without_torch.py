"""Merges of every kind of update in a process that may lack PyTorch: without_torch.py BASE OUT JOBS MEMORY BLOCKED."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loraformat.containers import open_checkpoint
from loraformat.merger import (
    AdapterSource,
    Arithmetic,
    Inputs,
    Resources,
    as_written,
    plan_merge,
    write_others,
    write_weights,
)
from loraformat.merger.verify import check_output
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.tensors import DType, LazyTensor, bytes_of, rounded
from loraformat.model.updates import (
    BiasFromWeight,
    BlockAffine,
    Dense,
    ElementwiseScale,
    FRoD,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    SubtractedInit,
    Update,
    WeightNetwork,
)
from loraformat.storage import stage

EMBED, BIAS, CONV = "model.embed_tokens.weight", "model.layers.1.up_proj.bias", "model.conv.weight"
Q, UP, DOWN = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight", "model.layers.0.down_proj.weight"


class NoTorch:
    """A finder of modules for which PyTorch is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        del path, target
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name="torch")


def some(*shape: int, seed: int = 0, scale: float = 1.0) -> LazyTensor:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape) * scale
    return LazyTensor.of(values.astype(np.float32))


def stored(*shape: int) -> LazyTensor:
    """The 16-bit patterns that a file stores."""
    values = rounded(some(*shape).load(), DType.BF16)
    return LazyTensor(
        shape, DType.BF16, lambda a, b: values[a:b], lambda a, b: bytearray(bytes_of(values[a:b], DType.BF16))
    )


def low_rank(rows: int, cols: int, **more: Any) -> LowRank:
    return LowRank(some(rows, 3, scale=0.1), some(3, cols, seed=1, scale=0.1), 0.5, **more)


def dora(rows: int, cols: int, axis: int = 1) -> LowRank:
    length = rows if axis else cols
    vector = LazyTensor.of((np.random.default_rng(length).random(length) + 3).astype(np.float32))
    return low_rank(rows, cols, magnitude=Magnitude(vector, axis), is_embedding=not axis)


SETTINGS: Mapping[str, dict[str, Any]] = {
    "stochastic": {"arithmetic": Arithmetic(rounding="stochastic", seed=5)},
    "float16": {"dtype": DType.F16},
    "torch-files": {"container": "torch"},
}
KINDS: Mapping[str, Mapping[str, tuple[Update, ...]]] = {
    "dora": {Q: (dora(24, 24),), UP: (low_rank(130, 24), dora(130, 24)), EMBED: (dora(70, 24, axis=0),)},
    "loha": {
        UP: (Hadamard(some(130, 3), some(3, 24), some(130, 2), some(2, 24), 0.01),),
        DOWN: (Hadamard(some(24, 3), some(3, 130), some(24, 2), some(2, 130), 0.01),),
    },
    "lokr": {UP: (Kronecker((some(10, 4),), (some(13, 2), some(2, 6)), 0.1),)},
    "conv": {CONV: (low_rank(8, 45, kernel=(3, 3)),)},
    "replaced": {EMBED: (Replace(stored(70, 24)),), Q: (Replace(some(24, 24)),), BIAS: (Replace(some(130)),)},
    "resized": {EMBED: (Rows((3, *range(70, 90), 1), some(22, 24)),)},
    "stochastic": {Q: (low_rank(24, 24),), UP: (dora(130, 24),), EMBED: (Replace(some(70, 24)),)},
    "float16": {Q: (low_rank(24, 24),), DOWN: (Dense(some(24, 130), 0.1),)},
    "torch-files": {Q: (low_rank(24, 24),)},
    "multiplied": {
        Q: (Scaled(some(24), some(24, seed=1)), Rotated(some(4, 6, 6), "right"), low_rank(24, 24)),
        UP: (
            Rotated(some(13, 10, 10), "left", order=tuple(reversed(range(130)))),
            ElementwiseScale(some(130, 2), some(2, 24)),
        ),
        DOWN: (Multiplied(some(130, 2), some(2, 130)), Rotated(some(1, 12, 12), "left", is_shared=True)),
        BIAS: (Scaled(some(130), is_bias=True),),
    },
    "of-the-base": {
        Q: (SubtractedInit("pissa", 3, None, (24, 24)), low_rank(24, 24)),
        UP: (SubtractedInit("olora", 3, 0.5, (130, 24)), FRoD(some(24, 24), some(24, 24, seed=2))),
        DOWN: (
            BlockAffine(some(12, 2, 2)),
            WeightNetwork(some(24, 5), some(5, 24), 0.1, "gelu", (some(5, 5),), (some(5, 5, seed=3),)),
        ),
        BIAS: (BiasFromWeight(UP, some(24), 130),),
    },
}


def merge(base: str, out: Path, kind: str, limits: Resources) -> None:
    """One merge, compared in full with the reference."""
    updates = dict(sorted(KINDS[kind].items()))
    adapters = [Adapter(config=AdapterConfig(), updates=updates)]
    checkpoint = as_written(open_checkpoint(base), adapters)
    plan = plan_merge(checkpoint, adapters, [AdapterSource("memory", "none")], **SETTINGS.get(kind, {}))
    inputs = Inputs(base=checkpoint, adapters=adapters)
    with stage(str(out / kind), overwrite=False, inputs=[base]) as output:
        write_others(plan, inputs, output)
        written = write_weights(plan, inputs, output, limits)
        check_output(plan, inputs, output, full=True, digests=written.digests)


def main(base: str, out: str, jobs: str, memory: str, blocked: str) -> None:
    if blocked == "yes":
        sys.meta_path.insert(0, NoTorch())
    Path(out).mkdir()
    for kind in KINDS:
        merge(base, Path(out), kind, Resources(jobs=int(jobs), memory_nbytes=int(memory)))
    print("torch" in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
