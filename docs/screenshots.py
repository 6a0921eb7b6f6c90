"""The screenshots in docs/pictures, of pages that `plot` writes; needs Chromium: python docs/screenshots.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import loraformat
from loraformat.report.json import document

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
MINIGPT = Path("fixtures", "minigpt")
LAYERS, WIDTH, RANK = 8, 128, 8
MODULES = {"self_attn": ("k_proj", "o_proj", "q_proj", "v_proj"), "mlp": ("down_proj", "gate_proj", "up_proj")}


def main() -> None:
    """Write them all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = folder / "page.html"
        os.chdir(ROOT)
        loraformat.plot([MINIGPT / "lora_adapter"], page, base=MINIGPT / "base", alpha=1.0)
        shoot(page, "page-light.png", 1300)
        shoot(page, "page-dark.png", 900, is_dark=True)
        os.chdir(folder)
        steps = [checkpoint(Path("run"), step) for step in (100, 200, 300, 400)]
        loraformat.plot(steps, page, overwrite=True)
        shoot(page, "run.png", 820)
        small = Path("small")
        report = loraformat.resize(steps[-1], small, energy=0.9)
        made = folder / "resize.json"
        made.write_text(json.dumps(document(report)))
        loraformat.plot([small], page, made_by=[made], overwrite=True)
        shoot(page, "resized.png", 820)


def checkpoint(folder: Path, step: int) -> Path:
    """An adapter whose deep layers learn more, and the later the more in one direction."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    tensors = {}
    random = np.random.default_rng(7)
    for layer in range(LAYERS):
        for parent, kinds in MODULES.items():
            for kind in kinds:
                name = f"base_model.model.model.layers.{layer}.{parent}.{kind}"
                start, end, down = (random.standard_normal((RANK, WIDTH)) for _ in range(3))
                share = step / 400
                grown = (start * (1 - share) + end * share) * 0.7 ** np.arange(RANK)[:, None]
                size = share * (layer + 2) * (2 if parent == "mlp" else 1) / 40
                tensors[f"{name}.lora_A.weight"] = (down / WIDTH**0.5).astype(np.float32)
                tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(grown.T * size, np.float32)
    save_file(tensors, made / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [kind for kinds in MODULES.values() for kind in kinds],
        "base_model_name_or_path": "example/model",
    }
    (made / "adapter_config.json").write_text(json.dumps(config))
    return made


def shoot(page: Path, name: str, height: int, *, is_dark: bool = False) -> None:
    """A picture of the top of a page, 1000 pixels wide."""
    chromium = next(path for each in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(each)))
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if is_dark else []
    command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", *dark, f"--window-size=1000,{height}"]
    target = f"--screenshot={PICTURES / name}"
    subprocess.run([*command, target, page.as_uri()], check=True, capture_output=True)  # noqa: S603 - our own page


if __name__ == "__main__":
    main()
