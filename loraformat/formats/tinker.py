"""Downloads of Thinking Machines' Tinker: PEFT's file names, experts in stacks that share a factor. Read only.

Source: tinker-cookbook 0.6.1, weights/_merge_utils.py `build_name_remaps`, `plan_expert_ops`; _merge_gpt_oss.py;
_merge.py `expand_expert_lora_tensors`; 9dfcc3a, weights/_merge_qwen3_5.py, _merge_nemotron.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from loraformat.diagnostics import Finding, FindingLocation, in_file, in_weights
from loraformat.errors import ConfigError, MissingFile, UnsupportedUpdate
from loraformat.formats.kit import factors
from loraformat.formats.kit.base import NO_HINTS, Hints, Match
from loraformat.formats.kit.blocks import block_columns, stacked
from loraformat.formats.kit.fields import Config, as_integer, as_number, as_object, readable
from loraformat.formats.kit.findings import unpaired_factor
from loraformat.formats.kit.folder import left_behind, other_files, tokenizer_files
from loraformat.formats.kit.pairs.spelling import Pair, Spelling, pairs_of
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.formats.kit.scaling import MAX_RANK, Scaling, agreed, scale_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, JsonFile, TensorFile
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

NAME = "tinker"
TITLE = "Tinker: adapter_model.safetensors, and adapter_config.json with r and lora_alpha and no peft_type"
SPEC = "docs/formats/tinker.md"
READS: tuple[str, ...] = ("linear", "embedding", "experts")

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_SPELLING = (Spelling(".lora_A.weight", ".lora_B.weight"),)
_EXPERTS = re.compile(r"(.+\.experts)\.(w[123]|gate_proj|up_proj|down_proj)")
_LAYERS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_UNEMBED = "unembed_tokens"
# Nemotron's experts have no gate; Tinker's w3 is empty there.
_NO_GATE, _LAYERS_WITHOUT_GATE = ".mixer.experts", {"w1": "up_proj", "w2": "down_proj"}
# Layers that checkpoints join, with the parts that are trained apart, in the order of the rows.
_QKV = re.compile(r"(.+)\.(in_proj_[qkv])")
_MIXER = re.compile(r"(.+\.mixer)\.(gate_proj|x_proj)")
_PARTS = {"in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v"), "in_proj": ("gate_proj", "x_proj")}
# The halves of the stack in which checkpoints join two layers of every expert.
_JOINED = ("gate_proj", "up_proj")
_STACK = "gate_up_proj"


def sniff(bundle: Bundle) -> Match | None:
    """By a config that states rank and alpha and neither what PEFT calls the kind nor which modules are adapted."""
    config = readable(bundle, CONFIG)
    if WEIGHTS not in bundle.files or not isinstance(config, dict) or not is_own(config):
        return None
    return Match(certain=True, reason=f"{CONFIG} states r and lora_alpha and no peft_type")


def is_own(config: Config) -> bool:
    """Whether a config is Tinker's and not one of PEFT that lacks a field."""
    return {"r", "lora_alpha"} <= config.keys() and not {"peft_type", "target_modules"} & config.keys()


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a downloaded folder.

    Raises:
        MissingFile (LF101): no adapter_config.json or no adapter_model.safetensors.
        ConfigError (LF103): a field that cannot be used, factors that do not fit, or a hint that contradicts the file.
    """
    file, config_file = bundle.files.get(WEIGHTS), bundle.files.get(CONFIG)
    if not isinstance(file, TensorFile) or not isinstance(config_file, JsonFile):
        raise MissingFile(f"expected {CONFIG} and {WEIGHTS}", where=bundle.uri)
    config = as_object(config_file.load(), in_file(CONFIG))
    rank = as_integer(config.get("r"), in_file(CONFIG, "r"), 1, MAX_RANK)
    alpha = as_number(config.get("lora_alpha"), in_file(CONFIG, "lora_alpha"))
    scale = scale_of(
        alpha, agreed(rank, hints.rank, "rank", in_file(CONFIG, "r")) or rank, Scaling(), hints, in_file(CONFIG)
    )
    tensors = file.open()
    pairs, _ = pairs_of(tensors.entries, _SPELLING)
    whole = {module: pair for module, pair in pairs.items() if pair.a is not None and pair.b is not None}
    updates: dict[str, LowRank] = {}
    stacks: dict[str, dict[str, tuple[LazyTensor, LazyTensor]]] = {}
    for module, pair in whole.items():
        found = _EXPERTS.fullmatch(module)
        if found is None:
            weight, update = _part_of_joined(module, whole, scale, hints) or _plain(module, pair, scale, hints)
            updates[weight] = update
        elif any(factor.numel for factor in pair.factors):
            names = _LAYERS_WITHOUT_GATE if found[1].endswith(_NO_GATE) else _LAYERS
            stacks.setdefault(found[1], {})[names.get(found[2], found[2])] = _stack(module, *pair.factors)
    for owner, layers in stacks.items():
        updates.update(_experts(owner, layers, scale, hints))
    taken = {name for pair in whole.values() for name in pair.names}
    return Adapter(
        config=AdapterConfig(
            declared_ranks={weight: rank * max(1, update.rank // rank) for weight, update in sorted(updates.items())},
            raw=config,
        ),
        updates={weight: (updates[weight],) for weight in sorted(updates)},
        tokenizer=tokenizer_files(bundle),
        other_files=other_files(bundle, (WEIGHTS, CONFIG)),
        unclaimed={name: tensor for name, tensor in tensors.entries.items() if name not in taken},
        notes=(*_notes(pairs, in_file(file.name)), *left_behind(bundle, (WEIGHTS, CONFIG))),
    )


def _notes(pairs: Mapping[str, Pair], where: FindingLocation) -> Iterator[Finding]:
    for module, pair in pairs.items():
        if (pair.a is None) != (pair.b is None):
            present, absent = ("lora_B", "lora_A") if pair.a is None else ("lora_A", "lora_B")
            yield unpaired_factor(in_weights(module, file=where.file), present, absent)


def _plain(module: str, pair: Pair, scale: float | None, hints: Hints) -> tuple[str, LowRank]:
    """(weight, update) of a layer that is not an expert's."""
    a, b = pair.factors
    owner, _, leaf = module.rpartition(".")
    if leaf != _UNEMBED:
        # gpt-oss: Tinker's own code calls the attention `attn`.
        path = module.replace(".attn.", ".self_attn.") if _is_gpt_oss(hints) else module
        return f"{path}.weight", factors.linear(a, b, scale)
    heads = None if hints.weights is None else [name for name in hints.weights if name.endswith("lm_head.weight")]
    if heads is None or heads:
        return heads[0] if heads else "lm_head.weight", factors.linear(a, b, scale)
    # A tied base has one table for both, to which Tinker's own merge adds the update of the head.
    return f"{owner}.embed_tokens.weight", LowRank(b, a, scale, is_embedding=True)


