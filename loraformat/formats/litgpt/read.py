"""LitGPT, files to Adapter: headers and the two YAML files.

Source: litgpt 0.5.13, litgpt/lora.py `LoRALinear`, `LoRAQKVLinear`; litgpt/scripts/convert_lit_checkpoint.py
`qkv_reassemble`.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.diagnostics import Finding, FindingLocation, in_file, in_weights
from loraformat.errors import ConfigError, MissingFile, UnsupportedUpdate
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.formats.kit.blocks import block_columns, stacked
from loraformat.formats.kit.findings import not_only_tensors, unpaired_factor
from loraformat.formats.kit.folder import left_behind, other_files, tokenizer_files
from loraformat.formats.kit.pairs.spelling import LORALIB, Pair, pairs_of
from loraformat.formats.kit.scaling import Scaling, scale_of
from loraformat.formats.litgpt.config import OWN_FILES, PARTS, SETTINGS, WEIGHTS, LitConfig, parse
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, TensorFile, Tensors
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

# Names that earlier versions had, and today's.
_RENAMED = {".attn.attn": ".attn.qkv", ".attn.c_attn": ".attn.qkv", ".attn.c_proj": ".attn.proj"}


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a folder of LitGPT, under the names of the Hugging Face checkpoint.

    Raises:
        MissingFile (LF101): no lit_model.pth.lora, or no model_config.yaml.
        ConfigError (LF103): a field that cannot be used, factors that do not fit it, or one that contradicts a hint.
        UnsupportedUpdate (LF013): a module of which the checkpoint's name is not known.
    """
    file = bundle.files.get(WEIGHTS)
    if not isinstance(file, TensorFile):
        raise MissingFile(f"{WEIGHTS} is missing", where=bundle.uri)
    config = parse(bundle, hints)
    tensors = file.open()
    pairs, _ = pairs_of(tensors.entries, LORALIB)
    whole = {_today(module): pair for module, pair in pairs.items() if pair.a is not None and pair.b is not None}
    layers, ranks = _layers(whole, config)
    scaled = {
        weight: LowRank(
            update.up,
            update.down,
            scale_of(config.alpha, config.rank or ranks[weight], Scaling(), hints, in_file(SETTINGS)),
        )
        for weight, update in layers.items()
    }
    taken = {name for pair in pairs.values() if pair.a is not None and pair.b is not None for name in pair.names}
    return Adapter(
        config=AdapterConfig(
            base_model=config.base_model,
            declared_ranks={} if config.rank is None else _declared(scaled, ranks, config.rank),
            raw=config.raw,
        ),
        updates={weight: (scaled[weight],) for weight in sorted(scaled)},
        tokenizer=tokenizer_files(bundle),
        other_files=other_files(bundle, OWN_FILES),
        unclaimed={name: tensor for name, tensor in tensors.entries.items() if name not in taken},
        notes=(*_notes(pairs, tensors, in_file(file.name)), *left_behind(bundle, OWN_FILES)),
    )


def _today(module: str) -> str:
    for old, new in _RENAMED.items():
        if module.endswith(old):
            return module.removesuffix(old) + new
    return module


