"""Whether old versions of PEFT load what `convert --peft-version` writes, and merge it to the same weights.

Run: python benchmarks/old_peft.py VENV/bin/python …, one interpreter for each version of PEFT to try. Each needs torch
and peft. Today's PEFT, of the interpreter that runs this, makes the adapters and the reference. Prints a table for
docs/formats/peft.md: the largest difference from today's merge, relative to the largest change of that weight, or since
when there is a PEFT that can hold the adapter.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import loraformat
from loraformat.errors import LoraFormatError

MODEL = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 6), "k": nn.Linear(6, 4)}) for _ in range(2))
        self.q = nn.Linear(4, 6)
        self.conv = nn.Conv2d(3, 5, (2, 3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 9, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, numbers):
        hidden = self.embed(numbers) + 0.0 * self.q(self.norm.weight).sum()
        for block in self.blocks:
            hidden = hidden + block["k"](block["q"](hidden))
        return self.head(self.norm(hidden)) + self.conv(torch.ones(1, 3, 2, 3)).sum()
"""
CHILD = f"""{MODEL}
import sys, warnings
warnings.simplefilter("ignore")
import peft
for folder in sys.argv[1:]:
    model = Tiny()
    model.load_state_dict(torch.load(folder + "/../base.pt", weights_only=True))
    try:
        merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
        torch.save(dict(merged.state_dict()), folder + "/merged.pt")
    except Exception as error:
        print(folder, type(error).__name__, str(error)[:100])
"""

CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q", "k"]},
    "rsLoRA": {"target_modules": ["q", "k"], "use_rslora": True},
    "rank and alpha patterns": {
        "target_modules": r"blocks\.\d\.(q|k)",
        "rank_pattern": {"blocks.0.q": 3, r"blocks\.\d\.k": 1},
        "alpha_pattern": {"^blocks.1.q": 7, "k": 5},
    },
    "patterns, one name the end of another": {"target_modules": ["q"], "alpha_pattern": {"^q": 9}},
    "regular expression": {"target_modules": r"blocks\.1\.(q|k)"},
    "exclude_modules": {"target_modules": ["q", "k"], "exclude_modules": ["blocks.0.q"]},
    "layers_to_transform": {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "convolution": {"target_modules": ["conv", "q"]},
    "embedding": {"target_modules": ["embed", "q"]},
    "modules_to_save": {"target_modules": ["q"], "modules_to_save": ["head", "norm"]},
    "bias": {"target_modules": ["q", "k"], "bias": "lora_only"},
    "DoRA": {"target_modules": ["q", "k"], "use_dora": True},
    "DoRA, convolution": {"target_modules": ["conv"], "use_dora": True},
    "DoRA, embedding": {"target_modules": ["embed"], "use_dora": True},
    "lora_bias": {"target_modules": ["q", "k"], "lora_bias": True},
    "trained rows": {"target_modules": ["q"], "trainable_token_indices": {"embed": [5, 1, 7]}},
}


def base() -> nn.Module:
    """The model that all adapters are for; equal at every call."""
    space: dict[str, Any] = {}
    exec(MODEL, space)
    torch.manual_seed(0)
    model = space["Tiny"]()
    assert isinstance(model, nn.Module)
    return model


def make(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Save base.pt and adapter/ into `folder`; the weights that today's PEFT merges."""
    torch.save(base().state_dict(), folder / "base.pt")
    model: Any = peft.get_peft_model(base(), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **config}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data = torch.randn_like(parameter) + (2 if "magnitude" in name else 0)
    model.save_pretrained(folder / "adapter")
    merged = peft.PeftModel.from_pretrained(base(), folder / "adapter").merge_and_unload()
    return {name: value.detach().clone() for name, value in merged.state_dict().items()}


def written(folder: Path, version: str) -> str:
    """Why an adapter cannot be written for a version, or "" after it was written to `folder/version`."""
    try:
        loraformat.convert(str(folder / "adapter"), str(folder / version), to="peft", peft_version=version)
    except LoraFormatError as error:
        said = re.search(r"since \d+\.\d+", str(error))
        return f"refused, {said[0] if said else error}"
    return ""


def compared(folder: Path, wanted: dict[str, torch.Tensor], version: str) -> str:
    """The largest difference of what a version merged."""
    if not (folder / version / "merged.pt").exists():
        return "FAILED"
    found = torch.load(folder / version / "merged.pt", weights_only=True)
    before = base().state_dict()
    worst = 0.0
    for name, value in wanted.items():
        change = max(float((value - before[name]).abs().max()), 1e-3)
        worst = max(worst, float((found[name] - value).abs().max()) / change)
    return f"{worst:.0e}" if worst else "equal"


def version_of(python: str) -> str:
    """The version of PEFT that an interpreter has."""
    script = "import peft; print(peft.__version__)"
    return subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.split()[-1]


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    pythons = {version_of(python): python for python in sys.argv[1:]}
    with tempfile.TemporaryDirectory() as path:
        folders = {case: Path(path) / str(number) for number, case in enumerate(CASES)}
        wanted = {}
        for case, folder in folders.items():
            folder.mkdir()
            wanted[case] = make(folder, CASES[case])
        columns: dict[str, dict[str, str]] = {}
        for full, python in pythons.items():
            version = ".".join(full.split(".")[:2])
            columns[full] = {case: written(folder, version) for case, folder in folders.items()}
            there = [str(folder / version) for case, folder in folders.items() if not columns[full][case]]
            done = subprocess.run([python, "-c", CHILD, *there], capture_output=True, text=True, check=False)
            print(done.stdout, end="", file=sys.stderr)
            for case, folder in folders.items():
                columns[full][case] = columns[full][case] or compared(folder, wanted[case], version)
    print(f"| adapter | {' | '.join(pythons)} |\n|{'---|' * (len(pythons) + 1)}")
    for case in CASES:
        print(f"| {case} | {' | '.join(column[case] for column in columns.values())} |")


if __name__ == "__main__":
    main()
