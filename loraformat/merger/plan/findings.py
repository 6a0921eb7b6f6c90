"""The findings of a merge (LF8); each function's docstring is its page."""

from __future__ import annotations

from collections.abc import Sequence

from loraformat.diagnostics import Severity, counted, listed, show
from loraformat.formats.kit.findings import Said, Where, kind


@kind("LF802", Severity.INFO)
def left_out(base: Where, names: Sequence[str]) -> Said:
    """Part of the base folder was not copied: weights in another container, a subfolder, a name that is not UTF-8.

    ## Why it matters
    If weights in another container had been copied, a loader that prefers them would have loaded the un-merged model
    without a warning. Subfolders are not searched; if something needs them, they are missing.

    ## Example
    A base with `model.safetensors` and `pytorch_model.bin`: the first is merged and written, the second is left out.

    ## What to do
    To merge into the other container, pass that file as the base. Copy the subfolders that you need.

    ## Source
    loraformat's own principle: nothing is dropped silently.
    """
    return base, f"not copied (un-merged weights, subfolders, names that are not UTF-8): {listed(list(names))}"


CODES = "codes of "  # before the name of a scheme, where others have a dtype


@kind("LF803", Severity.WARNING)
def update_lost_to_rounding(base: Where, share: float, dtypes: Sequence[str]) -> Said:
    """Less than nine tenths of the adapter's update survived rounding to the output's dtype.

    ## Why it matters
    The update is small compared with the distance between neighboring values of the dtype, so many elements round back
    to their old value. The merged model then behaves less like the adapted one than the adapter itself does, and
    nothing else reveals it. The share is <W' - W, D> / <D, D>, where D is the update before rounding, W the base's
    weight and W' the written one.

    ## Example
    An update of 0.1 % of the weight's norm, merged into bfloat16: about half of it survives.

    ## What to do
    Use `--dtype float32` (twice the size, nothing lost), `--dtype float16` (three more bits, if the values fit), or
    `--rounding stochastic` (the whole update survives on average, with noise). Or serve the adapter without merging it.

    ## Source
    Rounding to nearest of IEEE 754; measured for every merge, weight by weight (`--format json`, `data.retention`).
    """
    return (
        base,
        f"{share:.1%} of the update survives rounding to {listed(list(dtypes))}",
        "use --dtype float32 to keep all of it, or --rounding stochastic to keep it on average"
        if not any(dtype.startswith(CODES) for dtype in dtypes)
        else "use --dequantize or --keep-quantized to keep more of it",
    )


@kind("LF804", Severity.ERROR)
def output_changed(where: Where, message: str) -> Said:
    """A merged checkpoint differs from its manifest: a file or weight is missing, changed or added.

    ## Why it matters
    `loraformat.manifest.json` was written with the checkpoint and records the size and hashes of all its files, and the
    SHA-256 of every computed weight. Whatever differs was changed, damaged or lost since then.

    ## Example
    `loraformat verify merged/` after a download that was cut short.

    ## What to do
    Copy the files again from an intact copy, or merge again from the inputs that the manifest names.

    ## Source
    loraformat's own manifest.
    """
    return where, message, "copy or merge it again"


@kind("LF810", Severity.INFO)
def unlike_peft(where: Where, what: str) -> Said:
    """The merged weights are what the un-merged model computes; PEFT's own merge gives different ones.

    ## Why it matters
    Whoever compares the two checkpoints will find differences, and should know which one is right.

    ## Example
    An adapter with `layer_replication`: PEFT's copies of a layer share their weights, so its merge adds the updates of
    all copies to all of them. Here each copy becomes a layer of its own with its own update.

    ## What to do
    Nothing. To check, compare with the outputs of the un-merged model.

    ## Source
    peft 0.21.2, tuners/tuners_utils.py `replicate_layers`, `_check_merge_allowed`; tuners/lora/layer.py.
    """
    return where, what


