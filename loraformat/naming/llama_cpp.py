"""llama.cpp's names of weights, and the models whose q and k rows it reorders.

The names stand in llama_cpp_names.json, which tests/derive_llama_cpp.py makes from the gguf package's own table.

Source: gguf 0.19.0, tensor_mapping.py; llama.cpp of llama_cpp_python 0.3.36, conversion/llama.py `LlamaModel.permute`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraformat.naming.config_levels import levels_of
from loraformat.naming.tables import table
from loraformat.naming.ties import architecture_of

_TABLE = "llama_cpp_names.json"
ARCHITECTURE_KEY = "general.architecture"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Parts of a path that classes with other inputs put around the same language model.
# Source: llama.cpp, conversion/base.py `filter_tensors`.
_AROUND = ("language_model.", "text_model.")
_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)")
# Classes with other inputs → the class of their language model.
_INNER = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
_INNER_TYPES = {"gemma3": "gemma3_text"}
# Parameters in which transformers since version 5 stacks all experts of a layer.
_STACK = re.compile(
    r"model\.layers\.(\d{1,6})\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?"
)
_STACKS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
_OF_BLOCK = re.compile(r"blk\.\d")
_TURNED = {"attn_q": False, "attn_k": True}


@dataclass(frozen=True, slots=True)
class Place:
    """Where llama.cpp has a weight.

    Attributes:
        tensor: its name there.
        expert: which matrix of the stack it is; None for a tensor of its own.
        heads: how many heads its rows are of, where they stand in another order; 0 where they do not.
    """

    tensor: str
    expert: int | None = None
    heads: int = 0


@dataclass(frozen=True, slots=True)
class LlamaCppModel:
    """A model as llama.cpp has it.

    Attributes:
        architecture: llama.cpp's word for it.
        permuted: whether rows of q and k stand in another order than in transformers.
        heads, kv_heads: of each layer, or one number for all; () where nobody says.
        names: module in transformers → tensor there, with {} for the layer and the expert; several classes may share an
            architecture.
        is_tied: whether the head is the input embedding; None where nobody says.
        width: length of the vectors between layers; None where nobody says.
    """

    architecture: str
    permuted: bool
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    names: Mapping[str, str]
    is_tied: bool | None = None
    width: int | None = None

    def stacks(self, weight: str) -> tuple[str, ...]:
        """The tensors that hold a parameter in which transformers stacks the experts of a layer; () for another weight.

        >>> model = model_of_config({"architectures": ["Qwen3MoeForCausalLM"]})
        >>> model.stacks("model.layers.3.mlp.experts.gate_up_proj")
        ('blk.3.ffn_gate_exps.weight', 'blk.3.ffn_up_exps.weight')

        Source: transformers 5.23.0, conversion_mapping.py; llama.cpp, conversion/qwen.py `modify_tensors`.
        """
        found = _STACK.fullmatch(_plain(weight))
        known = set(self.names.values())
        names = () if found is None else _STACKS[found[2]]
        is_known = all(f"blk.{{}}.{name}" in known for name in names)
        return tuple(f"blk.{found[1]}.{name}.weight" for name in names) if found and is_known else ()

    def place(self, weight: str) -> Place | None:
        """Where a weight of transformers' name stands; None for a name that llama.cpp has no tensor for.

        >>> model = model_of_config({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4})
        >>> model.place("model.layers.3.self_attn.q_proj.weight")
        Place(tensor='blk.3.attn_q.weight', expert=None, heads=4)

        Raises: LookupError: its rows stand in another order, and how many heads there are nobody says.
        """
        module, dot, parameter = _plain(weight).rpartition(".")
        numbers = _NUMBER.findall(module + ".")
        template = _NUMBER.sub("{}", module + ".")[:-1]
        found = self.names.get(template)
        if found is None or not dot or parameter not in ("weight", "bias") or len(numbers) > 2:
            return None
        stem = found.replace("{}", numbers[0] if numbers else "", 1)
        expert = int(numbers[1]) if len(numbers) == 2 else None
        return Place(f"{stem}.{parameter}", expert, self._turned(stem))

    def weights_of(self, tensor: str, expert: int | None = None) -> Iterator[str]:
        """Names that a tensor of llama.cpp may have in transformers, or one expert of it."""
        stem, _, parameter = tensor.rpartition(".")
        number = _NUMBER.search(stem + ".")
        wanted = stem if number is None else f"{stem[: number.start()]}{{}}{stem[number.end() :]}"
        for module, found in self.names.items():
            if found == wanted and (module.count("{}") == 2) == (expert is not None):
                numbers = [number[0] if number else "", "" if expert is None else str(expert)]
                yield f"{module.format(*numbers[: module.count('{}')])}.{parameter}"

    def is_turned(self, tensor: str) -> bool:
        """Whether the rows of a tensor stand in another order than in transformers."""
        return self.permuted and tensor.rpartition(".")[0].rpartition(".")[2] in _TURNED

    def heads_of(self, tensor: str) -> int:
        """How many heads the rows of a tensor are of, where they stand in another order; else 0.

        Raises: LookupError: as `place`.
        """
        return self._turned(tensor.rpartition(".")[0])

    def _turned(self, stem: str) -> int:
        leaf = stem.rpartition(".")[2]
        if not self.permuted or leaf not in _TURNED:
            return 0
        counts = (self.kv_heads or self.heads) if _TURNED[leaf] else self.heads
        number = _NUMBER.search(stem + ".")
        layer = int(number[0]) if number else 0
        if not counts or (len(counts) > 1 and layer >= len(counts)):
            raise LookupError(stem)
        return counts[layer if len(counts) > 1 else 0]


def model_of_config(config: Mapping[str, Any]) -> LlamaCppModel | None:
    """The model that config.json describes; None for a class that is not in the table."""
    name = architecture_of(config)
    levels = [level for _, level in levels_of(config)]
    kinds = [level.get("model_type") for level in levels]
    row = _classes().get(_INNER.get(name or "", name or "")) or next(
        (
            row
            for row in _classes().values()
            for kind in kinds
            if row["model_type"] == _INNER_TYPES.get(str(kind), kind)
        ),
        None,
    )
    if row is None:
        return None
    tied = [level["tie_word_embeddings"] for level in levels if isinstance(level.get("tie_word_embeddings"), bool)]
    return LlamaCppModel(
        architecture=row["architecture"],
        permuted=row["permuted"],
        heads=_counts(next((c for level in levels if (c := level.get("num_attention_heads"))), None)),
        kv_heads=_counts(next((c for level in levels if (c := level.get("num_key_value_heads"))), None)),
        names=row["names"],
        is_tied=any(tied) if tied else None,
        width=_size(next((c for level in levels if (c := level.get("hidden_size"))), None)),
    )


def model_of_settings(settings: Mapping[str, Any]) -> LlamaCppModel | None:
    """The model that the header of a GGUF file describes, base or adapter; None for an architecture without names."""
    architecture = settings.get(ARCHITECTURE_KEY)
    rows = [row for row in _classes().values() if row["architecture"] == architecture]
    if not isinstance(architecture, str) or not rows:
        return None
    names = {module: tensor for row in reversed(rows) for module, tensor in row["names"].items()}
    return LlamaCppModel(
        architecture=architecture,
        permuted=any(row["permuted"] for row in rows),
        heads=_counts(settings.get(f"{architecture}.attention.head_count")),
        kv_heads=_counts(settings.get(f"{architecture}.attention.head_count_kv")),
        names=names,
        width=_size(settings.get(f"{architecture}.embedding_length")),
    )


def is_tensor_name(name: str) -> bool:
    """Whether a weight has a name of llama.cpp's.

    >>> is_tensor_name("blk.0.attn_q.weight"), is_tensor_name("model.layers.0.self_attn.q_proj.weight")
    (True, False)
    """
    return name in (EMBEDDING, HEAD) or _OF_BLOCK.match(name) is not None


def known_classes() -> tuple[str, ...]:
    """The classes of transformers whose names in llama.cpp are known."""
    return tuple(_classes())


def source_row(row: int, heads: int, rows: int) -> int:
    """Which row of q or k in transformers stands in a row of llama.cpp's: of each head, the halves alternate.

    >>> [source_row(row, heads=2, rows=8) for row in range(8)]
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    size = rows // heads
    head, within = divmod(row, size)
    return head * size + within % 2 * (size // 2) + within // 2


def _classes() -> Mapping[str, Any]:
    classes: Mapping[str, Any] = table(_TABLE)["classes"]
    return classes


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _counts(value: object) -> tuple[int, ...]:
    """A number of heads, or one for each layer."""
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    counts = [one for one in several if isinstance(one, int) and not isinstance(one, bool) and one > 0]
    return tuple(counts) if len(counts) == len(several) else ()


def _plain(weight: str) -> str:
    """A name as the causal language model has it, whatever is around it."""
    for part in _AROUND:
        weight = weight.replace(part, "", 1)
    weight = weight.removeprefix("model.")
    return weight if weight.startswith("lm_head.") else f"model.{weight.removeprefix('model.')}"
