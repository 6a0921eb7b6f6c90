"""Whether tied tables can be untied, and what each of them gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from loraformat.errors import MergeError, UnsupportedUpdate
from loraformat.matching import Tie, is_vocabulary, tie_claim
from loraformat.merger.plan.data import Edit, Term
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.updates import Replace, Rows, Update
from loraformat.naming import architecture_of, levels_of, parts_cleanly, tied_names
from loraformat.naming.llama_cpp import EMBEDDING, HEAD

# How classes of models end that have an output head on a vocabulary.
_HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")

Same = Callable[[str, str], bool]


def verified_tie(tie: Tie, base: Checkpoint, same: Same | None) -> Tie:
    """The tie without names whose stored table is another one: transformers does not tie those.

    Args:
        same: whether two stored tensors have equal values; None where nobody can tell, and the config is believed.
    """
    first = base.tensors[tie.stored]
    if same is None:
        return tie
    kept = [
        name for name in tie.names if name not in base.tensors or base.tensors[name] == first or same(tie.stored, name)
    ]
    return Tie(tuple(kept), tie.stored)


def check_may_untie(base: Checkpoint, tie: Tie) -> None:
    """Refuse to part a table where the model would not be what it was, but for the update.

    Parted are the names of one storage of a `.pt` file, the one head of a decoder or of a masked language model, and
    tables of a base whose config.json names no class.

    Raises: UnsupportedUpdate (LF013).
    """
    architecture = architecture_of(base.config)
    is_storage = base.tensors[tie.stored].storage is not None and all(name in base.tensors for name in tie.names)
    if is_storage and tied_names(base.config) is None:
        return
    if architecture is None or parts_cleanly(base.config):
        return
    known = tied_names(base.config) is not None
    why = "shares its table among more than one embedding and one head" if known else "is an unknown class"
    others = ", ".join(tie.names[1:])
    raise UnsupportedUpdate(
        f"{tie.names[0]}: the update would untie it from {others}, but {architecture} {why}",
        where="merge",
        hint="first give the base separate tables, with tie_word_embeddings false in config.json",
    )


def check_tie_is_known(name: str, updates: Iterable[Update], base: Checkpoint) -> None:
    """Refuse to change a table of tokens apart from a tied head that config.json tells of but nothing names.

    Raises: MergeError (LF801).
    """
    if base.settings:
        _check_gguf_table(name, updates, base)
        return
    if not _is_table(name, base) or not base.config or tie_claim(base.config) is False:
        return
    declared, architecture = tied_names(base.config), architecture_of(base.config) or ""
    if declared == {} or (declared is None and tie_claim(base.config) is None and not architecture.endswith(_HEADED)):
        return
    if all(isinstance(update, (Replace, Rows)) and update.follows_tie for update in updates):
        return
    if any(
        is_vocabulary(other) and other != name and base.tensors[other].shape == base.tensors[name].shape
        for other in base.tensors
    ):
        return
    raise MergeError(
        f"{name}: config.json leaves tie_word_embeddings unset and the tied output head cannot be identified",
        where="merge",
        hint='name the class in "architectures" of config.json, or set tie_word_embeddings to false there',
    )


def _check_gguf_table(name: str, updates: Iterable[Update], base: Checkpoint) -> None:
    """Raises: MergeError (LF801): llama.cpp would use a changed input embedding as the head too."""
    if name != EMBEDDING or HEAD in base.tensors:
        return
    if all(isinstance(update, (Replace, Rows)) and update.follows_tie for update in updates):
        return
    raise MergeError(
        f"{name}: the file has no {HEAD}, so llama.cpp also uses the table as output head, which the update must not "
        "change",
        where="merge",
        hint="merge into the base that the file was made from, so that the head gets its own table",
    )


def own_terms(name: str, members: Mapping[str, list[Term]], update_of: Callable[[Term], Update]) -> list[Term]:
    """What one name of a parted table gets: values that all names of it follow, unless it has values of its own."""
    own = members[name]
    if any(isinstance(update_of(term), (Replace, Rows)) for term in own):
        return own
    followed = [
        term
        for other, terms in members.items()
        if other != name
        for term in terms
        if isinstance(update := update_of(term), (Replace, Rows)) and update.follows_tie
    ]
    return [*followed, *own]


def check_resized(base: Checkpoint, resized: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a vocabulary that grows or shrinks in some tables only: such a checkpoint does not load.

    Raises: MergeError (LF801).
    """
    for name, (old, new) in resized.items():
        if not _is_table(name, base):
            continue
        behind = [
            other for other in _tables(base, old) if other not in resized and other != name and not _is_zero_bias(other)
        ]
        if behind:
            raise MergeError(
                f"{name} has {new} rows with the update, but {behind[0]} keeps {old}",
                where="merge",
                hint="the adapter must contain both tables: save it with save_embedding_layers=True",
            )


def check_untied(edits: Mapping[str, Edit], untied: Iterable[tuple[str, ...]]) -> None:
    """Refuse names of one table that get different numbers of rows as they part: such a checkpoint does not load.

    Raises: MergeError (LF801).
    """
    for names in untied:
        rows = {edits[name].shape[0]: name for name in names if name in edits}
        if len(rows) > 1:
            (one, first), (other, second), *_ = sorted(rows.items())
            raise MergeError(
                f"{second} has {other} rows with the update, but {first} keeps {one}",
                where="merge",
                hint="the adapter must contain both tables: save it with save_embedding_layers=True",
            )


def grown_biases(base: Checkpoint, resized: Mapping[str, tuple[int, int]]) -> Iterator[Edit]:
    """The biases that BART's kin add to their logits, with a zero for each new token, as transformers resizes them.

    Source: transformers 5.23.0, models/bart/modeling_bart.py `_resize_final_logits_bias`.
    """
    for old, new in {sizes for name, sizes in resized.items() if _is_table(name, base)}:
        for name in _tables(base, old):
            if _is_zero_bias(name):
                yield Edit(name, name, base.tensors[name].dtype.safetensors, (1, new), (), row_axes=2)


def _is_zero_bias(name: str) -> bool:
    return name.endswith("final_logits_bias")


_HEAD_BIASES = ("lm_head.bias", "predictions.bias", "predictions.decoder.bias")


def _tables(base: Checkpoint, rows: int) -> Iterator[str]:
    """Names of tensors that have a row or a value for each token."""
    for name, tensor in base.tensors.items():
        is_table = is_vocabulary(name) and len(tensor.shape) == 2 and tensor.shape[0] == rows
        is_bias = name.endswith(_HEAD_BIASES) and tensor.shape == (rows,)
        if is_table or is_bias or (name.endswith("final_logits_bias") and tensor.shape == (1, rows)):
            yield name


def _is_table(name: str, base: Checkpoint) -> bool:
    stored = base.tensors.get(name)
    if is_vocabulary(name):
        return True
    sizes = [level.get("vocab_size") for _, level in levels_of(base.config)]
    return stored is not None and len(stored.shape) == 2 and stored.shape[0] in sizes and "embed" in name