@kind("LF811", Severity.INFO)
def whole_matrices(where: Where, count: int, nbytes: int) -> Said:
    """Some base weights are held in memory as a whole while they are merged, regardless of `--memory`.

    ## Why it matters
    PiSSA, OLoRA and KaSA changed the base before training by a decomposition of each matrix, and OSF replaces a part of
    one. To subtract the same part again, the whole matrix must be decomposed: that takes several times its size, and
    minutes for large ones. FRoD needs a basis with as many rows and columns as the layer has inputs, and its inverse.

    ## Example
    `"init_lora_weights": "pissa"` on a 4096 × 14336 weight: 224 MiB in float32, and as much again for its factors.

    ## What to do
    Use PEFT's own conversion to plain LoRA after training:
    `save_pretrained(path_initial_model_for_weight_conversion=…)`.

    ## Source
    peft 0.21.2, tuners/lora/layer.py `pissa_init`, `olora_init`; tuners/lora/variants.py `KasaLinearVariant`;
    tuners/osf/layer.py; tuners/frod/layer.py.
    """
    what = counted(count, "weight", "is")
    return where, f"{what} decomposed in one piece, the largest matrix being {nbytes >> 20} MiB in float32"


@kind("LF812", Severity.INFO)
def resumed(names: Sequence[str]) -> Said:
    """With `--resume`, these files of an unfinished output were reused.

    ## Why it matters
    A file is reused if the same merge of the same inputs wrote it and the digests in its journal confirm every byte.
    All others are written again.

    ## Example
    A merge that was killed after three of eight files, and restarted with `--resume`.

    ## What to do
    Nothing. If none of the existing files was reused, another version, other options or other inputs wrote them, or
    their bytes have changed.

    ## Source
    loraformat's own journal.
    """
    if not names:
        return "", "nothing to resume: there is no complete file of an earlier run of this merge"
    return "", f"resumed: {len(names)} complete files of an unfinished output were reused: {listed(list(names))}"


@kind("LF813", Severity.INFO)
def unfinished_cleared(where: Where, nbytes: int) -> Said:
    """The unfinished output of an earlier run to the same path was removed.

    ## Why it matters
    A run that was killed leaves its files behind. `--resume` would have continued with them.

    ## Example
    `loraformat merge base adapter -o out`, killed by the system, and restarted without `--resume`.

    ## What to do
    Restart an interrupted merge with `--resume`.

    ## Source
    loraformat's own principle: nothing is dropped silently.
    """
    return where, f"removed the unfinished output of an earlier run ({nbytes} bytes)"


@kind("LF814", Severity.WARNING)
def merged_again(where: Where, adapter: str) -> Said:
    """The base is itself the result of merging the same adapter.

    ## Why it matters
    The update is added a second time, so the model changes twice as much as was trained.

    ## Example
    `loraformat merge base adapter -o merged`, then `loraformat merge merged adapter -o again`.

    ## What to do
    Merge into the base that the adapter was trained on. For a stronger update use `adapter=2.0`.

    ## Source
    `loraformat.manifest.json` of the base, which lists what was merged into it.
    """
    return where, f"{adapter} was merged into this base before"


@kind("LF819", Severity.WARNING)
def history_unknown(where: Where) -> Said:
    """The base's `loraformat.manifest.json` has changed since merge wrote it.

    ## Why it matters
    It cannot tell which adapters were merged into the base before. The same adapter could be merged again without a
    warning, and the manifest of the output does not list the earlier merges.

    ## Example
    A manifest that was cut off, edited or damaged.

    ## What to do
    Run `loraformat verify` on the base; copy it again, or repeat the merge that made it.

    ## Source
    The digest of itself that a manifest contains.
    """
    return where, "the manifest of the base has changed since it was written, so earlier merges are unknown"


@kind("LF815", Severity.INFO)
def kept_private(where: Where, permissions: int) -> Said:
    """The output is readable by fewer users than usual because one of the inputs is.

    ## Why it matters
    Many people keep adapters private. An output is never more readable than the most private of its input files and
    their folders.

    ## Example
    `adapter_model.safetensors` of mode 0600, and a base of mode 0644: the merged files have mode 0600.

    ## What to do
    Use `chmod` if others may read the output.

    ## Source
    loraformat's own principle.
    """
    return (
        where,
        f"one of the inputs is not readable by others, so neither is the output: mode {permissions & 0o666:04o}",
    )


@kind("LF820", Severity.WARNING)
def vanishing_strength(adapter: Where, strength: float) -> Said:
    """An adapter is merged at a strength that leaves nothing of it.

    ## Why it matters
    The output equals the base, without the adapter.

    ## Example
    `loraformat merge base adapter=0 -o out`.

    ## What to do
    Leave the adapter out, or give it the intended strength.

    ## Source
    loraformat's own principle: nothing is dropped silently.
    """
    return adapter, f"merged at strength {strength:g}, which leaves nothing of it"


