"""Which files of a base a merge copies, which it writes anew, and which it leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merger.checkpoints import adapter, config, low_rank, save_base, weights

from loraformat.containers import open_checkpoint
from loraformat.merger import AdapterSource, MergePlan, plan_merge
from loraformat.merger.plan.data import CopiedFile
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import RawFile
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import Rows

EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj.weight"
INDEX = "model.safetensors.index.json"
PLAIN = adapter({Q: low_rank(24, 24)})
GROWN = adapter({name: Rows((70,), LazyTensor.of(torch.ones(1, 24))) for name in (EMBED, HEAD)})


def planned(base: Path, change: Adapter = PLAIN, **options: Any) -> MergePlan:
    return plan_merge(open_checkpoint(str(base)), [change], [AdapterSource("memory", "none")], **options)


def copies(plan: MergePlan) -> dict[str, int | None]:
    return {copied.name: copied.adapter for copied in plan.copies}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = save_base(tmp_path / "base", weights(), config(torch_dtype="float32"), shards=2)
    (folder / "old.bin").write_text("x")
    (folder / "figures").mkdir()
    return folder


@pytest.mark.parametrize(
    ("change", "options", "patched", "index"),
    [
        (PLAIN, {}, {}, None),
        (GROWN, {}, {"vocab_size": 71}, INDEX),
        (PLAIN, {"dtype": DType.BF16}, {"torch_dtype": "bfloat16"}, INDEX),
        (PLAIN, {"container": "torch"}, {}, "pytorch_model.bin.index.json"),
        (PLAIN, {"max_shard_nbytes": 1 << 30}, {}, None),
        (PLAIN, {"max_shard_nbytes": 20_000}, {}, INDEX),
    ],
    ids=["plain", "grown", "dtype", "container", "one-file", "small-files"],
)
def test_a_file_is_copied_or_written_anew_and_never_both(
    base: Path, change: Adapter, options: dict[str, Any], patched: dict[str, Any], index: str | None
) -> None:
    plan = planned(base, change, **options)
    assert {path[-1]: value for path, value in plan.config_patch} == patched
    assert plan.index == index
    wanted = {"tokenizer.json"} | (set() if patched else {"config.json"})
    assert copies(plan) == dict.fromkeys(wanted | ({INDEX} if not options and change is PLAIN else set()))
    assert list(plan.copies) == sorted(plan.copies, key=lambda copied: copied.name)
    assert set(plan.left_out) == {"old.bin", "figures/"}


def test_a_tokenizer_of_the_adapter_takes_the_place_of_the_base_s(base: Path) -> None:
    file = RawFile("tokenizer.json", 2, lambda: b"{}")
    plan = planned(base, replace(PLAIN, tokenizer={"tokenizer.json": file}))
    assert CopiedFile("tokenizer.json", 0) in plan.copies
    assert [copied.name for copied in plan.copies].count("tokenizer.json") == 1
