"""Names what is not supported: other formats, and folders and files that are not an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from loraformat.diagnostics import show
from loraformat.errors import LoraFormatError
from loraformat.formats.kit.fields import readable
from loraformat.formats.kit.folder import is_training_state
from loraformat.model.bundle import Bundle, TensorFile
from loraformat.model.checkpoint import PIPELINE

# The names of a file → whose they are. Each is a spelling that no transformer of a single person's code has.
# Source: sd-scripts, networks/lora.py; diffusers 0.42.1, loaders/lora_conversion_utils.py; ComfyUI, comfy/lora.py;
# x-flux; NeMo 1.x, parts/peft_config.py; llama.cpp, gguf-py.
_DIALECTS = (
    (r"model\.language_model\.encoder\.layers\.", "an adapter of NeMo or Megatron"),
    (r"blk\.[0-9]+\.", "an adapter in llama.cpp's names"),
)
_PATTERNS = tuple((re.compile(pattern), whose) for pattern, whose in _DIALECTS)


def dialect_of(names: Iterable[str]) -> tuple[str, str] | None:
    """(whose names they are, the first such name); None where they are nobody's that is known."""
    for name in names:
        for pattern, whose in _PATTERNS:
            if pattern.match(name):
                return whose, name
    return None


_FIRST = 3
# Names under which save_pretrained writes a model. Source: transformers 5, utils/__init__.py, `SAFE_WEIGHTS_NAME` ...
_MODEL_FILE = re.compile(
    r"(model|pytorch_model|consolidated|diffusion_pytorch_model)([-.][\w.-]*)?\.(safetensors|bin|pth|pt)"
)
# Weights that every language model has, under the names of most.
_MODEL_WEIGHT = re.compile(r"(.*\.)?(embed_tokens|wte|tok_embeddings|word_embeddings|lm_head|token_embedding)\.weight")
# Source: DeepSpeed edaa722, runtime/engine.py `_get_ckpt_name`, `_get_zero_ckpt_name`.
_DEEPSPEED = re.compile(r"((bf16_|fp16_)?zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt")
_OPTIMIZER = re.compile(r"(.*\.)?(exp_avg|exp_avg_sq|momentum_buffer)$")
_EXPECTED = "expected an adapter here"


def described(bundle: Bundle) -> tuple[str, str]:
    """(what a bundle is that is not an adapter, what to do); "" and "" where that is unknown."""
    pipeline = readable(bundle, PIPELINE)
    if isinstance(pipeline, Mapping):
        of = _named(pipeline.get("_class_name"))
        hint = f"{_EXPECTED}; pass a pipeline as BASE in merge BASE ADAPTER -o OUT, or with --base"
        return f"a diffusers pipeline{of}", hint
    gguf = next((name for name in bundle.files if name.lower().endswith(".gguf")), None)
    if gguf is not None:
        return "a GGUF model", f"{_EXPECTED}; pass a model as BASE in merge BASE ADAPTER -o OUT, or with --base"
    if any(name.endswith(".distcp") for name in bundle.files):
        what = "a torch.distributed checkpoint without .metadata, which describes its .distcp files"
        return what, "pass the folder with both"
    if isinstance(bundle.files.get(".metadata"), TensorFile):
        what = "a torch.distributed checkpoint without an adapter in Megatron's names"
        return what, "export it with the trainer's own code, for Megatron Bridge export_adapter.py"
    if found := _of_trainer(bundle):
        return found
    weights = [file for file in bundle.tensor_files() if not is_training_state(file.name)]
    if not weights:
        is_state = bool(bundle.tensor_files())
        return (
            ("the state of an optimizer or a trainer", f"{_EXPECTED}: pass the folder with its weights and its config")
            if is_state
            else ("", "")
        )
    names = _names(weights[0])
    if _is_optimizer(weights[0], names):
        return "the state of an optimizer", f"{_EXPECTED}: pass the file with the weights"
    if is_full_model(bundle):
        config = readable(bundle, "config.json")
        listed = config.get("architectures") if isinstance(config, Mapping) else None
        of = _named(listed[0] if isinstance(listed, list) and listed else None)
        return f"a full model{of}", f"{_EXPECTED}; pass a model as BASE in merge BASE ADAPTER -o OUT, or with --base"
    return "", ""


def _of_trainer(bundle: Bundle) -> tuple[str, str] | None:
    # Source: Megatron-LM d98e8a6, core/dist_checkpointing/core.py `CheckpointingConfig`.
    stated = readable(bundle, "metadata.json")
    backend = stated.get("sharded_backend") if isinstance(stated, Mapping) else None
    if isinstance(backend, str) and backend != "torch_dist":
        hint = "save it as torch_dist, or export it with Megatron's own code"
        return f"a Megatron checkpoint stored by {show(backend, 40)}, which is not supported", hint
    if any(_DEEPSPEED.fullmatch(name) for name in bundle.files):
        hint = "run zero_to_fp32.py from the parent folder, and pass the folder with adapter_config.json"
        return "a DeepSpeed training state, whose parameters are sharded", hint
    config = readable(bundle, "adapter_config.json")
    # Source: ms-swift 3602360, tuners/utils.py `SwiftConfig`, tuners/mapping.py.
    tuner = config.get("swift_type") if isinstance(config, Mapping) and "peft_type" not in config else None
    if isinstance(tuner, str):
        return f"an adapter of the tuner {show(tuner, 40)} of ms-swift, which is not supported", _EXPECTED
    return None


def _is_optimizer(file: TensorFile, names: Sequence[str]) -> bool:
    if names:
        return any(map(_OPTIMIZER.match, names)) and not any(map(_MODEL_WEIGHT.match, names))
    try:
        return any(key.rpartition(".")[2] == "param_groups" for key in file.open().extras)
    except LoraFormatError:
        return False


def is_full_model(bundle: Bundle) -> bool:
    """Whether the files are a model and no adapter, by its config, the names of its files or of its weights."""
    weights = [file for file in bundle.tensor_files() if not is_training_state(file.name)]
    if not weights or dialect_of(names := _names(weights[0])) or with_pairs(bundle):
        return False
    config = readable(bundle, "config.json")
    if isinstance(config, Mapping) and ("model_type" in config or "architectures" in config):
        return True
    return any(_MODEL_FILE.fullmatch(file.name) for file in weights) or any(map(_MODEL_WEIGHT.match, names))


def with_pairs(bundle: Bundle) -> str:
    """The first weight file in which a name speaks of LoRA; "" for none."""
    files = (file for file in bundle.tensor_files() if not is_training_state(file.name))
    return next((file.name for file in files if any("lora" in name.lower() for name in _names(file))), "")


def first_names(bundle: Bundle) -> str:
    """What the tensors of the first weight file are called, for a message; "" where there are none."""
    file = next((each for each in bundle.tensor_files() if not is_training_state(each.name)), None)
    names = [] if file is None else _names(file)
    if file is None or not names:
        return ""
    more = f" and {len(names) - _FIRST} more" if len(names) > _FIRST else ""
    return f"{show(file.name, 60)} holds {', '.join(show(name, 80) for name in names[:_FIRST])}{more}"


def _names(file: TensorFile) -> list[str]:
    try:
        return list(file.open().entries)
    except LoraFormatError:  # what is wrong with it is said by the rules
        return []


def _named(name: object) -> str:
    return f" ({show(name, 60)})" if isinstance(name, str) and name else ""
