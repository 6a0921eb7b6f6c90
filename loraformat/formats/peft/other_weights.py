"""Weights that were trained with the adapter and saved in files of their own beside it.

Source: LLaVA 1.2, train.py (`non_lora_trainables.bin`); DeepSpeed-Chat and Qwen-VL forks (`non_lora_state_dict.bin`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from loraformat.diagnostics import Finding, in_file
from loraformat.errors import ContainerError
from loraformat.formats.kit.findings import trained_weight_files, unread_weight_file
from loraformat.formats.kit.folder import is_training_state
from loraformat.formats.peft.keys import is_whole, parse
from loraformat.model.bundle import Bundle, TensorFile
from loraformat.model.tensors import LazyTensor

# Files that are nothing but trained weights, whatever they are called in there.
_TRAINED = ("non_lora_trainables", "non_lora_state_dict", "new_embeddings")
# New rows of the embeddings, and what a merge would have to know: after which row they stand.
# Source: vllm 0.10, lora/models.py `embedding_modules` (removed in 0.12); fms-hf-tuning, its post-processing for vLLM.
_ROWS_OF_VLLM = {"input_embeddings": "embed_tokens.weight", "output_embeddings": "lm_head.weight"}
# The head that a reward model, or PPO, puts on the model beside its own: no weight of the base, and no factor.
# Source: LLaMA-Factory ff6d4d1, train/callbacks.py `fix_valuehead_checkpoint`.
_VALUE_HEAD = "v_head."
_OWN = ("adapter_model", "adapters.", "ggml-adapter")


@dataclass(frozen=True, slots=True)
class Beside:
    """Whole weights out of other files than the adapter's.

    Attributes:
        weights: weight → its values.
        files: names of the files that are read.
        unclaimed: tensors of which nobody can tell which weight they are, by name.
    """

    weights: dict[str, LazyTensor] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    unclaimed: dict[str, LazyTensor] = field(default_factory=dict)


def read_beside(bundle: Bundle, adapted: Collection[str]) -> Beside:
    """The whole weights in other weight files of the folder.

    Args:
        adapted: weights that the adapter's layers update: a file that has those too is a model of its own.

    Raises: ContainerError: a file that can hold nothing but trained weights cannot be read.
    """
    found = Beside()
    for file in bundle.tensor_files():
        if file.name.lower().startswith(_OWN) or is_training_state(file.name):
            continue
        is_trained = file.name.lower().startswith(_TRAINED)
        try:
            entries = file.open().entries
        except ContainerError as error:
            if is_trained:
                raise
            found.notes.append(unread_weight_file(in_file(file.name), f"it cannot be read as tensors: {error}"))
            continue
        _take(file, entries, adapted, found)
    return found


def _take(file: TensorFile, entries: Mapping[str, LazyTensor], adapted: Collection[str], found: Beside) -> None:
    if entries and all(name.startswith(_VALUE_HEAD) for name in entries):
        reason = (
            f"it is the value head of a reward model or of PPO ({len(entries)} tensors), which is not part of the model"
        )
        found.notes.append(unread_weight_file(in_file(file.name), f"{reason}; copy it yourself if you need it"))
        return
    weights = {}
    rows = [name for name in entries if name in _ROWS_OF_VLLM]
    if rows:
        found.unclaimed.update({name: entries[name] for name in rows})
        tables = " and ".join(_ROWS_OF_VLLM[name] for name in rows)
        reason = f"{' and '.join(rows)} are new rows only, as in older versions of vLLM"
        found.notes.append(unread_weight_file(file.name, f"{reason}; save the whole {tables} under that name instead"))
    for name, tensor in entries.items():
        if name in _ROWS_OF_VLLM:
            continue
        key = parse(name)
        if not is_whole(key) or "lora_" in name:
            found.notes.append(unread_weight_file(in_file(file.name), f"it holds adapter factors: {name}"))
            return
        if key.part == "plain" and key.owner in adapted:
            found.notes.append(unread_weight_file(in_file(file.name), f"it is a separate model, with {key.owner}"))
            return
        weights[key.owner] = tensor
    twice = sorted(weights.keys() & found.weights.keys())
    if twice:
        found.notes.append(unread_weight_file(in_file(file.name), f"{found.files[-1]} also has {twice[0]}"))
        return
    if not weights:
        return
    found.weights.update(weights)
    found.files.append(file.name)


def notes_of(found: Beside, replaced: Collection[str]) -> Iterator[Finding]:
    """What was read, and what of it the adapter's own file has too.

    Args:
        replaced: whole weights of the adapter's own file, which PEFT loads last.
    """
    yield from found.notes
    if found.files:
        yield trained_weight_files(found.files, sorted(found.weights))
    both = sorted(found.weights.keys() & set(replaced))
    if both:
        yield unread_weight_file(
            in_file(found.files[0]), f"the adapter's own file also has {both[0]}, and takes precedence"
        )
