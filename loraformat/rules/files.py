"""Family 0: the files of the folder, by name and size; runs even if the adapter could not be read."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.diagnostics import FindingLocation, Severity, in_file
from loraformat.model.bundle import Bundle, TensorFile
from loraformat.rules.base import Hit, Subject, rule

_LFS_POINTER = b"version https://git-lfs"
_LARGEST_POINTER = 1024
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download", ".tmp")
_PAIRS = (
    ("adapter_model.safetensors", "adapter_model.bin"),
    ("lora_weights.safetensors", "lora_weights.pt"),
    ("embedding_weights.safetensors", "embedding_weights.pt"),
)
_KNOWN = frozenset(
    [
        *("adapter_config.json", "lora_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
        *("special_tokens_map.json", "README.md", "chat_template.jinja"),
        *(name for pair in _PAIRS for name in pair),
    ]
)
_READ_ANYWAY = ("adapter_config.json", "lora_config.json", "tokenizer.json")


@rule("LF030", Severity.WARNING, since="0.1.0", needs="bundle")
def empty_file(subject: Subject) -> Iterator[Hit]:
    """A file of the adapter's folder has no bytes.

    ## Why it matters
    A full disk, a broken download or a crash created the file without its content. Libraries that read it fail far away
    from the cause, or use their defaults.

    ## Example
    `tokenizer_config.json` of 0 bytes.

    ## What to do
    Copy or download the file again, or remove it if nothing needs it.

    ## Source
    What `open(path, "w")` leaves when the process ends before the first write.
    """
    for name, file in subject.bundle.files.items():
        is_read = isinstance(file, TensorFile) or name in _READ_ANYWAY  # their readers say so themselves
        if not file.nbytes and not is_read and not name.startswith("."):
            yield Hit(in_file(name), "the file is empty", "copy or download it again")


@rule("LF031", Severity.INFO, since="0.1.0", needs="bundle")
def pickled_weights(subject: Subject) -> Iterator[Hit]:
    """The weights are in a pickle, and there is no safetensors file of them.

    ## Why it matters
    Loading a pickle can run code that its author chose. loraformat never executes it, but other programs that load the
    adapter may, and many services refuse such files for that reason.

    ## Example
    `adapter_model.bin` as the only weight file.

    ## What to do
    Run `loraformat convert ADAPTER --to peft -o OUT`, which writes safetensors.

    ## Source
    Python, library reference, `pickle`: "It is possible to construct malicious pickle data"; CVE-2025-32434.
    """
    names = _weights(subject.bundle)
    if names and not any(name.endswith((".safetensors", ".gguf")) for name in names):
        yield Hit(in_file(names[0]), "a pickle; it was read without executing it", "convert it to safetensors")


@rule("LF032", Severity.WARNING, since="0.1.0", needs="bundle")
def second_weight_file(subject: Subject) -> Iterator[Hit]:
    """The same weights exist in two containers, and only one of them is read.

    ## Why it matters
    Programs differ in which of the two they read. If the files differ, they load different adapters.

    ## Example
    `adapter_model.safetensors` next to `adapter_model.bin`.

    ## What to do
    Remove the outdated file, or the pickle if both are the same.

    ## Source
    peft 0.21.2, utils/save_and_load.py `load_peft_weights` takes safetensors first; vllm 0.33.0, lora_model.py.
    """
    for first, second in _PAIRS:
        if first in subject.bundle.files and second in subject.bundle.files:
            yield Hit(in_file(second), f"ignored, because {first} takes precedence", "remove the outdated one")


@rule("LF033", Severity.WARNING, since="0.1.0", needs="bundle")
def confusable_file_name(subject: Subject) -> Iterator[Hit]:
    """A file name differs from an expected one only in case or in the suffix of a copy.

    ## Why it matters
    On Linux it is a different file and is ignored; on macOS and Windows it may be read instead of the expected one.

    ## Example
    `Adapter_Config.json`, or `adapter_model (1).safetensors` from a second download.

    ## What to do
    Rename it exactly as the format requires, and keep only one file.

    ## Source
    docs/formats/peft.md and docs/formats/native.md, the names of files.
    """
    for name in subject.bundle.files:
        meant = _without_copy(name).lower()
        known = next((each for each in _KNOWN if each.lower() == meant), None)
        if known is not None and name not in _KNOWN:
            yield Hit(in_file(name), f'not read; the expected name is "{known}"', "rename or remove it")


@rule("LF034", Severity.INFO, since="0.1.0", needs="bundle")
def python_files(subject: Subject) -> Iterator[Hit]:
    """The adapter's folder contains Python source.

    ## Why it matters
    An adapter does not need any. With `trust_remote_code`, or when a script is started in that folder, it is executed.

    ## Example
    `modeling_custom.py` next to `adapter_config.json`.

    ## What to do
    Read it before you use the adapter anywhere. Publish code in a repository of its own.

    ## Source
    transformers 5.23.0, dynamic_module_utils.py; Python, command line, `-P`.
    """
    names = sorted(name for name in subject.bundle.files if name.lower().endswith((".py", ".pyc", ".so", ".pyd")))
    if names:
        yield Hit(FindingLocation(file=names[0], more=len(names) - 1), "code, which was neither read nor run")


@rule("LF035", Severity.WARNING, since="0.1.0", needs="bundle")
def unfinished_download(subject: Subject) -> Iterator[Hit]:
    """A file name shows that its download has not finished.

    ## Why it matters
    Part of the adapter may be missing, or come from another revision than the rest.

    ## Example
    `adapter_model.safetensors.incomplete`.

    ## What to do
    Download again into an empty folder.

    ## Source
    huggingface_hub 2.4.0, file_download.py writes `*.incomplete` until a file is whole.
    """
    for name in subject.bundle.files:
        if name.lower().endswith(_UNFINISHED) and not name.startswith("."):
            yield Hit(in_file(name), "an unfinished download", "download the adapter again")


@rule("LF036", Severity.ERROR, since="0.1.0", needs="bundle")
def pointer_file(subject: Subject) -> Iterator[Hit]:
    """A file next to the weights is a Git-LFS pointer instead of its content.

    ## Why it matters
    The repository was cloned without its large files. A tokenizer that is a pointer cannot be loaded, and would be
    copied into a merged model.

    ## Example
    `tokenizer.model` of 132 bytes that begins with `version https://git-lfs.github.com/spec/v1`.

    ## What to do
    Run `git lfs install && git lfs pull` in the clone; in GitHub Actions set `lfs: true` for actions/checkout.

    ## Source
    Git LFS, docs/spec.md, "The Pointer".
    """
    for name, file in subject.bundle.files.items():
        if isinstance(file, TensorFile) or file.nbytes > _LARGEST_POINTER or name in _READ_ANYWAY[:2]:
            continue
        if file.read().startswith(_LFS_POINTER):
            yield Hit(in_file(name), "a Git-LFS pointer, not the file it stands for", "run `git lfs pull`")


def _weights(bundle: Bundle) -> list[str]:
    """The weight files of the folder that a format reads; the only file where one was named."""
    if bundle.is_single_file:
        return [file.name for file in bundle.tensor_files()]
    known = [name for pair in _PAIRS for name in pair]
    return [name for name in known if name in bundle.files]


def _without_copy(name: str) -> str:
    """`model (1).bin` and `model - Copy.bin` as `model.bin`."""
    stem, dot, suffix = name.rpartition(".")
    for mark in (" (1)", " (2)", " (3)", " - Copy", " copy"):
        stem = stem.removesuffix(mark)
    return f"{stem}{dot}{suffix}"
