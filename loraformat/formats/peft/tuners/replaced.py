"""Layer norm tuning and trainable tokens: what was trained replaces what was there.

Source: peft 0.21.2, tuners/ln_tuning/layer.py `merge`; tuners/trainable_tokens/layer.py `merge`.
"""

from __future__ import annotations

from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner
from loraformat.model.updates import Replace


def _norms(_source: Source, module: str, parts: Parts) -> Chains:
    # PEFT trains a copy of the module, so a tied partner keeps its own.
    return {
        f"{module}.{part.rpartition('.')[2]}": (Replace(tensor, follows_tie=False),) for part, tensor in parts.items()
    }


LN_TUNING = Tuner(parts={"ln_tuning_layers.weight": (), "ln_tuning_layers.bias": ()}, read=_norms)

# Rows are read by the same code as those of a LoRA adapter (formats/peft/layers.py).
TRAINABLE_TOKENS = Tuner(
    parts={},
    read=lambda _source, _module, _parts: {},
    settings=("init_weights", "token_indices"),
)