def _declared(scaled: Mapping[str, LowRank], ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """As many times the stated rank as there are joined parts."""
    return {weight: rank * (update.rank // ranks[weight]) for weight, update in sorted(scaled.items())}


def _notes(pairs: Mapping[str, Pair], tensors: Tensors, where: FindingLocation) -> list[Finding]:
    notes = []
    for module, pair in pairs.items():
        if (pair.a is None) != (pair.b is None):
            present, absent = ("lora_B", "lora_A") if pair.a is None else ("lora_A", "lora_B")
            notes.append(unpaired_factor(in_weights(module, file=where.file), present, absent))
    if tensors.extras:
        notes.append(not_only_tensors(where, (), sorted(tensors.extras)))
    return notes


def _layers(pairs: Mapping[str, Pair], config: LitConfig) -> tuple[dict[str, LowRank], dict[str, int]]:
    """(weight → update without its scale, weight → the rank by which alpha is divided)."""
    found: dict[str, LowRank] = {}
    ranks: dict[str, int] = {}
    for module, pair in pairs.items():
        a, b = pair.factors
        if len(a.shape) != 2 or len(b.shape) != 2 or not b.shape[1] or a.shape[0] % b.shape[1]:
            raise ConfigError(
                f"expected A (rank, in) and B (out, rank), found {a.shape} and {b.shape}", where=in_weights(module)
            )
        if module.endswith(".attn.qkv"):
            made = _attention(module, a, b, config)
        elif module.endswith((".mlp.fc_1", ".mlp.fc_2")) and config.family.gate_up:
            made = _gate_up(module, pairs, config)
        else:
            made = {_name(module, config): LowRank(b, a, None)}
        found.update({f"{name}.weight": update for name, update in made.items()})
        ranks.update({f"{name}.weight": b.shape[1] for name in made})
    return found, ranks


def _name(module: str, config: LitConfig) -> str:
    name = config.family.module(module)
    if name is None:
        raise UnsupportedUpdate("the name of this module in checkpoints is unknown", where=in_weights(module))
    return name


def _attention(module: str, a: LazyTensor, b: LazyTensor, config: LitConfig) -> dict[str, LowRank]:
    """Query, key and value, as far as they are adapted: three updates, or one where the checkpoint joins them."""
    rank = b.shape[1]
    enabled = config.enabled or ((True, True, True) if a.shape[0] == 3 * rank else None)
    if enabled is None:
        raise ConfigError(
            f"{a.shape[0] // rank} of query, key and value are adapted, but {SETTINGS}, which tells which, is missing",
            where=in_weights(module),
            hint="--assume enable_lora=[true,false,true] for query and value",
        )
    numbers = [number for number, is_on in enumerate(enabled) if is_on]
    heights = [config.sizes[number] for number in numbers]
    if a.shape[0] != len(numbers) * rank or b.shape[0] != sum(heights):
        expected = f"A ({len(numbers) * rank}, in) and B ({sum(heights)}, {rank})"
        raise ConfigError(f"expected {expected}, found {a.shape} and {b.shape}", where=in_weights(module))
    parts: dict[int, tuple[LazyTensor, LazyTensor]] = {}
    top = 0
    for order, (number, height) in enumerate(zip(numbers, heights, strict=True)):
        parts[number] = (a.rows(order * rank, (order + 1) * rank), b.rows(top, top + height))
        top += height
    if not config.family.joined:
        path = module.removesuffix("attn.qkv")
        return {_name(f"{path}{PARTS[number]}", config): LowRank(b, a, None) for number, (a, b) in parts.items()}
    blocks = [(part_b, config.runs(number)) for number, (_, part_b) in parts.items()]
    joined = _joined(module, config.family.joined, config)
    return {joined: LowRank(block_columns(blocks, sum(config.sizes)), a, None)}


def _joined(module: str, path: str, config: LitConfig) -> str:
    number = module.split(".")[2]
    return f"{config.family.layers}.{number}.{path}"


def _gate_up(module: str, pairs: Mapping[str, Pair], config: LitConfig) -> dict[str, LowRank]:
    """The weight that holds `fc_1` above `fc_2`."""
    path = module.rpartition(".")[0]
    halves = [pairs.get(f"{path}.{name}") for name in ("fc_1", "fc_2")]
    factors = [half.factors for half in halves if half is not None]
    if len(factors) < 2:
        raise UnsupportedUpdate(
            "only one of fc_1 and fc_2 is adapted, but the checkpoint fuses them", where=in_weights(module)
        )
    if len({tensor.dtype for pair in factors for tensor in pair}) > 1:
        raise UnsupportedUpdate(
            "fc_1 and fc_2, which the checkpoint fuses, have different dtypes", where=in_weights(module)
        )
    heights = [b.shape[0] for _, b in factors]
    blocks = [(factors[0][1], [(0, heights[0])]), (factors[1][1], [(heights[0], sum(heights))])]
    up = block_columns(blocks, sum(heights))
    return {_joined(path, config.family.gate_up, config): LowRank(up, stacked([a for a, _ in factors]), None)}
