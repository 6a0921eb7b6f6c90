"""Folders as people have them: what a merge takes from a base that holds more than a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from arithmetic.cases import LOOPS
from merger.checkpoints import adapter_folder, config, save_base, weights

import loraformat
from loraformat.errors import AdapterRefused, NonFiniteValue, UsageError
from loraformat.report import render


def test_a_base_that_holds_an_adapter_too_gives_a_model(tmp_path: Path) -> None:
    both = tiny.adapted(tiny.llama(), tmp_path, target_modules=["q_proj"])
    for file in (tmp_path / "adapter").glob("adapter_*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    report = loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("adapter_*"))
    assert "LF817" in {finding.code for finding in report.findings}
    tiny.check_merged(tmp_path / "out", "LlamaForCausalLM", both)


def test_tensors_of_which_only_the_dtype_changes_are_no_copies(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    change = adapter_folder(tmp_path / "change", {"model.layers.0.q_proj.weight": (24, 24)})
    report = loraformat.merge(base, [change], tmp_path / "out", dtype="bfloat16", dry_run=True)
    others = len(weights()) - 1
    assert (report.data.tensors_touched, report.data.tensors_copied, report.data.tensors_cast) == (1, 0, others)
    assert f"0 copied, {others} only cast" in render(report, "text")
    report = loraformat.merge(base, [change], tmp_path / "out", dtype="bfloat16")
    assert f"of {len(weights())} computed tensors against" in render(report, "text")


def test_one_error_and_several_are_counted_as_such(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    for names, said in (
        (["x.q_proj.weight"], "1 error ["),
        (["x.q_proj.weight", "y.q_proj.weight"], "2 errors, first ["),
    ):
        shapes = dict.fromkeys(["model.layers.0.q_proj.weight", *names], (24, 24))
        change = adapter_folder(tmp_path / str(len(names)), shapes)
        with pytest.raises(AdapterRefused) as error:
            loraformat.merge(base, [change], tmp_path / "out")
        assert said in str(error.value)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e6), (torch.bfloat16, 7e37)])
def test_an_overflow_is_explained_where_the_dtype_is_at_fault(tmp_path: Path, dtype: torch.dtype, scale: float) -> None:
    base = save_base(tmp_path / "base", weights(dtype=dtype), config())
    change = adapter_folder(tmp_path / "change", {"model.layers.0.q_proj.weight": (24, 24)}, scale=scale)
    with pytest.raises(NonFiniteValue) as error:
        loraformat.merge(base, [change], tmp_path / "out")
    assert ("overflows float16" in error.value.hint) == (dtype is torch.float16)
    assert "not finite in" in error.value.message


@pytest.mark.parametrize("loop", LOOPS)
def test_a_merge_without_a_compiled_loop_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    """As information: nothing is wrong with the output."""
    monkeypatch.setenv("LORAFORMAT_LOOP", loop)
    base = save_base(tmp_path / "base", weights(), config())
    folder = adapter_folder(tmp_path / "adapter", {"model.layers.0.q_proj.weight": (24, 24)})
    report = loraformat.merge(str(base), [str(folder)], str(tmp_path / "out"))
    found = [finding for finding in report.findings if finding.code == "LF822"]
    assert [finding.severity.value for finding in found] == (["info"] if loop == "numpy" else [])


def test_a_loop_that_is_not_there_stops_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFORMAT_LOOP", "fast")
    base = save_base(tmp_path / "base", weights(), config())
    with pytest.raises(UsageError, match="LORAFORMAT_LOOP"):
        loraformat.merge(
            str(base),
            [str(adapter_folder(tmp_path / "adapter", {"model.layers.0.q_proj.weight": (24, 24)}))],
            str(tmp_path / "out"),
        )
    assert not (tmp_path / "out").exists()
