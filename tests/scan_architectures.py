"""Merges into every class that the installed transformers builds from a small config: `make test-architectures`.

Each class of the auto tables is built with small sizes and random weights, saved by transformers, adapted by PEFT on
all its linear layers, and merged by loraformat. The merged folder is loaded by the class and compared with the model
that PEFT has not merged: every tensor with the base weight and its delta, and the outputs where small_models.py finds
an input. It prints a line for each class that is not equal, with the reason, and the figures last.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import re
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_models
import torch
from small_models import outputs

import loraformat
from loraformat.errors import LoraFormatError

ATOL = 1e-4
MOST_SECONDS = 60
MOST_MEMORY = 6 << 30  # of the process; a class that wants more fails, and not the machine
BY_OUTPUTS, BY_TENSORS = "equal by outputs and tensors", "equal by tensors"
NOT_BUILT = "not built from a small config"
NO_LINEAR = "no linear layer"
PEFT_REFUSES = "PEFT refuses"
REFUSED = "refused by loraformat"
BASE_DIFFERS = "the class does not load its own saved base"
PEFT_DIFFERS = "PEFT's own merge differs as much"  # rounding that grows, or a weight read past PEFT's layer
RANDOM = "outputs are not deterministic"
WRONG = "wrong numbers"
FAILED = "failed"


@dataclass
class Ending:
    """How the scan of one class ended: a word of the list above, and what there is to say about it."""

    kind: str
    detail: str = ""


class NotAdaptedError(Exception):
    """PEFT does not take the model."""


def linear_layers(model: Any) -> list[str]:
    import transformers

    head = None
    with contextlib.suppress(NotImplementedError):
        head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    inside_attention = torch.nn.modules.linear.NonDynamicallyQuantizableLinear  # its forward pass is never called
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, kinds) and part is not head and type(part) is not inside_attention and part.weight.numel()
    ]


def adapted(model: Any, targets: list[str]) -> Any:
    """The model with random LoRA on all layers that PEFT takes."""
    import peft

    while targets:
        try:
            both = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        except ValueError as error:
            named = set(re.findall(r"'(\w+)'", str(error).partition("Incompatible modules")[2]))
            left = [name for name in targets if name.rpartition(".")[2] not in named]
            if len(left) == len(targets):
                raise NotAdaptedError(str(error)) from error
            targets = left
            continue
        torch.manual_seed(1)
        for key, value in both.named_parameters():
            if "lora_" in key:
                value.data = torch.randn_like(value) * 0.2
        return both.eval()
    raise NotAdaptedError("no layer is left")


def weights(model: Any, with_adapter: bool = True) -> dict[str, Any]:
    """What an un-merged model computes with, by the names of the class: base weights, with their deltas if wanted."""
    from peft.tuners.lora import LoraLayer

    state = model.state_dict()
    found = {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}
    if with_adapter:
        for path, part in model.named_modules():
            if isinstance(part, LoraLayer):
                name = f"{path.replace('.base_layer', '')}.{getattr(part, 'parameter_name', 'weight')}"
                found[name] = found[name] + part.get_delta_weight("default")
    return found


def far(wanted: dict[str, Any], model: Any) -> str:
    """Which tensors of a model differ from those wanted; "" for none."""
    state = model.state_dict()
    names = [
        name
        for name, value in wanted.items()
        if name not in state
        or state[name].shape != value.shape
        or not torch.allclose(state[name].float(), value.float(), atol=ATOL, rtol=ATOL, equal_nan=True)
    ]
    return f"{len(names)} of {len(wanted)} tensors differ, first {names[0]}" if names else ""


def loaded(name: str, folder: Path) -> tuple[Any, str]:
    """The model in a folder, and the tensors that it lacks."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    lacking = sorted({*info["missing_keys"], *info["mismatched_keys"]}, key=str)
    return model.eval(), f"{len(lacking)} tensors are missing, first {lacking[0]}" if lacking else ""


def gap(one: list[Any], two: list[Any]) -> float:
    """The largest difference of two outputs; infinite where they have other shapes."""
    if [value.shape for value in one] != [value.shape for value in two]:
        return math.inf
    return max((float((a - b).abs().max()) for a, b in zip(one, two, strict=True) if a.numel()), default=0.0)


def apart(one: list[Any], two: list[Any]) -> str:
    largest = gap(one, two)
    if math.isfinite(largest) and all(
        torch.allclose(a, b, atol=ATOL, rtol=ATOL) for a, b in zip(one, two, strict=True)
    ):
        return ""
    return f"outputs differ by {largest:.3g}"