def _part_of_joined(
    module: str, pairs: Mapping[str, Pair], scale: float | None, hints: Hints
) -> tuple[str, LowRank] | None:
    """(weight, update) of the layer that checkpoints join this one into; None where it stands alone.

    Raises: UnsupportedUpdate (LF013): parts above it are missing, or nobody says how long the joined layer is.
    """
    if found := _QKV.fullmatch(module):
        owner, joined = found[1], "in_proj_qkv"
        if hints.weights is not None and _height(owner, joined, hints) is None:
            return None
    elif found := _MIXER.fullmatch(module):
        owner, joined = found[1], "in_proj"
    else:
        return None
    parts = [pairs.get(f"{owner}.{name}") for name in _PARTS[joined]]
    present = [part.factors for part in parts if part is not None]
    if len(present) < len(parts):
        text = f"{' and '.join(_PARTS[joined])}, which the checkpoint fuses, are not all adapted"
        raise UnsupportedUpdate(text, where=in_weights(module))
    tops = [sum(b.shape[0] for _, b in present[:number]) for number in range(len(present) + 1)]
    height = _height(owner, joined, hints)
    if joined == "in_proj" and height is None:
        text = f"only the base has the number of rows of {joined}, into which the checkpoint fuses {found[2]}"
        raise UnsupportedUpdate(text, where=in_weights(module), hint="pass it with --base")
    if (height is not None and tops[-1] > height) or len({tensor.dtype for pair in present for tensor in pair}) > 1:
        text = f"the parts of {joined} must have one dtype and {height} rows as in the base, found {tops[-1]} rows"
        raise ConfigError(text, where=in_weights(module))
    blocks = [(b, [(top, top + b.shape[0])]) for (_, b), top in zip(present, tops, strict=False)]
    update = LowRank(block_columns(blocks, height or tops[-1]), stacked([a for a, _ in present]), scale)
    return f"{owner}.{joined}.weight", update


_LAYER = re.compile(r".*?(layers\.\d+\..+)")


