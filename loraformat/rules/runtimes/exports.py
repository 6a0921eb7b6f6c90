"""Family 2, fourth part: known faults of programs that export adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loraformat.diagnostics import Severity
from loraformat.errors import LoraFormatError
from loraformat.model.adapter import module_of
from loraformat.model.updates import LowRank
from loraformat.rules.base import Hit, Subject, first_of, rule

_TORCHTUNE_FILE = re.compile(r"adapter(_model|_[0-9]{1,9})\.pt")
_TORCHTUNE_NAME = re.compile(r"layers\.[0-9]{1,9}\.attn\.[qk]_proj\.(lora_[ab]\.weight|magnitude)")
# Models whose q and k torchtune really keeps interleaved, by `model_type`.
# Source: torchtune 0.6.1, models/convert_weights.py `hf_to_tune`; models/qwen2/_convert_weights.py has no permutation.
_INTERLEAVED = frozenset({"llama", "mistral", "gemma"})


@rule("LF243", Severity.ERROR, since="0.1.0", forgivable=True)
def torchtune_export(subject: Subject) -> Iterator[Hit]:
    """Torchtune exported the adapter to PEFT, but its export has the right order of rows in q and k only for Llama.

    ## Why it matters
    For every model the export reorders the rows of q_proj and k_proj from an interleaved order. Qwen's were never
    interleaved, so their rows are now in the wrong order: the shapes are the same, and the model is silently worse.
    DoRA magnitudes are not reordered for any model.

    ## Example
    torchtune's `adapter_model.safetensors` next to `adapter_model.pt`, for a Qwen2 base, read with `--from peft`.

    ## What to do
    Leave `--from peft` out and pass the base: then `adapter_model.pt` is read, whose row order is known for every base
    that torchtune trains. For a Llama, Mistral or Gemma base the export is right too, if it has no magnitudes.

    ## Source
    torchtune 0.6.1, models/convert_weights.py `tune_to_peft_adapter_weights`.
    """
    assert subject.adapter is not None
    own = _torchtune_file(subject) if subject.format == "peft" else None
    turned = sorted(
        name for name in subject.adapter.updates if module_of(name).rpartition(".")[2] in ("q_proj", "k_proj")
    )
    if own is None or not turned:
        return
    kind = None if subject.base is None else subject.base.config.get("model_type")
    chain = subject.adapter.updates[turned[0]]
    has_magnitudes = any(isinstance(update, LowRank) and update.magnitude is not None for update in chain)
    if kind in _INTERLEAVED and not has_magnitudes:
        return
    of_base = "no base is given" if kind is None else f"the base is {kind}"
    what = "magnitudes and rows are in different orders" if has_magnitudes else "rows may be in the wrong order"
    yield Hit(first_of(turned), f"exported by torchtune ({own} is next to it), and {of_base}: {what}")


def _torchtune_file(subject: Subject) -> str | None:
    """The file beside the adapter that holds torchtune's own names."""
    for file in subject.bundle.tensor_files():
        if _TORCHTUNE_FILE.fullmatch(file.name):
            try:
                names = file.open().entries
            except LoraFormatError:
                continue
            if any(_TORCHTUNE_NAME.fullmatch(name) for name in names):
                return file.name
    return None
