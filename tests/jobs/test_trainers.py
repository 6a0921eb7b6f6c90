"""Folders as LLaMA-Factory, ms-swift, Axolotl and DeepSpeed leave them: the adapter, and what lies beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracle import dense
from safetensors.torch import load_file, save_file

from loraformat.errors import UnknownFormat
from loraformat.io import load_adapter
from loraformat.jobs.convert import convert
from loraformat.jobs.inputs.discovery import discover
from loraformat.jobs.validate import validate

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT wrote, as all of these trainers do."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.adapted(tiny.llama(), folder, target_modules=["q_proj", "v_proj"])
    return folder / "adapter"


def saved(adapter: Path, folder: Path, *, state: bool = True) -> Path:
    """The adapter in a folder of a run, with the state that transformers' trainer keeps."""
    shutil.copytree(adapter, folder)
    if state:
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"state": torch.zeros(2)}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": []}))
    return folder


def said(folder: Path) -> dict[str, str]:
    """code → messages of the findings that are not about a bare config and card."""
    found: dict[str, str] = {}
    for each in validate(str(folder)).findings:
        if each.code not in ("LF105", "LF503"):
            found[each.code] = f"{found.get(each.code, '')} {each.message}"
    return found


def assert_same(folder: Path, adapter: Path) -> None:
    wanted, found = load_adapter(str(adapter)), load_adapter(str(folder))
    assert list(found.updates) == list(wanted.updates)
    for weight, (update,) in wanted.updates.items():
        assert torch.equal(dense(found.updates[weight][0]), dense(update))
    assert not found.unclaimed


def llama_factory(adapter: Path, run: Path) -> Path:
    saved(adapter, run)
    for name in ("all_results.json", "train_results.json", "trainer_log.jsonl", "running_log.txt"):
        (run / name).write_text("{}")
    (run / "training_args.yaml").write_text("stage: rm\nlora_rank: 2\n")
    head = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
    save_file(head, run / "value_head.safetensors", metadata={"format": "pt"})
    for name in ("checkpoint-5", "checkpoint-10"):
        saved(adapter, run / name)
    return run


def swift(adapter: Path, run: Path) -> Path:
    checkpoint = saved(adapter, run / "v0-20260101-000000" / "checkpoint-10")
    (checkpoint / "additional_config.json").write_text(
        '{"lora_dtype": null, "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6}'
    )
    for folder in (checkpoint, checkpoint.parent):
        (folder / "args.json").write_text('{"lora_rank": 2}')
    (checkpoint.parent / "logging.jsonl").write_text("")
    return checkpoint


def axolotl(adapter: Path, run: Path) -> Path:
    saved(adapter, run, state=False)
    saved(adapter, run / "checkpoint-3")
    (run / "debug.log").write_text("axolotl\n")
    (run / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (run / "merged").mkdir()
    save_file({"model.norm.weight": torch.ones(16)}, run / "merged" / "model.safetensors")
    return run


def unsloth(adapter: Path, run: Path) -> Path:
    saved(adapter, run, state=False)
    config = json.loads((run / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}
    (run / "adapter_config.json").write_text(json.dumps(config))
    (run / "unsloth_compiled_cache").mkdir()
    (run / "unsloth_compiled_cache" / "UnslothTrainer.py").write_text("raise SystemExit\n")
    return run


def deepspeed(adapter: Path, run: Path) -> Path:
    checkpoint = saved(adapter, run / "checkpoint-10")
    state = checkpoint / "global_step10"
    state.mkdir()
    module = {
        name.replace(".weight", ".default.weight"): value
        for name, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    torch.save({"module": module, "ds_version": "0.18"}, state / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, state / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (checkpoint / "latest").write_text("global_step10")
    (checkpoint / "zero_to_fp32.py").write_text("raise SystemExit\n")
    return checkpoint


@pytest.mark.parametrize("make", [llama_factory, swift, axolotl, unsloth, deepspeed])
def test_the_adapter_of_a_run_is_what_peft_wrote(
    make: Callable[[Path, Path], Path], adapter: Path, tmp_path: Path
) -> None:
    folder = make(adapter, tmp_path / "run")
    assert_same(folder, adapter)
    convert(str(folder), str(tmp_path / "out"), to="peft", check_roundtrip=True)
    assert_same(tmp_path / "out", adapter)
    left = {"optimizer.pt", "training_args.bin", "value_head.safetensors", "zero_to_fp32.py", "global_step10"}
    carried = {path.name for path in (tmp_path / "out").iterdir()}
    assert not carried & left - {"zero_to_fp32.py"}


def test_llama_factory_s_value_head_and_state_are_named(adapter: Path, tmp_path: Path) -> None:
    run = llama_factory(adapter, tmp_path / "run")
    found = said(run)
    assert "value head" in found["LF246"]
    assert "optimizer.pt" in found["LF222"]
    assert found.keys() == {"LF222", "LF246", "LF512"}  # PEFT writes base_model: "" where the model has no name
    assert [Path(path).name for path in discover([str(run)]).adapters] == ["run", "checkpoint-5", "checkpoint-10"]


@pytest.mark.parametrize("name", ["pissa_init", "pissa_backup", "pissa_converted"])
def test_factors_for_the_residual_base_of_pissa_are_warned_of(name: str, adapter: Path, tmp_path: Path) -> None:
    saved(adapter, tmp_path / name, state=False)
    assert ("LF251" in said(tmp_path / name)) is (name != "pissa_converted")


def test_ms_swift_s_ratio_of_lora_plus_is_kept(adapter: Path, tmp_path: Path) -> None:
    checkpoint = swift(adapter, tmp_path / "run")
    convert(str(checkpoint), str(tmp_path / "native"), to="native")
    assert json.loads((tmp_path / "native" / "lora_config.json").read_text())["loraplus_lr_ratio"] == 16.0
    convert(str(checkpoint), str(tmp_path / "peft"), to="peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert "loraplus_lr_ratio" not in written
    assert (tmp_path / "peft" / "additional_config.json").exists()
    report = convert(str(checkpoint), str(tmp_path / "mlx"), to="mlx")
    assert any("loraplus_lr_ratio" in each.message for each in report.findings if each.code == "LF703")


def test_ms_swift_s_subfolder_is_found_and_its_other_tuners_are_refused_by_name(adapter: Path, tmp_path: Path) -> None:
    saved(adapter, tmp_path / "lora" / "default", state=False)
    (tmp_path / "lora" / "configuration.json").write_text('{"framework": "pytorch"}')
    assert_same(tmp_path / "lora", adapter)
    reft = tmp_path / "reft"
    saved(adapter, reft / "default", state=False)
    settings: dict[str, Any] = {"swift_type": "REFT", "r": 4, "intervention_type": "LoreftIntervention"}
    (reft / "default" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnknownFormat, match="the tuner REFT of ms-swift"):
        load_adapter(str(reft))


def test_deepspeed_s_folder_is_named_and_says_what_to_run(adapter: Path, tmp_path: Path) -> None:
    checkpoint = deepspeed(adapter, tmp_path / "run")
    assert "global_step10/" in said(checkpoint)["LF222"]
    with pytest.raises(UnknownFormat, match=r"a DeepSpeed training state.*zero_to_fp32"):
        load_adapter(str(checkpoint / "global_step10"))
    empty = {name: torch.zeros(0) for name in load_file(adapter / "adapter_model.safetensors")}
    save_file(empty, checkpoint / "adapter_model.safetensors")
    (hint, *_) = [each.hint for each in validate(str(checkpoint)).findings if each.code == "LF205"]
    assert "zero_to_fp32.py" in hint