def _height(owner: str, joined: str, hints: Hints) -> int | None:
    """Rows of a joined layer in the base, which may call the list of layers by another name."""
    found = _LAYER.fullmatch(owner)
    end = f".{found[1] if found else owner}.{joined}.weight"
    return next((shape[0] for name, shape in (hints.weights or {}).items() if f".{name}".endswith(end)), None)


def _is_gpt_oss(hints: Hints) -> bool:
    return hints.config.get("model_type") == "gpt_oss"


def _stack(module: str, a: LazyTensor, b: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """(down (experts, rank, in), up (experts, out, rank)). What all experts share stands once in the file."""
    if len(a.shape) != 3 or len(b.shape) != 3 or a.shape[1] != b.shape[2] or not a.numel or not b.numel:
        text = f"expected lora_A (experts or 1, rank, in) and lora_B (experts or 1, out, rank), found {a.shape} and"
        raise ConfigError(f"{text} {b.shape}", where=in_weights(module))
    count = max(a.shape[0], b.shape[0])
    if {a.shape[0], b.shape[0]} - {1, count}:
        raise ConfigError(f"{a.shape[0]} and {b.shape[0]} experts do not fit each other", where=in_weights(module))
    return _repeated(a, count), _repeated(b, count)


def _repeated(tensor: LazyTensor, count: int) -> LazyTensor:
    if tensor.shape[0] == count:
        return tensor

    def read(start: int, stop: int) -> Values:
        import numpy as np

        return np.broadcast_to(tensor.load(), (stop - start, *tensor.shape[1:]))

    return LazyTensor((count, *tensor.shape[1:]), tensor.dtype, read)


def _experts(
    owner: str, layers: Mapping[str, tuple[LazyTensor, LazyTensor]], scale: float | None, hints: Hints
) -> dict[str, LowRank]:
    """The updates of the experts under the names of the base: stacks, or an update an expert."""
    stack = next((name for name in hints.weights or () if name.endswith(f"{owner}.{_STACK}")), None)
    if stack is None:
        return {
            f"{owner}.{expert}.{layer}.weight": LowRank(_one(b, expert), _one(a, expert), scale)
            for layer, (a, b) in layers.items()
            for expert in range(a.shape[0])
        }
    updates = {
        f"{stack.removesuffix(_STACK)}{layer}": LowRank(b, a, scale)
        for layer, (a, b) in layers.items()
        if layer not in _JOINED
    }
    halves = [layers.get(layer) for layer in _JOINED]
    if any(halves):
        updates[stack] = _joined(owner, halves, scale, is_interleaved=_is_gpt_oss(hints))
    return updates


def _one(stack: LazyTensor, expert: int) -> LazyTensor:
    return stack.rows(expert, expert + 1).reshape(*stack.shape[1:])


def _joined(
    owner: str, halves: list[tuple[LazyTensor, LazyTensor] | None], scale: float | None, *, is_interleaved: bool
) -> LowRank:
    """One update of the weight that holds gate and up: one above the other, or row by row in turn (gpt-oss)."""
    present = [half for half in halves if half is not None]
    (count, height, _), cols = present[0][1].shape, present[0][0].shape[2]
    if any(b.shape[:2] != (count, height) or a.shape[2] != cols for a, b in present):
        raise ConfigError("gate_proj and up_proj have different shapes", where=in_weights(owner))
    ranks = [0 if half is None else half[0].shape[1] for half in halves]
    dtypes = {tensor.dtype for half in present for tensor in half}
    if len(dtypes) > 1:
        raise ConfigError("gate_proj and up_proj, which the base fuses, have different dtypes", where=in_weights(owner))
    (dtype,) = dtypes
    runs = (slice(0, None, 2), slice(1, None, 2)) if is_interleaved else (slice(0, height), slice(height, None))

    def up(start: int, stop: int) -> Values:
        import numpy as np

        whole = np.zeros((stop - start, 2 * height, sum(ranks)), dtype.numpy)
        for half, rows, left in zip(halves, runs, (0, ranks[0]), strict=True):
            if half is not None:
                whole[:, rows, left : left + half[1].shape[2]] = half[1].read(start, stop)
        return whole

    def down(start: int, stop: int) -> Values:
        import numpy as np

        return np.concatenate([a.read(start, stop) for a, _ in present], axis=1)

    return LowRank(
        LazyTensor((count, 2 * height, sum(ranks)), dtype, up),
        LazyTensor((count, sum(ranks), cols), dtype, down),
        scale,
    )
