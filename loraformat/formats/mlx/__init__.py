"""MLX-LM, old mlx-vlm, and the adapters.npz of mlx-examples."""

from __future__ import annotations

from loraformat.formats.kit.base import Match
from loraformat.formats.kit.fields import readable
from loraformat.formats.mlx.config import ARRAYS, CONFIG, WEIGHTS, looks_like_mlx
from loraformat.formats.mlx.read import read
from loraformat.formats.mlx.write import losses, write
from loraformat.model.bundle import Bundle

NAME = "mlx"
TITLE = "MLX-LM: adapters.safetensors and adapter_config.json; older adapters.npz; old mlx-vlm"
SPEC = "docs/formats/mlx.md"
WRITES = True
CONTAINERS: tuple[str, ...] = ("safetensors",)
READS: tuple[str, ...] = ("linear", "embedding", "dora")
HOLDS: tuple[str, ...] = ("linear", "embedding", "dora")
LOSES = "one rank and one scale for all: smaller ranks are padded, other scales folded into lora_b"

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """By the names of the weight files; a config alone by the fields that only MLX has."""
    name = next((name for name in (WEIGHTS, ARRAYS) if name in bundle.files), None)
    if name:
        return Match(certain=True, reason=f"{name} is present")
    if looks_like_mlx(readable(bundle, CONFIG)):
        return Match(certain=True, reason=f"{CONFIG} has MLX's fields and no peft_type")
    return None