@kind("LF821", Severity.WARNING)
def head_tied_by_transformers_4(base: Where, head: str) -> Said:
    """The output has its own output head, which transformers 4 would replace by the embeddings on loading.

    ## Why it matters
    T5 and related models read `tie_word_embeddings` for two things: whether head and embeddings are tied, and whether
    the outputs are scaled. `merge` keeps the flag because of the scaling; transformers 5 then loads the stored head.
    transformers 4 ties the two again, and what was trained in the head is lost without a message.

    ## Example
    A merge of an adapter with `"modules_to_save": ["lm_head"]` into `t5-small`.

    ## What to do
    Load the output with transformers 5.

    ## Source
    transformers 4.57, modeling_t5.py `T5ForConditionalGeneration` and modeling_utils.py `tie_weights`; 5.23.0,
    configuration_t5.py `__post_init__`.
    """
    return base, f"transformers 4 replaces {head} by the embeddings on loading, because config.json ties the two"


@kind("LF816", Severity.INFO)
def task_head_written(base: Where, name: str, head: Sequence[str], dropped: Sequence[str]) -> Said:
    """The adapter contains a task head that the base lacks, so the output is a model for that task.

    ## Why it matters
    The output is what PEFT's `merge_and_unload` and `save_pretrained` write: the trained head, the class with this head
    in `architectures` of config.json, as many labels as the head has rows, and no weight that the class does not have.
    The labels are called LABEL_0, LABEL_1 and so on, because an adapter does not store their names.

    ## Example
    A reward model: an adapter with `"task_type": "SEQ_CLS"` and `score.weight`, trained on a causal language model.
    The output has `score.weight` and no `lm_head.weight`.

    ## What to do
    Write the names of the labels into `id2label` and `label2id` of config.json. A class that finds the last token by
    its padding also needs `pad_token_id` there.

    ## Source
    peft 0.21.2, peft_model.py `PeftModelForSequenceClassification`; transformers 5.23.0, models/auto/modeling_auto.py.
    """
    left = f"; left out, as {name} does not have them: {listed(list(dropped))}" if dropped else ""
    return base, f"written as {name} with the adapter's {listed(list(head))}{left}"


@kind("LF817", Severity.INFO)
def adapter_of_base_left_out(base: Where, name: str) -> Said:
    """The base folder also contains an adapter, whose config was not copied.

    ## Why it matters
    transformers and PEFT treat a folder with adapter_config.json as an adapter: they would load the base that it names
    instead of the merged model.

    ## Example
    The folder of a training run, with the model and an adapter saved into the same place.

    ## What to do
    Nothing. That adapter was not merged; to merge it, pass it as an adapter.

    ## Source
    peft issue 1381; transformers 5.23.0, modeling_utils.py `from_pretrained`.
    """
    return base, f"{name} was not copied: with it, the output would be loaded as an adapter"


@kind("LF818", Severity.INFO)
def stored_transposed(base: Where, names: Sequence[str]) -> Said:
    """Updates were transposed for weights of a base of unknown class, because they only fit that way.

    ## Why it matters
    Layers like `Conv1D` of GPT-2 store (in, out). PEFT recognizes them by their class; files only have shapes.

    ## Example
    `c_fc.weight` of shape (16, 64) in an unknown class, with an update of shape (64, 16).

    ## What to do
    Nothing, if these layers are `Conv1D`. For a square weight only `fan_in_fan_out` tells which it is (LF303).

    ## Source
    peft 0.21.2, tuners/lora/layer.py `Linear`; transformers 5.23.0, pytorch_utils.py `Conv1D`.
    """
    what = counted(len(names), "weight", "is")
    return base, f"{what} stored as (in, out), judging by the shapes of the updates: {listed(names)}"


@kind("LF822", Severity.INFO)
def loop_not_compiled(base: Where) -> Said:
    """The merge is computed by NumPy because the compiled loop does not run on this machine.

    ## Why it matters
    The output has the same bytes, but the arithmetic of plain LoRA takes about 15 times as long: 23 ns per value at
    rank 16 instead of 1.3 ns (bfloat16, one thread, AVX2). Reading and writing take the same time.

    ## Example
    `pip install loraformat` from source on a machine without a C compiler, or a processor without fused multiply-adds.

    ## What to do
    Install gcc or clang and then loraformat again: `pip install --force-reinstall --no-deps loraformat`. If you set
    `LORAFORMAT_LOOP=numpy` yourself, unset it.

    ## Source
    Measured; docs/decisions/0013-float32-first.md.
    """
    return (
        base,
        "the compiled loop does not run here: the bytes are the same, but the arithmetic takes about 15 times as long",
    )


