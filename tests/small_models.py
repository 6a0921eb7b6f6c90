"""Small random models of every class in the auto tables of transformers, and inputs that they take."""

from __future__ import annotations

import contextlib
import inspect
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 16
    ),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "n_inner"), 24),
    **dict.fromkeys(
        ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head", "n_heads"), 2
    ),
    **dict.fromkeys(("num_heads", "num_key_value_heads"), 2),
    "head_dim": 8,
    "d_kv": 8,
    "d_head": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "moe_intermediate_size": 12,
    "num_mel_bins": 16,
    "type_vocab_size": 2,
    "hidden_dim": 24,
}
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    "num_experts_per_tok": 2,
}
LAYERS, VOCABULARY = 2, 64
_LAYER_COUNT = re.compile(r"(num_hidden_layers|((\w+_)?(en|de)coder_)?layers|n_layers?|num_layers|depth|num_blocks)")
_VOCABULARY = re.compile(r"(\w+_)?vocab_size(_\w+)?|n_words")
_WIDTH = re.compile(
    r"\w*(hidden_size|hidden_dim|intermediate_size|ffn_dim|d_model|d_ff|embed_dim|n_embd|n_inner|_heads|n_head|d_latents"
    r"|lora_rank|embedding_size|proj_dim|projection_dim|out_hidden_size|hidden_sizes|channels_list)"
)
_WORDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")

MOST_PARAMETERS = 30_000_000
MOST_WITHOUT_INPUT = 3  # then no other size will take one

Fields = dict[str, Any]
Sizes = Callable[[Fields], Fields]


def classes() -> Iterator[tuple[str, str]]:
    """(model type, class) of every table of the installed transformers, each class once."""
    from transformers.models.auto import modeling_auto

    tables = [name for name in vars(modeling_auto) if re.fullmatch(r"MODEL_(FOR_\w+_)?MAPPING_NAMES", name)]
    seen = set()
    for table in sorted(tables, key=lambda name: name == "MODEL_MAPPING_NAMES"):
        for model_type, names in getattr(modeling_auto, table).items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in seen:
                    seen.add(name)
                    yield model_type, name


def configs(config_class: Any) -> Iterator[Any]:
    """Configs of a class, from the smallest to its default: some sizes fit together only in some of them."""
    for sizes in (
        (_layers, _vocabulary, _fixed),
        (_layers, _vocabulary, _fixed, _filled),
        (_layers, _vocabulary, _divided(16)),
        (_layers, _vocabulary, _divided(4)),
        (_vocabulary, _fixed),
        (_vocabulary, _divided(16)),
        (_layers, _vocabulary),
        (_layers,),
        (),
    ):
        with contextlib.suppress(Exception):
            yield small(config_class(), sizes)
        config = config_class()
        _set_all(config, sizes)
        yield config


def small(config: Any, sizes: tuple[Sizes, ...]) -> Any:
    """A config made anew with smaller sizes, from which it derives others; and so for the configs inside of it."""
    changes = changed(config, sizes)
    for name in config.sub_configs:
        if hasattr(vars(config).get(name), "sub_configs"):
            changes[name] = small(vars(config)[name], sizes)
    return type(config)(**changes)


def _set_all(config: Any, sizes: tuple[Sizes, ...]) -> None:
    """The same in place, for a config that is not made from its own fields."""
    for name, value in changed(config, sizes).items():
        with contextlib.suppress(AttributeError, NotImplementedError, ValueError):
            setattr(config, name, value)
    for name in config.sub_configs:
        if hasattr(vars(config).get(name), "sub_configs"):
            _set_all(vars(config)[name], sizes)


def changed(config: Any, sizes: tuple[Sizes, ...]) -> dict[str, Any]:
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    return {name: value for each in sizes for name, value in each(fields).items()}


def _layers(fields: Fields) -> Fields:
    counts = {name: value for name, value in fields.items() if type(value) is int and _LAYER_COUNT.fullmatch(name)}
    lists = {
        name: value[:LAYERS] if value[0] != value[LAYERS - 1] else type(value)((value[0], value[-1]))
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) > LAYERS and len(value) in counts.values()
    }
    depths = {name: type(value)(1 for _ in value) for name, value in fields.items() if name == "depths" and value}
    return {**{name: min(value, LAYERS) for name, value in counts.items()}, **lists, **depths}


def _vocabulary(fields: Fields) -> Fields:
    """Few words, and ids of special tokens among them: the common ones low, all others from the end."""
    found: Fields = {}
    last = VOCABULARY
    for name, value in fields.items():
        if type(value) is not int:
            continue
        if _VOCABULARY.fullmatch(name) and name != "type_vocab_size":
            found[name] = min(value, VOCABULARY)
        elif name in _WORDS:
            found[name] = min(value, 3)
        elif re.fullmatch(r"\w*(token_id|token_index)", name) and value >= VOCABULARY:
            last -= 1
            found[name] = last
    return found


def _fixed(fields: Fields) -> Fields:
    return {name: size for name, size in {**SIZES, **EXPERTS}.items() if type(fields.get(name)) is int}


def _filled(fields: Fields) -> Fields:
    """Where the default is None."""
    return {name: size for name, size in SIZES.items() if name in fields and fields[name] is None}


