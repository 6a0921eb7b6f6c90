"""Log-probabilities of llama.cpp itself, in a process of its own: what it does not load ends that process alone.

Run: python tests/llamacpp/engine.py MODEL [ADAPTER], with prompts as a JSON list of lists of token numbers on stdin.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Which token is chosen does not count, but no answer comes for one that ends the text or has no text.
_NOT_CHOSEN = {str(token): -1000.0 for token in range(3)}


def serve(model: str, adapter: str | None, prompts: Sequence[Sequence[int]]) -> list[dict[int, float]]:
    """For each prompt the log-probability of every next token."""
    import xllamacpp as engine

    params = engine.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_predict = 128, 1, 1
    params.n_gpu_layers, params.warmup = 0, False
    params.cache_prompt = False
    params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [engine.CommonAdapterLoraInfo(adapter, 1.0)]
    server = engine.Server(params)
    found = []
    for prompt in prompts:
        answer: Any = server.handle_completions(
            {
                "prompt": list(prompt),
                "n_probs": 320,
                "n_predict": 1,
                "temperature": 0.0,
                "cache_prompt": False,
                "ignore_eos": True,
            }
        )
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        found.append(
            {one["id"]: one["logprob"] for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
        )
    return found


class Refused(Exception):
    """The engine did not load something; what it said."""


def logprobs(model: Path, prompts: Sequence[Sequence[int]], adapter: Path | None = None) -> list[dict[int, float]]:
    """As `serve`, from a process of its own. Raises: Refused."""
    command = [sys.executable, __file__, str(model), *([str(adapter)] if adapter else [])]
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=False, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    if done.returncode or not lines:
        raise Refused(done.stderr[-2000:] + done.stdout[-500:])
    return [{int(token): value for token, value in one.items()} for one in json.loads(lines[-1])]


if __name__ == "__main__":
    print(json.dumps(serve(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, json.load(sys.stdin))))