def scanned(name: str, model: Any, inputs: dict[str, Any], folder: Path) -> Ending:
    """Merges, and compares with the model that is not merged."""
    model.save_pretrained(folder / "base")
    targets = linear_layers(model)
    if not targets:
        return Ending(NO_LINEAR)
    try:
        both = adapted(model, targets)
        both.save_pretrained(folder / "adapter", save_embedding_layers=False)
    except (NotAdaptedError, NotImplementedError) as error:
        return Ending(PEFT_REFUSES, str(error))
    try:
        loraformat.merge(str(folder / "base"), [str(folder / "adapter")], str(folder / "out"))
    except LoraFormatError as error:
        return Ending(REFUSED, f"[{error.code}] {error}")
    unmerged = both.get_base_model()
    told = ""
    try:
        merged, told = loaded(name, folder / "out")
    except Exception as error:  # noqa: BLE001 - the base may be at fault
        told = f"{type(error).__name__}: {error}"
    told = told or far(weights(unmerged), merged)
    used = BY_TENSORS
    if not told and inputs:
        used, told = compared(unmerged, merged, inputs)
    return blamed(name, both, inputs, folder, told) if told else Ending(used)


def compared(unmerged: Any, merged: Any, inputs: dict[str, Any]) -> tuple[str, str]:
    """(by what they were compared, in what they differ)."""
    try:
        wanted = outputs(unmerged, inputs)
    except Exception:  # noqa: BLE001 - PEFT's layer does not do what the class does with its own
        return BY_TENSORS, ""
    return BY_OUTPUTS, apart(wanted, outputs(merged, inputs))


def blamed(name: str, both: Any, inputs: dict[str, Any], folder: Path, told: str) -> Ending:
    """Whose fault a difference is: that of the class, which may not load what it saved, or that of the merge."""
    unmerged = both.get_base_model()
    try:
        base, why = loaded(name, folder / "base")
    except Exception as error:  # noqa: BLE001 - the class cannot load what it saved
        return Ending(BASE_DIFFERS, f"{type(error).__name__}: {error}")
    why = why or far(weights(unmerged, with_adapter=False), base)
    if why:
        return Ending(BASE_DIFFERS, f"{why}; merged: {told}")
    if inputs and told.startswith("outputs"):
        return Ending(outputs_blamed(name, both, base, inputs, folder), told)
    return Ending(WRONG, told)


def outputs_blamed(name: str, both: Any, base: Any, inputs: dict[str, Any], folder: Path) -> str:
    """Why outputs differ although no tensor does."""
    unmerged = both.get_base_model()
    wanted = outputs(unmerged, inputs)
    if apart(wanted, outputs(unmerged, inputs)):
        return RANDOM
    with both.disable_adapter():
        if apart(outputs(unmerged, inputs), outputs(base, inputs)):
            return BASE_DIFFERS
    merged, _ = loaded(name, folder / "out")
    ours = gap(wanted, outputs(merged, inputs))
    by_peft = outputs(both.merge_and_unload(), inputs)
    return PEFT_DIFFERS if apart(wanted, by_peft) and ours <= 2 * gap(wanted, by_peft) else WRONG


def too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {MOST_SECONDS} s")


def ending(model_type: str, name: str) -> Ending:
    """Builds a class and scans it; a class that raises is an ending like others."""
    try:
        model, inputs = small_models.built(model_type, name, MOST_SECONDS)
    except Exception as error:  # noqa: BLE001 - what a class needs beside a config is its own business
        return Ending(NOT_BUILT, f"{type(error).__name__}: {error}")
    signal.alarm(MOST_SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return scanned(name, model, inputs, Path(folder))
    except Exception as error:  # noqa: BLE001 - the scan goes on
        return Ending(FAILED, f"{type(error).__name__}: {error}")
    finally:
        signal.alarm(0)


def scan(wanted: list[str], part: int, parts: int, counts: Counter[str]) -> None:
    """One line for each class that is not equal; counts how many classes ended how."""
    signal.signal(signal.SIGALRM, too_slow)
    for number, (model_type, name) in enumerate(small_models.classes()):
        if (wanted and name not in wanted) or number % parts != part:
            continue
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            found = ending(model_type, name)
        gc.collect()  # models refer to themselves, and there are hundreds
        counts[found.kind] += 1
        if wanted or found.kind not in (BY_OUTPUTS, BY_TENSORS):
            print(f"{name}: {found.kind}: {' '.join(found.detail.split())[:300]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes; all where none is named")
    parser.add_argument("--part", default="0/1", help="n/m: every m-th class, from the n-th on")
    arguments = parser.parse_args()
    part, parts = (int(number) for number in arguments.part.split("/"))
    counts: Counter[str] = Counter()
    try:
        scan(arguments.names, part, parts, counts)
    except KeyboardInterrupt:
        print("interrupted; the figures are those of the classes so far")
    print(f"{counts.total()} classes: " + ", ".join(f"{count} {what}" for what, count in counts.most_common()))
    return 1 if counts[WRONG] or counts[REFUSED] or counts[FAILED] else 0


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    sys.exit(main())