def _divided(factor: int) -> Sizes:
    """Widths and counts of heads over one factor, so that they stay multiples of each other."""

    def over(value: int) -> int:
        return max(1, value // factor)

    def divide(fields: Fields) -> Fields:
        found: Fields = {
            name: min(fields[name], most) for name, most in EXPERTS.items() if type(fields.get(name)) is int
        }
        for name, value in fields.items():
            if _WIDTH.fullmatch(name) and type(value) is int:
                found[name] = over(value)
            elif _WIDTH.fullmatch(name) and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
                found[name] = type(value)(over(v) for v in value)
        return found

    return divide


def _get(config: Any, *names: str) -> Iterator[Any]:
    """The values of those names that the config has; some raise where layers differ."""
    for name in names:
        with contextlib.suppress(AttributeError, ValueError):
            yield getattr(config, name)


def built(model_type: str, name: str, seconds: int) -> tuple[Any, dict[str, Any]]:
    """A small model of the class, and inputs of its forward pass or {} where none are found.

    Raises: what the class raises for the smallest config, where it takes none of them.
    """
    import transformers

    found: list[Any] = []
    reasons: list[Exception] = []
    own = getattr(transformers, name).config_class
    mapped = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    for config in configs(own or mapped):
        signal.alarm(seconds)
        try:
            model = _instance(name, config)
            inputs = inputs_of(model)
        except Exception as error:  # noqa: BLE001 - what a class needs beside a config is its own business
            reasons.append(error.with_traceback(None))  # whose frames hold the model
            continue
        finally:
            signal.alarm(0)
        if inputs:
            return model, inputs
        found.append(model)
        if len(found) == MOST_WITHOUT_INPUT:
            break
    if not found:
        raise reasons[0]
    return found[0], {}


def _instance(name: str, config: Any) -> Any:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)  # raises where sizes contradict each other
    with torch.device("meta"):
        count = sum(value.numel() for value in getattr(transformers, name)(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters, however small the config")
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval().float()
    for value in model.parameters():
        if not value.isfinite().all():  # never initialized
            torch.nn.init.normal_(value, std=0.02)
    return model


def inputs_of(model: Any) -> dict[str, Any]:
    """Inputs with which the forward pass gives finite numbers; {} where none are found."""
    import torch

    for inputs in _candidates(model):
        try:
            numbers = outputs(model, inputs)
        except TimeoutError:
            raise
        except Exception:  # noqa: BLE001 - the next candidate
            continue
        if numbers and all(torch.isfinite(value).all() for value in numbers):
            return inputs
    return {}


def outputs(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """All floating tensors that the forward pass returns, from the same random state each time."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        return list(_tensors(model(**inputs)))


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _candidates(model: Any) -> Iterator[dict[str, Any]]:
    parameters = inspect.signature(model.forward).parameters
    values = {name: several for name, several in _values(model).items() if name in parameters}
    needed = {name for name, each in parameters.items() if each.default is each.empty and name in values}
    main = getattr(model, "main_input_name", "input_ids")
    base = [name for name in (main, *sorted(needed), "decoder_input_ids") if name in values]
    sets = [list(values), base, [*base, "input_ids"], [*base, "pixel_values"], ["input_ids"], ["pixel_values"]]
    for names in dict.fromkeys(tuple(dict.fromkeys(name for name in each if name in values)) for each in sets):
        for number in range(max((len(values[name]) for name in names), default=0)):
            yield {name: values[name][min(number, len(values[name]) - 1)] for name in names}
    with contextlib.suppress(Exception):
        yield dict(model.dummy_inputs)


def _values(model: Any) -> dict[str, list[Any]]:
    """Parameter of a forward pass → values to try for it."""
    import torch

    config = model.config
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    end = next((v for part in parts for v in _get(part, "eos_token_id") if type(v) is int and v < VOCABULARY), 2)
    words = torch.tensor([[5, 9, 7, 11, 6, 13, 8, end]])
    channels = next((v for part in parts for v in _get(part, "num_channels") if type(v) is int), 3)
    sizes = [v for part in parts for v in _get(part, "image_size")]
    frames = next((v for part in parts for v in _get(part, "num_frames") if type(v) is int), 2)
    bins = next((v for part in parts for v in _get(part, "num_mel_bins", "feature_size") if type(v) is int), 80)
    steps = next((2 * v for part in parts for v in _get(part, "max_source_positions") if type(v) is int), 64)
    images = [_ramp(1, channels, *_pair(size)) for size in dict.fromkeys((*map(_pair, sizes), (64, 64), (224, 224)))]
    videos = [_ramp(1, frames, *image.shape[1:]) for image in images]
    length = next((v for part in parts for v in _get(part, "max_length") if type(v) is int), 128)
    sound = [_ramp(1, 4000), _ramp(1, 1, 4000), _ramp(1, length, bins), _ramp(1, 64, bins)]
    return {
        "input_ids": [words, words[:, None].expand(1, 2, 8), words[:, None].expand(1, 8, 8)],
        "decoder_input_ids": [words[:, :4]],
        "pixel_values": [*images, *videos],
        "pixel_values_videos": videos,
        "input_features": [_ramp(1, bins, steps), _ramp(1, steps, bins), _ramp(1, 64, 160)],
        "input_values": sound,
        "inputs": [words, *images],
        "bbox": [torch.ones(1, 8, 4, dtype=torch.long)],
    }


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else (64, 64)


def _ramp(*shape: int) -> Any:
    import torch

    count = 1
    for side in shape:
        count *= side
    return torch.sin(torch.arange(count, dtype=torch.float32)).reshape(shape)
