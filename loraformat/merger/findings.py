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
    PiSSA, OLoRA and KaSA changed the base before training by a decomposition of each matrix. To take the same part off
    again the whole matrix must be decomposed: that takes several times its size, and minutes for large ones.

    ## Example
    `"init_lora_weights": "pissa"` on a 4096 × 14336 weight: 224 MiB in float32, and as much again for its factors.

    ## Use instead
    PEFT's own conversion to plain LoRA after training: `save_pretrained(path_initial_model_for_weight_conversion=…)`.

    ## Source
    peft 0.21.2, tuners/lora/layer.py `pissa_init`, `olora_init`; tuners/lora/variants.py `KasaLinearVariant`.
    """
    return where, f"{count} weights are decomposed as a whole, the largest of {nbytes >> 20} MiB in float32"


FINDINGS = (stale_weights_left_out, unlike_peft, whole_matrices)
