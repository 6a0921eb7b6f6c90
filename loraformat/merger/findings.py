"""What a merge has to say beyond the rules (LF8); each function's docstring is its page."""

from __future__ import annotations

from collections.abc import Sequence

from loraformat.diagnostics import Severity
from loraformat.formats.findings import Said, kind, listed


@kind("LF802", Severity.INFO)
def stale_weights_left_out(base: str, names: Sequence[str]) -> Said:
    """The base folder holds its weights in another form too, and that form was not copied.

    ## Why is this bad?
    It is not: the merged folder has only merged weights. Had the other files been copied, a loader that prefers them
    would have loaded the un-merged model without a word.

    ## Example
    A base with `model.safetensors` and `pytorch_model.bin`: the first is merged and written, the second is left out.

    ## Use instead
    Nothing to do. To merge into the other form, give that file as the base.

    ## Source
    loraformat's own law: nothing is dropped in silence.
    """
    return base, f"not copied, since they hold un-merged weights: {listed(list(names))}"
