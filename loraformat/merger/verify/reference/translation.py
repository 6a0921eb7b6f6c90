"""An adapter in llama.cpp's names compared with what it was: the same updates, their rows where llama.cpp has them.

Nothing is shared with what translated it: names are recognized by their last parts, and rows put in order by a reshape.

Source: llama.cpp of llama_cpp_python 0.3.36, conversion/llama.py `LlamaModel.permute`; src/llama-arch.cpp for names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loraformat.errors import MergeError
from loraformat.merger.verify.reference.sources import factor_values
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Json
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Update, tensors

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_HINT = "this is a bug in loraformat: please report it"
# Architectures whose rotation takes neighboring rows: src/llama-model.cpp `llama_model_rope_type`, ROPE_TYPE_NORM.
_NEIGHBOURS = {"llama", "granite", "smollm3", "arcee", "olmo"}
_TABLES = {"embed_tokens": "token_embd", "lm_head": "output"}
_LEAVES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "qkv_proj": "attn_qkv",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "c_fc": "ffn_up",
    "c_proj": "ffn_down",
}
_EXPERTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
_JOINED = re.compile(r".*layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")
_PATH = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:(.*)\.)?(\w+)\.(weight|bias)")
# A factor that was worked into another value is rounded once to its dtype, of which float8 is not one.
_ROUNDED = 2.0**-7


def is_followed(weight: str) -> bool:
    """Whether this module knows where llama.cpp has a weight."""
    return _home(weight) is not None or _JOINED.fullmatch(weight) is not None


def check_translation(adapter: Adapter, settings: Mapping[str, Json]) -> None:
    """Compare every update of a translated adapter, factor by factor, with the one that it was made of.

    Raises: MergeError (LF801): one is missing, or has other values, or rows in another order.
    """
    assert adapter.origin is not None
    for weight, chain in adapter.origin.updates.items():
        stack = _JOINED.fullmatch(weight)
        if stack is not None:
            _check_joined(weight, chain, stack[1], stack[2], adapter)
            continue
        home = _home(weight)
        if home is None:
            continue
        name, expert = home
        found = adapter.updates.get(name)
        if found is None or (expert is None and len(found) != len(chain)):
            raise MergeError(f"{weight}: expected exactly one update at {name}", where="verify", hint=_HINT)
        heads = _heads(name, settings)
        for before, after in zip(chain, found, strict=expert is None):
            _check(weight, before, after, expert, heads)


def _check_joined(weight: str, chain: Sequence[Update], layer: str, leaf: str, adapter: Adapter) -> None:
    """Experts that transformers stacks, gate and up below each other: products of both sides, expert by expert."""
    import numpy as np

    names = ("ffn_gate_exps", "ffn_up_exps") if leaf == "gate_up_proj" else ("ffn_down_exps",)
    (before,) = chain
    found = [adapter.updates.get(f"blk.{layer}.{name}.weight", ()) for name in names]
    if not isinstance(before, LowRank) or any(len(one) != 1 or not isinstance(one[0], LowRank) for one in found):
        raise MergeError(f"{weight}: expected exactly one update", where="verify", hint=_HINT)
    after = [one for (one,) in found if isinstance(one, LowRank)]
    for expert in range(before.up.shape[0]):
        wanted = _scale(before) * _of_expert(before.up, expert) @ _of_expert(before.down, expert)
        products = [_scale(one) * _of_expert(one.up, expert) @ _of_expert(one.down, expert) for one in after]
        both = np.concatenate(products)
        ways = [wanted, wanted.T]
        if not any(way.shape == both.shape and np.allclose(way, both, rtol=1e-6, atol=1e-9) for way in ways):
            raise MergeError(f"{weight}: llama.cpp's experts are not those of the adapter", where="verify", hint=_HINT)


def _home(weight: str) -> tuple[str, int | None] | None:
    """The name in llama.cpp, and which matrix of a stack it is."""
    path, _, parameter = weight.rpartition(".")
    table = _TABLES.get(path.rpartition(".")[2])
    if table is not None:
        return f"{table}.{parameter}", None
    found = _PATH.fullmatch(weight)
    if found is None:
        return None
    layer, inner, leaf, parameter = found.groups()
    parts = (inner or "").split(".")
    if "experts" in parts:
        stack = _EXPERTS.get(leaf)
        return None if stack is None else (f"blk.{layer}.{stack}.{parameter}", int(parts[parts.index("experts") + 1]))
    if leaf not in _LEAVES:
        return None
    suffix = "_shexp" if "shared_expert" in parts else ""
    return f"blk.{layer}.{_LEAVES[leaf]}{suffix}.{parameter}", None


def _heads(name: str, settings: Mapping[str, Json]) -> int:
    """How many heads the rows of a tensor are of, where neighbors are rotated together; else 0."""
    architecture = settings.get("general.architecture")
    part = name.split(".")[-2]
    if architecture not in _NEIGHBOURS or part not in ("attn_q", "attn_k"):
        return 0
    count = settings.get(f"{architecture}.attention.head_count{'_kv' if part == 'attn_k' else ''}")
    if count is None:
        count = settings.get(f"{architecture}.attention.head_count")
    if isinstance(count, list):
        count = count[int(name.split(".")[1])]
    assert isinstance(count, int)
    return count


def _check(weight: str, before: Update, after: Update, expert: int | None, heads: int) -> None:
    if isinstance(before, LowRank) and isinstance(after, LowRank):
        pairs = _factors(before, after, expert, heads)
    else:
        pairs = [
            (_turned(factor_values(one), heads), factor_values(other))
            for (_, one), (_, other) in zip(tensors(before), tensors(after), strict=True)
        ]
    for wanted, found in pairs:
        if not _is_near(wanted, found):
            raise MergeError(f"{weight}: llama.cpp's rows are not those of the adapter", where="verify", hint=_HINT)


def _factors(before: LowRank, after: LowRank, expert: int | None, heads: int) -> list[tuple[Floats, Floats]]:
    """What the factors must be, and what they are: scale and `up` together, `down`, and a magnitude."""
    import numpy as np

    up, down = (_of_expert(one, expert) for one in (after.up, after.down))
    wanted = [_turned(_scale(before) * factor_values(before.up), heads), factor_values(before.down)]
    rank = before.down.shape[0]
    if np.any(up[:, rank:] * _scale(after)) and np.any(down[rank:]):
        return [(np.zeros(1), np.ones(1))]
    found = [_scale(after) * up[:, :rank], down[:rank]]
    if before.magnitude is not None and after.magnitude is not None:
        wanted.append(_turned(factor_values(before.magnitude.vector), heads if before.magnitude.axis == 1 else 0))
        found.append(factor_values(after.magnitude.vector))
    return list(zip(wanted, found, strict=True))


def _of_expert(factor: LazyTensor, expert: int | None) -> Floats:
    return factor_values(factor) if expert is None else factor_values(factor.rows(expert, expert + 1))[0]


def _scale(update: LowRank) -> float:
    return 1.0 if update.scale is None else update.scale


def _turned(values: Floats, heads: int) -> Floats:
    if not heads:
        return values
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    turned: Floats = halves.swapaxes(1, 2).reshape(values.shape)
    return turned


def _is_near(wanted: Floats, found: Floats) -> bool:
    import numpy as np

    return wanted.shape == found.shape and bool(np.allclose(found, wanted, rtol=_ROUNDED, atol=0.0, equal_nan=True))
