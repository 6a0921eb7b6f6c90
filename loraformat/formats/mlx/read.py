"""MLX, files to Adapter: headers and adapter_config.json only.

Source: mlx-lm 0.32.2, mlx_lm/tuner/lora.py `LoRALinear`, `LoRAEmbedding`, `LoRASwitchLinear`; dora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraformat.diagnostics import Finding, FindingLocation, in_file, in_weights
from loraformat.errors import ConfigError, FormatError, MissingFile, UnsupportedUpdate
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.formats.kit.findings import (
    announced_but_absent,
    scale_by_definition,
    scale_of_two_versions,
    unpaired_factors,
)
from loraformat.formats.kit.folder import left_behind, other_files, tokenizer_files
from loraformat.formats.kit.scaling import agreed, option_of
from loraformat.formats.mlx.config import ARRAYS, CONFIG, OWN_FILES, WEIGHTS, MlxConfig, parse
from loraformat.formats.mlx.experts import experts_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, JsonFile, TensorFile
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Magnitude

# What mlx-examples/lora multiplied by; its files have no config.
# Source: mlx-examples 2024-01, lora/models.py `LoRALinear.__init__`.
_EXAMPLES_SCALE = 20.0

_PARTS = {"lora_a": "a", "lora_b": "b", "A": "a", "B": "b", "m": "m"}
_TABLES = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in")

Parts = Mapping[str, LazyTensor]


@dataclass(slots=True)
class _Found:
    updates: dict[str, LowRank] = field(default_factory=dict)
    unclaimed: dict[str, LazyTensor] = field(default_factory=dict)
    notes: list[Finding] = field(default_factory=list)


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of an MLX-LM folder, of an old mlx-vlm one, or of the adapters.npz of mlx-examples.

    Raises:
        MissingFile (LF101): no weights, or no config beside adapters.safetensors.
        ConfigError (LF103): a field that cannot be used, or one that contradicts a hint.
        UnsupportedUpdate (LF013): whole weights (`fine_tune_type` "full"); stacked experts without the base's names.
        FormatError (LF012): two names mean the same tensor.
    """
    file = _weights(bundle)
    config = _config(bundle, file, hints)
    rank = agreed(config.rank, hints.rank, "rank", in_file(CONFIG))
    # The user decides between the two factors that an old mlx-vlm file may mean.
    is_chosen = config.is_raw_alpha and hints.scale is not None
    scale = hints.scale
    if not is_chosen:
        hinted = _hinted(config, hints)
        scale = agreed(config.scale, hinted, "a scale of", in_file(CONFIG), option=option_of(hints))
    tensors = file.open()
    modules, found = _sorted(tensors.entries, in_file(file.name))
    if config.scale is None and scale is None and file.name.endswith(".npz"):
        scale = _EXAMPLES_SCALE
        found.notes.append(scale_by_definition(in_file(file.name), scale, "mlx-examples/lora"))
    if config.is_raw_alpha and not is_chosen and scale is not None and rank not in (None, 1):
        assert rank is not None
        found.notes.append(scale_of_two_versions(in_file(CONFIG, "alpha"), scale, scale / rank, "mlx-vlm"))
    for module, parts in modules.items():
        _layer(module, parts, scale, config, hints, found)
    plain = [weight for weight, update in found.updates.items() if update.magnitude is None]
    if config.is_dora and plain:
        found.notes.append(announced_but_absent(in_file(file.name), 'the config says "dora"', plain))
    return Adapter(
        config=AdapterConfig(
            base_model=config.base_model,
            declared_ranks={} if rank is None else dict.fromkeys(sorted(found.updates), rank),
            raw=config.raw,
        ),
        updates={weight: (found.updates[weight],) for weight in sorted(found.updates)},
        tokenizer=tokenizer_files(bundle),
        other_files=other_files(bundle, (*OWN_FILES, file.name)),
        unclaimed=found.unclaimed,
        notes=(*found.notes, *left_behind(bundle, (CONFIG, file.name))),
    )


def _weights(bundle: Bundle) -> TensorFile:
    for name in (WEIGHTS, ARRAYS):
        file = bundle.files.get(name)
        if isinstance(file, TensorFile):
            return file
    files = bundle.tensor_files()
    if bundle.is_single_file and files:
        return files[0]
    raise MissingFile(f"neither {WEIGHTS} nor {ARRAYS} is present", where=bundle.uri)


def _config(bundle: Bundle, weights: TensorFile, hints: Hints) -> MlxConfig:
    file = bundle.files.get(CONFIG)
    if isinstance(file, JsonFile):
        return parse(file.load(), hints)
    if bundle.is_single_file or weights.name.endswith(".npz"):
        return MlxConfig(raw={})
    hint = "it belongs next to the weights; to do without it, pass the file alone with --assume scale=S"
    raise MissingFile(f"{CONFIG} is missing", where=bundle.uri, hint=hint)


def _hinted(config: MlxConfig, hints: Hints) -> float | None:
    if hints.alpha is None:
        return hints.scale
    rank = agreed(config.rank, hints.rank, "rank", in_file(CONFIG))
    if rank is None:
        raise ConfigError(
            "alpha needs the rank as well", where=in_file(CONFIG), hint="use --assume scale=S to state the scale itself"
        )
    return agreed(hints.scale, hints.alpha / rank, "a scale of", in_file(CONFIG))


def _sorted(entries: Parts, where: FindingLocation) -> tuple[dict[str, dict[str, LazyTensor]], _Found]:
    modules: dict[str, dict[str, LazyTensor]] = {}
    found = _Found()
    for name, tensor in entries.items():
        module, _, last = name.rpartition(".")
        part = _PARTS.get(last)
        if not module or part is None:
            found.unclaimed[name] = tensor
        elif part in modules.setdefault(module, {}):
            raise FormatError(f"{name}: the module has this factor twice", where=where)
        else:
            modules[module][part] = tensor
    return modules, found


def _layer(module: str, parts: Parts, scale: float | None, config: MlxConfig, hints: Hints, found: _Found) -> None:
    if not {"a", "b"} <= parts.keys():
        found.notes += unpaired_factors(module, {f"lora_{part}" for part in parts}, ("lora_a", "lora_b"))
        found.unclaimed.update({f"{module}.{part}": tensor for part, tensor in parts.items()})
        return
    a, b = parts["a"], parts["b"]
    if len(a.shape) == 3 or len(b.shape) == 3:
        found.updates.update(experts_of(module, a, b, scale, hints))
        return
    if config.is_raw_alpha and "m" in parts:
        raise UnsupportedUpdate("a magnitude in the layout of old mlx-vlm, which had no DoRA", where=in_weights(module))
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ConfigError(f"expected matrices, found lora_a {a.shape}, lora_b {b.shape}", where=in_weights(module))
    magnitude = Magnitude(parts["m"], axis=1) if "m" in parts else None
    if module in config.tables or _is_table(module, (a.shape[0], b.shape[1]), hints):
        update = LowRank(a, b, scale, magnitude, is_embedding=True)
    else:
        update = LowRank(b.T, a.T, scale, magnitude)
    found.updates[f"{module}.weight"] = update


def _is_table(module: str, size: tuple[int, int], hints: Hints) -> bool:
    """Whether the factors are an embedding's, (vocabulary, rank) and (rank, dim): the base says so, else the name."""
    stored = (hints.weights or {}).get(f"{module}.weight")
    if stored in (size, size[::-1]) and size[0] != size[1]:
        return stored == size
    return module.rpartition(".")[2] in _TABLES
