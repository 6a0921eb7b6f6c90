"""How an output is loaded, by the programs that load its kind."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.jobs.card.escaping import python_text, shell_text
from loraformat.jobs.card.facts import Facts

_IMAGE = ("diffusers", "kohya", "comfy", "lycoris", "xlabs")


def snippets(facts: Facts, name: str) -> Iterator[tuple[str, str, str]]:
    """(program, language, lines) for each program that loads the output.

    Args:
        name: of the repository, or a path.
    """
    if facts.relation == "adapter":
        yield from _of_adapter(facts, name)
    elif facts.format == "gguf":
        weights = facts.weights[0] if facts.weights else "model.gguf"
        yield "llama.cpp", "sh", f"{_fetch(name, weights)}\nllama-cli -m {shell_text(weights)}"
    elif facts.format == "diffusers":
        yield "diffusers", "python", _lines("from diffusers import DiffusionPipeline", f"{_PIPE}({python_text(name)})")
    elif facts.format == "component":
        yield "diffusers", "python", _lines("from diffusers import AutoModel", f"{_MODEL}({python_text(name)})")
    else:
        load = f"model = {facts.auto_class}.from_pretrained({python_text(name)}, dtype={python_text('auto')})"
        lines = [f"from transformers import {facts.auto_class}, AutoTokenizer", "", load]
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({python_text(name)})")
        yield "transformers", "python", _lines(*lines)
        if facts.auto_class == "AutoModelForCausalLM":
            yield "vLLM", "sh", f"vllm serve {shell_text(name)}"


_PIPE = "pipe = DiffusionPipeline.from_pretrained"
_MODEL = "model = AutoModel.from_pretrained"


def _of_adapter(facts: Facts, name: str) -> Iterator[tuple[str, str, str]]:
    base = facts.base or facts.base_label or "BASE"
    weights = facts.weights[0] if facts.weights else ""
    if facts.format == "peft":
        yield "PEFT", "python", _peft(facts, base, name)
        if facts.auto_class == "AutoModelForCausalLM" and "lora" in facts.tags:
            ranks = max(facts.summary.ranks, default=16) if facts.summary is not None else 16
            served = f"vllm serve {shell_text(base)} --enable-lora --max-lora-rank {_rank(ranks)}"
            yield "vLLM", "sh", f"{served} --lora-modules adapter={shell_text(name)}"
    elif facts.format in _IMAGE:
        load = f"pipe.load_lora_weights({python_text(name)}, weight_name={python_text(weights)})"
        opened = f"{_PIPE}({python_text(base)})"
        yield "diffusers", "python", _lines("from diffusers import DiffusionPipeline", "", opened, load)
    elif facts.format == "gguf":
        yield "llama.cpp", "sh", f"{_fetch(name, weights)}\nllama-cli -m BASE.gguf --lora {shell_text(weights)}"
    elif facts.format == "mlx":
        command = f"mlx_lm.generate --model {shell_text(base)} --adapter-path ADAPTER --prompt {shell_text('Hello')}"
        yield "MLX", "sh", f"hf download {shell_text(name)} --local-dir ADAPTER\n{command}"
    else:
        yield "PEFT, after a conversion", "sh", f"loraformat convert hf://{shell_text(name)} --to peft -o adapter"


def _peft(facts: Facts, base: str, name: str) -> str:
    lines = ["from peft import PeftModel", f"from transformers import {facts.auto_class}", ""]
    lines.append(f"model = {facts.auto_class}.from_pretrained({python_text(base)}, dtype={python_text('auto')})")
    summary = facts.summary
    if summary is not None and summary.new_rows:
        lines.append(f"model.resize_token_embeddings({summary.vocab_size})")
    return _lines(*lines, f"model = PeftModel.from_pretrained(model, {python_text(name)})")


def _fetch(name: str, file: str) -> str:
    return f"hf download {shell_text(name)} {shell_text(file)} --local-dir ."


def _rank(rank: int) -> int:
    """The least value of --max-lora-rank that serves a rank."""
    return next((each for each in (8, 16, 32, 64, 128, 256, 320, 512) if each >= rank), rank)


def _lines(*lines: str) -> str:
    return "\n".join(lines)
