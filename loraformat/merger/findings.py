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


@kind("LF803", Severity.WARNING)
def update_lost_to_rounding(base: str, share: float, dtypes: Sequence[str]) -> Said:
    """Less than nine tenths of the adapter's update survived the rounding to the output's dtype.

    ## Why is this bad?
    The update is small against the distance between neighbouring values of the dtype, so many elements are rounded back
    to where they were. The merged model then behaves less like the adapted one than the adapter itself does, and
    nothing else tells. The share is <W' - W, D> / <D, D>, where D is the update before rounding, W the base's weight
    and W' what was written.

    ## Example
    An update of 0.1 % of the weight's norm, merged into bfloat16: about half of it survives.

    ## Use instead
    `--dtype float32` (twice the size, nothing lost), `--dtype float16` (three more bits, if the values fit), or
    `--rounding stochastic` (the whole update survives on average, with noise). Or serve the adapter without merging it.

    ## Source
    Rounding to nearest of IEEE 754; measured for every merge, weight by weight (`--format json`, `data.retention`).
    """
    return (
        base,
        f"{share:.1%} of the update survives the rounding to {listed(list(dtypes))}",
        "--dtype float32 keeps all of it, --rounding stochastic keeps it on average",
    )


@kind("LF804", Severity.ERROR)
def output_changed(where: str, message: str) -> Said:
    """A merged checkpoint is not what its manifest says: a file or a weight is missing, other, or too many.

    ## Why is this bad?
    `loraformat.manifest.json` was written with the checkpoint and names the size and hashes of all its files, and the
    SHA-256 of every weight that was computed. What differs was changed, damaged, or not copied since.

    ## Example
    `loraformat verify merged/` after a download that was cut short.

    ## Use instead
    Copy the files again from where they are whole, or merge again from the inputs that the manifest names.

    ## Source
    loraformat's own manifest.
    """
    return where, message, "copy or merge it again"


FINDINGS = (left_out, update_lost_to_rounding, output_changed)
