"""torchtune's own file, which may lie beside an export of it to PEFT.

Source: torchtune 0.6.1, training/checkpointing/_checkpointer.py `save_checkpoint`; models/convert_weights.py.
"""

from __future__ import annotations

import re

from loraformat.formats.kit.pairs.spelling import Spelling, clean
from loraformat.model.bundle import Bundle, TensorFile

_FILE = re.compile(r"adapter_(model|\d{1,6})\.pt")
SPELLING = (Spelling(".lora_a.weight", ".lora_b.weight"),)
MODULE = re.compile(r"layers\.(\d{1,9})\.(attn\.(?:q_proj|k_proj|v_proj|output_proj)|mlp\.w[123])")


def own_file(bundle: Bundle) -> TensorFile | None:
    """The file whose factors have the names of torchtune's modules: by its name, or the only one."""
    files = [file for file in bundle.tensor_files() if bundle.is_single_file or _FILE.fullmatch(file.name)]
    return next((file for file in files if _is_own(file)), None)


def _is_own(file: TensorFile) -> bool:
    """By the names alone: every PEFT adapter in one file is asked."""
    ends = (SPELLING[0].a, SPELLING[0].b)
    names = (clean(name) for name in file.open().entries if name.endswith(ends))
    return any(MODULE.fullmatch(name.rpartition(".lora_")[0]) for name in names)