@kind("LF826", Severity.INFO)
def copies_streamed(output: Where, code: str) -> Said:
    """The store cannot copy ranges of its own objects, so unchanged bytes pass through this machine.

    ## Why it matters
    The output is the same. If base and output are in one object store, most bytes of a merge normally stay there; here
    all of them are downloaded and uploaded, which takes longer and may cost money.

    ## Example
    A store that answers UploadPartCopy with 501 NotImplemented, or credentials that may not read the source bucket with
    that request (403 AccessDenied).

    ## What to do
    Allow `s3:GetObject` on the base for the credentials that write the output. Some services cannot copy ranges.

    ## Source
    The AWS documentation of UploadPartCopy; storj/storj#7418.
    """
    return (
        output,
        f"the store cannot copy objects by itself ({show(code, 40)}), so unchanged bytes pass through this machine",
    )


@kind("LF830", Severity.INFO)
def published(out: Where, url: str, uploaded: int, copied: Sequence[str]) -> Said:
    """The output is on the Hub: one commit, or one pull request, with all of its files.

    ## Why it matters
    The address of the commit is stable, while branches move. Files that the Hub copied from the base were neither
    downloaded nor uploaded.

    ## Example
    `loraformat merge hf://acme/base hf://acme/adapter -o hf://acme/merged`, which changes two of three weight files.

    ## What to do
    Nothing. `loraformat verify hf://acme/merged` compares the files with their manifest.

    ## Source
    huggingface_hub 2.4.0, `HfApi.create_commit` and `CommitOperationCopy`.
    """
    more = f", {counted(len(copied), 'file')} copied on the Hub" if copied else ""
    return out, f"committed as {show(url, 200)}: {uploaded} bytes uploaded{more}"


@kind("LF831", Severity.INFO)
def copies_refused(out: Where, names: Sequence[str], reason: str) -> Said:
    """The Hub could not copy files of the base into the output's repository, so they were downloaded and uploaded.

    ## Why it matters
    The output is the same, but it took time, local disk space and traffic.

    ## Example
    A base in the storage region `us` and an output in `eu`; a base whose files are not in the Hub's Xet storage.

    ## What to do
    Use a repository in the storage region of the base. Run `pip install -U huggingface_hub` if the installed version
    cannot copy between repositories.

    ## Source
    huggingface_hub 2.4.0, `CommitOperationCopy`, `FileDuplicationError`.
    """
    return out, f"downloaded and uploaded instead of copied on the Hub ({reason}): {listed(list(names), 3)}"


@kind("LF832", Severity.INFO)
def replaced(out: Where, names: Sequence[str]) -> Said:
    """Files of an earlier output of loraformat were removed from the repository.

    ## Why it matters
    The manifest of the earlier output lists them, and the new output does not have them. Had they stayed, programs
    might have loaded them together with the new ones. The history of the repository still has them.

    ## Example
    An output of one file replacing one of three, with `--overwrite`.

    ## What to do
    To keep the earlier output, write to another branch: `-o hf://owner/name@branch`.

    ## Source
    loraformat's own principle: nothing is dropped silently.
    """
    return out, f"removed files of an earlier output: {listed(list(names), 5)}"


@kind("LF833", Severity.INFO)
def kept_files(out: Where, names: Sequence[str]) -> Said:
    """Files that loraformat did not write stay in the repository next to the output.

    ## Why it matters
    They may belong to the earlier content: a tokenizer, a chat template, plots of an evaluation.

    ## Example
    `--overwrite` into a repository with a `chat_template.jinja` that the base does not have.

    ## What to do
    Remove what does not fit the output, or write to another branch.

    ## Source
    loraformat's own principle: nothing is dropped silently.
    """
    return out, f"left unchanged: {listed(list(names), 5)}"


FINDINGS = (
    loop_not_compiled,
    left_out,
    update_lost_to_rounding,
    output_changed,
    unlike_peft,
    whole_matrices,
    resumed,
    unfinished_cleared,
    merged_again,
    kept_private,
    history_unknown,
    vanishing_strength,
    head_tied_by_transformers_4,
    task_head_written,
    adapter_of_base_left_out,
    stored_transposed,
    copies_streamed,
    published,
    copies_refused,
    replaced,
    kept_files,
)
