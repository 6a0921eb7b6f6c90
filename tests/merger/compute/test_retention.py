"""What survives rounding: against float64, whatever the windows, and told when it is little."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from merger.checkpoints import adapter, config, load, low_rank, merge_and_tell, save_base, weights
from oracle import merged
from safetensors.torch import save_file

from loraformat.arithmetic import Tally
from loraformat.jobs.merge import merge
from loraformat.merger import retentions, total_share
from loraformat.merger.compute.retention import rounding_findings
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Magnitude, Replace
from loraformat.report import render

Q, UP, EMBED = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight", "model.embed_tokens.weight"


def dora(rows: int, cols: int) -> LowRank:
    plain = low_rank(rows, cols, scale=0.01)
    return LowRank(plain.up, plain.down, plain.scale, Magnitude(LazyTensor.of(torch.rand(rows) + 4), 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_figures_are_those_of_float64(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights(dtype=dtype)
    base = save_base(tmp_path / "base", tensors, config())
    updates = {Q: dora(24, 24), UP: low_rank(130, 24, scale=1e-3), EMBED: low_rank(70, 24, scale=0)}
    told = merge_and_tell(base, tmp_path / "out", adapter(updates))
    result, figures = load(tmp_path / "out"), {one.weight: one for one in retentions(told.tallies)}
    kept = whole = 0.0
    for name in (Q, UP):
        exact = merged(tensors[name], [updates[name]]) - tensors[name].double()
        change = result[name].double() - tensors[name].double()
        kept, whole = kept + float((change * exact).sum()), whole + float((exact * exact).sum())
        # the compiled loop sums products of float32
        assert figures[name].share == pytest.approx(float((change * exact).sum() / (exact * exact).sum()), rel=1e-6)
        assert figures[name].unchanged == float((change == 0).double().mean())
        assert figures[name].norm == pytest.approx(float(exact.norm()), rel=1e-6)
        assert figures[name].largest == pytest.approx(float(exact.abs().max()), rel=1e-6)
    assert (figures[EMBED].share, figures[EMBED].unchanged) == (None, 1)
    assert total_share(told.tallies) == pytest.approx(kept / whole, rel=1e-6)


def test_neither_threads_nor_memory_change_a_figure_or_a_hash(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=2)
    change = adapter({Q: dora(24, 24), UP: low_rank(130, 24), EMBED: low_rank(70, 24)})
    first = merge_and_tell(base, tmp_path / "a", change)
    for number, (jobs, memory) in enumerate([(1, 1), (2, 1), (4, 1 << 18), (2, 1 << 30)]):
        assert merge_and_tell(base, tmp_path / f"b{number}", change, jobs=jobs, memory_nbytes=memory) == first


def test_hashes_are_those_of_the_bytes_in_the_file(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config())
    told = merge_and_tell(base, tmp_path / "out", adapter({Q: low_rank(24, 24), UP: low_rank(130, 24)}), jobs=3)
    result = load(tmp_path / "out")
    expected = {n: blake3(result[n].view(torch.uint8).numpy().tobytes()).hexdigest() for n in (Q, UP)}
    assert told.digests == expected


def test_what_is_replaced_has_no_retention(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    table = LazyTensor.of(torch.randn(70, 24))
    assert merge_and_tell(base, tmp_path / "out", adapter({EMBED: Replace(table)})).tallies == {}


def small_adapter(folder: Path, size: float) -> Path:
    """A PEFT adapter whose update is `size` times as large as the weight."""
    folder.mkdir()
    module = "base_model.model." + Q.removesuffix(".weight")
    factors = {"A": torch.randn(1, 24), "B": torch.randn(24, 1) * size}
    save_file(
        {f"{module}.lora_{name}.weight": value for name, value in factors.items()}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "x"}))
    return folder


def test_a_lost_update_is_told_with_remedies_and_a_kept_one_is_not(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config())
    lost = merge(str(base), [str(small_adapter(tmp_path / "small", 1e-4))], str(tmp_path / "a"))
    (finding,) = [one for one in lost.findings if one.code == "LF803"]
    assert "--rounding stochastic" in finding.hint
    assert lost.data.retained < 0.9
    assert "model.layers.0.q_proj.weight" in render(lost)
    kept = merge(str(base), [str(small_adapter(tmp_path / "large", 0.5))], str(tmp_path / "b"))
    assert [one.code for one in kept.findings if one.code == "LF803"] == []
    assert kept.data.retained == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "tallies", [{"a": (math.inf, math.inf), "b": (-math.inf, math.inf)}, {"a": (1e308, 1e308), "b": (1e308, 1e308)}]
)
def test_squares_beyond_float64_have_no_share(tallies: dict[str, tuple[float, float]]) -> None:
    found = {name: Tally(kept, whole, 0, 1, 1e200) for name, (kept, whole) in tallies.items()}
    assert total_share(found) is None
    assert rounding_findings("base", found, ["F64"]) == ()
