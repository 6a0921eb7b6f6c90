"""vLLM's own loader of adapters, without vLLM: its four modules are run out of a folder with its source.

LORAFORMAT_VLLM names that folder (the one that holds `vllm/`), of vLLM 0.33.0. All else that they import is a stand-in.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import dense
from sources import KINDS

from loraformat import save_adapter
from loraformat.io import load_adapter
from loraformat.jobs.validate import validate
from loraformat.model.adapter import Adapter, AdapterConfig, module_of

SOURCE = os.environ.get("LORAFORMAT_VLLM", "")
REAL = ("vllm.lora", "vllm.lora.peft_helper", "vllm.lora.lora_model", "vllm.lora.lora_weights", "vllm.lora.utils")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not SOURCE, reason="LORAFORMAT_VLLM names no folder with vLLM's source"),
]


class _StandIns(MetaPathFinder, Loader):
    """Every module of vLLM but the loader's: whatever is asked of it is an empty class."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "vllm":
            return None
        if name in REAL:
            return PathFinder.find_spec(name, [str(Path(SOURCE, *name.split(".")[:-1]))])
        return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        said = SimpleNamespace(**dict.fromkeys(("info_once", "warning_once", "debug", "info"), lambda *_: None))
        known = {"PIN_MEMORY": False, "init_logger": lambda _: said}

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return known.get(name, type(name, (), {}))

        module.__getattr__ = attribute  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def vllm() -> Iterator[Any]:
    finder = _StandIns()
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module("vllm.lora.lora_model")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]


def loaded(vllm: Any, folder: Path, modules: set[str]) -> Any:
    """What `WorkerLoRAManager._load_adapter` does with a folder. Source: vllm 0.33.0, lora/worker_manager.py."""
    helper = vllm.PEFTHelper.from_local_dir(str(folder), 4096)
    helper.validate_legal(SimpleNamespace(max_lora_rank=64, bias_enabled=False))
    return vllm.LoRAModel.from_local_checkpoint(
        str(folder), modules, peft_helper=helper, lora_model_id=1, device="cpu", model_vocab_size=20
    )


def written(kind: str, folder: Path, *, by_way_of: str = "") -> Adapter:
    adapter = Adapter(config=AdapterConfig(), updates=dict(sorted(KINDS[kind].items())))
    if by_way_of:
        save_adapter(adapter, str(folder / "first"), to=by_way_of)
        adapter = load_adapter(str(folder / "first"))
    save_adapter(adapter, str(folder / "peft"), to="peft")
    return adapter


@pytest.mark.parametrize("by_way_of", ["", "native", "mlx", "loralib"])
@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "patterns", "embeddings", "head", "fused"])
def test_it_computes_the_updates_of_our_folders(kind: str, by_way_of: str, vllm: Any, tmp_path: Path) -> None:
    adapter = written(kind, tmp_path, by_way_of=by_way_of)
    modules = {module_of(weight).rpartition(".")[2] for weight in adapter.updates}
    found = loaded(vllm, tmp_path / "peft", modules).loras
    assert sorted(found) == sorted(map(module_of, adapter.updates))
    for weight, (update,) in adapter.updates.items():
        one = found[module_of(weight)].optimize()
        product = one.lora_b.double() @ one.lora_a.double()
        wanted = dense(update)
        torch.testing.assert_close(product.T if update.is_embedding else product, wanted, rtol=1e-5, atol=1e-5)


def test_what_it_refuses_our_rules_say_before(vllm: Any, tmp_path: Path) -> None:
    written("DoRA", tmp_path)
    with pytest.raises(ValueError, match="does not yet support DoRA"):
        loaded(vllm, tmp_path / "peft", {"v_proj", "down_proj"})
    assert "LF603" in {each.code for each in validate(str(tmp_path / "peft"), target=["vllm"]).findings}
