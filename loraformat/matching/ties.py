"""Weights of a base that are one table under several names: input embeddings and output heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.weight_figures import module_kind
from loraformat.naming import architecture_of, levels_of, tied_names

# Last module components by which libraries call their input embeddings and output heads.
# Source: transformers 5.23.0, `_tied_weights_keys` of models/*/modeling_*.py.
EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "token_embedding"),
    "embeddings",  # of Mamba
)
HEADS = ("lm_head", "embed_out", "output", "output_layer", "head", "decoder", "generator_lm_head", "proj_out")

# Of classes for classification and questions. Source: transformers 5.23.0, models/llama/modeling_llama.py and others.
_TASK_HEADS = ("score", "classifier", "qa_outputs")

# Tables beside the input embedding: of positions, of kinds of tokens and others; and what chooses among experts.
# Source: transformers 5.23.0, names that are an `nn.Embedding` in models/*/modeling_*.py and never a linear layer.
_TABLES = (
    *("wpe", "position_embedding", "position_embeddings", "pos_embedding", "embed_positions", "positions_embed"),
    *("pos_embed", "pos_emb", "row_embeddings", "column_embeddings", "position_embedding_table", "rel_pos_emb"),
    *("x_position_embeddings", "y_position_embeddings", "h_position_embeddings", "w_position_embeddings"),
    *("query_position_embeddings", "rel_embeddings", "distance_embedding", "segment_embedding", "segment_emb"),
    *("token_type_embeddings", "task_type_embeddings", "relative_attention_bias", "global_relative_attention_bias"),
    *("embedding", "tokens_embed", "word_embedding", "embed_audio_tokens", "embed_text_tokens", "text_embed_tokens"),
    *("lang_embeddings", "language_embedding", "speaker_embedding", "label_embeddings", "entity_embeddings"),
    *("weight_embedding", "level_embed", "query_embed", "ngram_embedding", "codec_embedding", "value_embeddings"),
)
_ROUTERS = ("gate", "shared_expert_gate")

TIE_KEYS = ("tie_word_embeddings", "weight_tying")


@dataclass(frozen=True, slots=True)
class Tie:
    """One table and its names.

    Attributes:
        names: all of them, the input embedding first.
        stored: the name under which the table stands in the checkpoint (the input embedding where both do).
    """

    names: tuple[str, ...]
    stored: str


def ties_of(base: Checkpoint, wanted: Iterable[str] = ()) -> tuple[Tie, ...]:
    """The ties of a base.

    Those of a pipeline are those of its components, each looked for in that component alone.

    Two names are tied where they are one storage of a `.pt` file, or where there is a config.json that does not deny it
    (transformers leaves `tie_word_embeddings` out where it is true) and the checkpoint has an input embedding but no
    tensor for the head. Which names these are the table of transformers' classes tells; for a class that it does not
    know, or whose checkpoints use other names, the head is the one that `wanted` names or that is stored.

    Args:
        base: headers and config.json.
        wanted: names that somebody wants to update; a head that is not stored is known only from here.
    """
    if base.components:
        return tuple(
            Tie(tuple(f"{component}.{name}" for name in tie.names), f"{component}.{tie.stored}")
            for component, one in base.components.items()
            for tie in ties_of(one, _of_component(component, wanted))
        )
    found = list(_shared_storages(base))
    claimed = tie_claim(base.config)
    if claimed is False or not base.config:
        return tuple(found)
    known = {name for tie in found for name in tie.names}
    declared = tied_names(base.config)
    if declared is not None:
        stated = [tie for tie in _declared(declared, base) if not known & set(tie.names)]
        if stated or not declared:
            return (*found, *stated)
    embeddings = [name for name in base.tensors if _last(name) in EMBEDDINGS and name not in known]
    if len(embeddings) != 1:
        return tuple(found)
    embedding = embeddings[0]
    heads = {_stored_style(name, embedding) for name in wanted if _last(name) in HEADS} - base.tensors.keys()
    if claimed:
        shape = base.tensors[embedding].shape
        stored = [name for name in base.tensors if _last(name) in HEADS and base.tensors[name].shape == shape]
        heads |= set(stored if len(stored) == 1 else ())
    heads = heads or _implied_head(base.config, embedding)
    if heads:
        found.append(Tie((embedding, *sorted(heads)), embedding))
    return tuple(found)


def _of_component(component: str, names: Iterable[str]) -> list[str]:
    head = f"{component}."
    return [name.removeprefix(head) for name in names if name.startswith(head)]


def _declared(declared: Mapping[str, str], base: Checkpoint) -> Iterable[Tie]:
    """The ties that a class declares, as far as the checkpoint stores one of their names."""
    groups: dict[str, list[str]] = {}
    for target, source in declared.items():
        groups.setdefault(source, []).append(target)
    for source, targets in sorted(groups.items()):
        names = (source, *sorted(targets))
        stored = next((name for name in names if name in base.tensors), None)
        if stored is not None:
            yield Tie(names, stored)


def is_vocabulary(weight: str) -> bool:
    """Whether a weight has the name of a table of tokens: an input embedding or an output head."""
    return _last(weight) in EMBEDDINGS or _last(weight) in HEADS


def is_embedding(weight: str) -> bool:
    """Whether a weight has the name of an input embedding."""
    return _last(weight) in EMBEDDINGS


def is_table(weight: str) -> bool:
    """Whether a weight has the name of a table whose rows are looked up: an input embedding, of positions or others.

    >>> is_table("transformer.wpe.weight"), is_table("lm_head.weight")
    (True, False)
    """
    return is_embedding(weight) or module_kind(weight) in _TABLES


def is_head(weight: str) -> bool:
    """Whether a weight has the name of an output head, or of the head of a task."""
    return _last(weight) in (*HEADS, *_TASK_HEADS)


def is_linear(weight: str) -> bool:
    """Whether a matrix with this name is a linear layer that "all-linear" and quantization mean: no table, no router.

    >>> is_linear("model.layers.0.mlp.up_proj.weight"), is_linear("model.embed_tokens.weight")
    (True, False)
    """
    return not (is_vocabulary(weight) or is_table(weight) or module_kind(weight) in _ROUTERS)


def tie_claim(config: Mapping[str, Json]) -> bool | None:
    """What config.json says about tied embeddings, at the top or in `text_config`; None where it says nothing.

    Where the two disagree they count as tied: to part what was not tied only writes a tensor twice.
    """
    claims = [level[key] for _, level in levels_of(config) for key in TIE_KEYS if isinstance(level.get(key), bool)]
    return any(claims) if claims else None


def _implied_head(config: Mapping[str, Json], embedding: str) -> set[str]:
    """The head that the architecture has although no tensor shows it.

    Source: transformers 5.23.0, `_tied_weights_keys`: `lm_head.weight` in all generating classes but GPT-NeoX's.
    """
    name = architecture_of(config) or ""
    if not name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return set()
    prefix = "language_model." if embedding.startswith("language_model.model.") else ""
    head = "embed_out.weight" if config.get("model_type") == "gpt_neox" else "lm_head.weight"
    return {prefix + head}


def _stored_style(head: str, embedding: str) -> str:
    """The name of a head as its checkpoint spells it: below the language model, where the embedding is."""
    nested = embedding.startswith("language_model.model.") and head == "lm_head.weight"
    return f"language_model.{head}" if nested else head


def _last(weight: str) -> str:
    return weight.removesuffix(".weight").rpartition(".")[2] if weight.endswith(".weight") else ""


def _shared_storages(base: Checkpoint) -> Iterable[Tie]:
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in base.tensors.items():
        if tensor.storage is not None:
            key = (tensor.file, tensor.storage, tensor.offset, tensor.shape, tensor.strides)
            groups.setdefault(key, []).append(name)
    for names in groups.values():
        if len(names) > 1:
            ordered = tuple(sorted(names, key=lambda name: _last(name) not in EMBEDDINGS))
            yield Tie(ordered, ordered[0])
