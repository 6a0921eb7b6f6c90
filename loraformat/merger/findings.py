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


@kind("LF810", Severity.INFO)
def unlike_peft(where: str, what: str) -> Said:
    """The merged weights are what the un-merged model computes, and PEFT's own merge gives others.

    ## Why is this bad?
    It is not. But whoever compares the two checkpoints will find them different, and should know which one is right.

    ## Example
    An adapter with `layer_replication`: PEFT's copies of a layer share their weights, so its merge adds the updates of
    all copies to all of them. Here each copy becomes a layer of its own with its own update.

    ## Use instead
    Nothing to do. Compare with the outputs of the un-merged model.

    ## Source
    peft 0.21.2, tuners/tuners_utils.py `replicate_layers`, `_check_merge_allowed`; tuners/lora/layer.py.
    """
    return where, what


@kind("LF811", Severity.INFO)
def whole_matrices(where: str, count: int, nbytes: int) -> Said:
    """Some base weights are in memory as a whole while they are merged, whatever `--memory` says.

    ## Why is this bad?
    PiSSA, OLoRA and KaSA changed the base before training by a decomposition of each matrix, and OSF replaces a part of
    one. To take the same part off again the whole matrix must be decomposed: that takes several times its size, and
    minutes for large ones. FRoD needs a basis of as many rows and columns as the layer has inputs, and its inverse.

    ## Example
    `"init_lora_weights": "pissa"` on a 4096 × 14336 weight: 224 MiB in float32, and as much again for its factors.

    ## Use instead
    PEFT's own conversion to plain LoRA after training: `save_pretrained(path_initial_model_for_weight_conversion=…)`.

    ## Source
    peft 0.21.2, tuners/lora/layer.py `pissa_init`, `olora_init`; tuners/lora/variants.py `KasaLinearVariant`;
    tuners/osf/layer.py; tuners/frod/layer.py.
    """
    return where, f"{count} weights are decomposed as a whole, the largest matrix of {nbytes >> 20} MiB in float32"


FINDINGS = (left_out, update_lost_to_rounding, output_changed, unlike_peft, whole_matrices)
