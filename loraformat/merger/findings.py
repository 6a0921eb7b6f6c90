"""What a merge has to say beyond the rules (LF8); each function's docstring is its page."""

from __future__ import annotations

from collections.abc import Sequence

from loraformat.diagnostics import Severity
from loraformat.formats.findings import Said, kind, listed


@kind("LF802", Severity.INFO)
def left_out(base: str, names: Sequence[str]) -> Said:
    """Something of the base folder was not copied: its weights in another form, or a subfolder.

    ## Why is this bad?
    Mostly it is not. Had weights in another form been copied, a loader that prefers them would have loaded the
    un-merged model without a word. What lies in subfolders is not looked into, and is missing if something needs it.

    ## Example
    A base with `model.safetensors` and `pytorch_model.bin`: the first is merged and written, the second is left out.

    ## Use instead
    To merge into the other form, give that file as the base. Copy the subfolders that you need.

    ## Source
    loraformat's own law: nothing is dropped in silence.
    """
    return base, f"not copied, un-merged weights and subfolders: {listed(list(names))}"
