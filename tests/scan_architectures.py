"""Merges into every class that the installed transformers builds from a tiny config: `make test-architectures`.

Each class of the auto tables is built with small sizes and random weights, saved by transformers, adapted by PEFT on
all its linear layers, and merged by loraformat. The merged folder is loaded by the class, and each of its tensors is
compared with that of PEFT's merged model. It prints a line for each class that differs or is refused, the figures last.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLES = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION"),
    *("QUESTION_ANSWERING", "IMAGE_TEXT_TO_TEXT", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "OBJECT_DETECTION"),
    *("SPEECH_SEQ_2_SEQ", "CTC", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION"),
)
SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 16
    ),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "n_inner"), 24),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head", "n_heads"), 2
    ),
    **dict.fromkeys(("num_heads", "num_key_value_heads"), 2),
    "head_dim": 8,
    "d_kv": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "depth": 2,
    "num_mel_bins": 16,
    "type_vocab_size": 2,
    "hidden_dim": 24,
}
MOST_PARAMETERS = 30_000_000
MOST_SECONDS = 60
_KINDS = ("PEFT refuses", "no linear layer", "refused")


def classes() -> Iterator[tuple[str, str]]:
    """(model type, class), each class once."""
    from transformers.models.auto import modeling_auto

    seen = set()
    for table in TABLES:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).items():
            for name in names if isinstance(names, tuple) else (names,):
                if name not in seen:
                    seen.add(name)
                    yield model_type, name


def shrink(config: Any) -> Any:
    layers = getattr(config, "num_hidden_layers", None)
    for name, size in SIZES.items():
        if isinstance(getattr(config, name, None), int):
            with contextlib.suppress(AttributeError, NotImplementedError, ValueError):
                setattr(config, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), 3))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layers:  # one entry for each layer
            setattr(config, name, value[: SIZES["num_hidden_layers"]])
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            shrink(getattr(config, name))
    return config


def built(model_type: str, name: str) -> Any:
    """A small model of the class; raises whatever the class raises."""
    import torch
    import transformers

    config = shrink(transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]())
    with torch.device("meta"):
        count = sum(value.numel() for value in getattr(transformers, name)(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters, however small the config")
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval().float()


def linear_layers(model: Any) -> list[str]:
    import torch
    import transformers

    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [name for name, part in model.named_modules() if type(part) in kinds and part is not head]


def difference(name: str, model: Any, folder: Path) -> str:
    """Merges, and says what is not as PEFT has it; "" for nothing."""
    import peft
    import torch
    import transformers

    import loraformat
    from loraformat.errors import LoraFormatError

    model.save_pretrained(folder / "base")
    targets = linear_layers(model)
    if not targets:
        return "no linear layer"
    try:
        both = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    except ValueError as error:
        return f"PEFT refuses: {error}"
    for key, value in both.named_parameters():
        if "lora_" in key:
            value.data = torch.randn_like(value) * 0.2
    both.save_pretrained(folder / "adapter")
    try:
        loraformat.merge(str(folder / "base"), [str(folder / "adapter")], str(folder / "out"))
    except LoraFormatError as error:
        return f"refused: {error}"
    wanted = both.merge_and_unload().state_dict()
    merged, info = getattr(transformers, name).from_pretrained(folder / "out", output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        return f"the merged model lacks {sorted(info['missing_keys'])[:2]}"
    found = merged.state_dict()
    far = [key for key, value in wanted.items() if not torch.allclose(found[key].float(), value.float(), atol=1e-4)]
    return f"{len(far)} tensors differ, first {far[0]}" if far else ""


def too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {MOST_SECONDS} s")


def scan(wanted: list[str], part: int, parts: int) -> Counter[str]:
    """One line for each class that is not merged as PEFT merges it, and how many classes ended how."""
    counts: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, too_slow)
    for number, (model_type, name) in enumerate(classes()):
        if (wanted and name not in wanted) or number % parts != part:
            continue
        signal.alarm(MOST_SECONDS)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                model = built(model_type, name)
        except Exception as error:  # noqa: BLE001 - what a class needs beside a config is its own business
            counts["not built from a small config"] += 1
            print(f"{name}: not built: {type(error).__name__}: {str(error).strip()[:80]!r}", file=sys.stderr)
            continue
        finally:
            signal.alarm(0)
        signal.alarm(MOST_SECONDS)
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                told = difference(name, model, Path(folder))
        except Exception as error:  # noqa: BLE001 - the scan goes on
            told = f"{type(error).__name__}: {str(error).strip()[:120]}"
        finally:
            signal.alarm(0)
        counts[next((start for start in _KINDS if told.startswith(start)), "differs") if told else "equal"] += 1
        if told:
            print(f"{name}: {told[:300]}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes; all where none is named")
    parser.add_argument("--part", default="0/1", help="n/m: every m-th class, from the n-th on")
    arguments = parser.parse_args()
    part, parts = (int(number) for number in arguments.part.split("/"))
    counts = scan(arguments.names, part, parts)
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    return 1 if counts["differs"] or counts["refused"] else 0


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    sys.exit(main())
