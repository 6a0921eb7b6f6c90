"""Write loraformat/rules/runtimes/diffusers.json: what diffusers makes of each spelling, found by trying.

    python tests/derive_diffusers.py [--check] [FAMILY ...]

Needs diffusers, peft and torch. For every family a tiny random model, and for every way in which trainers spell an
adapter of it a file of all its layers: `load_lora_weights` loads it, or raises, or leaves layers out, or takes them for
others. Where a file is refused, its modules are tried alone. With --check nothing is written: exit 1 where the table on
disk is another.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import diffusers.loaders
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parent / "upstream"))
from tiny_pipelines import MODELS, model_of, pipeline_of

from loraformat.naming.families import DIFFUSERS, ORIGINAL, Place, family_named, spelled
from loraformat.rules.targets import ENCODER_AND_DENOISER

OUTPUT = "encoder without out_proj"
TABLE = Path(__file__).parents[1] / "loraformat" / "rules" / "runtimes" / "diffusers.json"
RANK, ALPHA, HIDDEN = 2, 1.0, 8
SLOTS = ("clip_l", "clip_g", "t5xxl")
NAMES = ("text_encoder", "text_encoder_2", "text_encoder_3")
PAIRS = {
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "lora_A.default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "lora_down": (".lora_down.weight", ".lora_up.weight"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
}
# What stands before a module, the tensors that some tool writes after it, and in whose names modules are.
BOTH = (DIFFUSERS, ORIGINAL)
PREFIXES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "COMPONENT.": (
        ("lora_A", "lora_A alpha", "lora_A.default", "lora.down", "lora_down", "lora_down alpha", "lokr", "lokr alpha"),
        BOTH,
    ),
    "diffusion_model.": (
        (
            *("lora_A", "lora_A alpha", "lora_A diff_b", "lora_A alpha diff_b", "lora_A.default", "hada alpha"),
            *("lora_down", "lora_down alpha", "lora_down diff_b", "lora_down alpha diff_b", "lokr", "lokr alpha"),
        ),
        BOTH,
    ),
    "": (("lora_A", "lora_A alpha", "lora_A.default", "lora.down", "lora_down", "lora_down alpha"), BOTH),
    "base_model.model.": (("lora_A", "lora_A alpha"), BOTH),
    "lora_unet_": (
        (
            *("lora_down", "lora_down alpha", "lora_down alpha diff_b", "lora_A", "lora_A alpha"),
            *("hada alpha", "lokr", "lokr alpha"),
        ),
        BOTH,
    ),
    "lora_transformer_": (("lora_down", "lora_down alpha"), (DIFFUSERS,)),
    "lycoris_": (("lora_down alpha", "hada alpha", "lokr", "lokr alpha"), (DIFFUSERS,)),
}


@dataclass(frozen=True)
class Spelling:
    prefix: str
    naming: str
    tensors: str
    extras: tuple[str, ...]

    @property
    def key(self) -> str:
        return " ".join((self.prefix or "bare", self.naming, self.tensors, *self.extras))


@dataclass(frozen=True)
class Layer:
    """A module of the original, with the layers of diffusers that it becomes."""

    place: Place
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]


def spellings(family: str) -> Iterator[Spelling]:
    table = family_named(family)
    is_same = all(module.diffusers == (module.original,) for module in table.modules)
    for prefix, (every, namings) in PREFIXES.items():
        for naming in namings if not is_same else (DIFFUSERS,):
            for text in every:
                tensors, *extras = text.split()
                yield Spelling(prefix.replace("COMPONENT", table.component), naming, tensors, tuple(extras))


def layers_of(family: str, model: Any) -> list[Layer]:
    table, found = family_named(family), {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)):
            place = table.find(spelled(name), DIFFUSERS)
            if place is not None and (table.component != "unet" or is_sample(name)):
                found.setdefault(place.original, (place, {}))[1][place.part or 0] = (name, module.weight.shape)
    return [
        Layer(
            Place(place.module, None, place.numbers),
            tuple(parts[n][0] for n in sorted(parts)),
            tuple(parts[n][1][0] for n in sorted(parts)),
            tuple(parts[0][1][1:]),
        )
        for place, parts in found.values()
        if len(parts) == len(place.module.diffusers)
    ]


def is_sample(name: str) -> bool:
    """A U-Net says the same of every block."""
    return not name.startswith(("down_blocks.", "up_blocks.")) or name.startswith(("down_blocks.1.", "up_blocks.1."))


class File:
    """The tensors of some layers in a spelling, and what each layer of diffusers should get."""

    def __init__(self, spelling: Spelling, layers: list[Layer]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.deltas: dict[str, Tensor] = {}
        for layer in layers:
            whole = spelling.naming == ORIGINAL
            names = (layer.place.original,) if whole else layer.parts
            rows = (sum(layer.rows),) if whole else layer.rows
            for name, count in zip(names, rows, strict=True):
                delta = self._add(spelling, name, count, layer.shape)
                self._expect(layer, name, delta, is_whole=whole)

    def _expect(self, layer: Layer, name: str, delta: Tensor, *, is_whole: bool) -> None:
        if not is_whole:
            self.deltas[name] = delta
            return
        module = layer.place.module
        if module.is_swapped and len(delta) == 2 * layer.shape[0]:
            delta = torch.cat(delta.chunk(2)[::-1])
        self.deltas.update(zip(layer.parts, delta.split(layer.rows), strict=True))

    def _add(self, spelling: Spelling, name: str, rows: int, shape: tuple[int, ...]) -> Tensor:
        is_flat = spelling.prefix.endswith("_")
        stem = spelling.prefix + (name.replace(".", "_") if is_flat else name)
        generator = torch.Generator().manual_seed(sum(stem.encode()) + rows)
        cols, kernel = shape[0], shape[1:]

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        points = (1,) * len(kernel)
        if spelling.tensors in PAIRS:
            down, up = random(RANK, cols, *kernel), random(rows, RANK, *points)
            self.tensors |= dict(zip([stem + end for end in PAIRS[spelling.tensors]], (down, up), strict=True))
            delta = up.flatten(1) @ down.flatten(1)
        elif spelling.tensors == "hada":
            sides = [(random(rows, RANK), random(RANK, cols * int(torch.tensor(kernel or (1,)).prod()))) for _ in "12"]
            for number, (a, b) in enumerate(sides, 1):
                self.tensors |= {f"{stem}.hada_w{number}_a": a, f"{stem}.hada_w{number}_b": b}
            delta = (sides[0][0] @ sides[0][1]) * (sides[1][0] @ sides[1][1])
        else:
            left, right = random(1, 1), random(rows, cols, *kernel)
            self.tensors |= {f"{stem}.lokr_w1": left, f"{stem}.lokr_w2": right}
            delta = left * right.flatten(1)
        if "alpha" in spelling.extras:
            self.tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
            delta = delta * (1.0 if spelling.tensors == "lokr" else ALPHA / RANK)
        if "diff_b" in spelling.extras:
            self.tensors[f"{stem}.diff_b"] = random(rows)
        return delta.reshape(rows, cols, *kernel)


@dataclass
class Outcome:
    """What became of a file: a message, or the layers by what they got."""

    error: str = ""
    loaded: frozenset[str] = frozenset()
    wrong: frozenset[str] = frozenset()
    has_biases: bool = False


def outcome_of(family: str, model: Any, file: File) -> Outcome:
    model = copy.deepcopy(model)
    if error := load(pipeline_of(family, model), file.tensors):
        return Outcome(error=error)
    loaded, wrong = set(), set()
    found = Outcome()
    for name, module in model.named_modules():
        adapters = getattr(module, "active_adapters", None)
        parts = [name] if name in file.deltas else _joined(name, file)
        if not adapters or not hasattr(module, "get_delta_weight") or not parts:
            continue
        loaded.update(parts)
        wanted = torch.cat([file.deltas[part] for part in parts])
        delta = delta_of(module, adapters[0]).detach().reshape(wanted.shape)
        # A parameter that nothing was loaded into is left without values.
        if delta.is_meta or not torch.allclose(delta, wanted, rtol=1e-3, atol=1e-4):
            wrong.update(parts)
        found.has_biases |= bool(getattr(module, "lora_bias", {}).get(adapters[0]))
    found.loaded, found.wrong = frozenset(loaded), frozenset(wrong)
    return found


def delta_of(module: Any, adapter: str) -> Tensor:
    """What an adapter adds; peft's own method fails for convolutions of one point in three dimensions."""
    if adapter not in getattr(module, "lora_A", {}):
        return module.get_delta_weight(adapter)
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return b.flatten(1) @ a.flatten(1) * module.scaling[adapter]


def _joined(name: str, file: File) -> list[str]:
    """The layers that diffusers joins into one before it loads LoKr of a joined module."""
    head, _, leaf = name.rpartition(".")
    names = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
    parts = [f"{head}.{part}" for part in names.get(leaf, ())]
    return parts if all(part in file.deltas for part in parts) else []


def message_of(error: Exception) -> str:
    """The first words of a message, without the names of tensors in it."""
    if isinstance(error, KeyError):  # which of several is looked for first differs from run to run
        return "KeyError: a tensor that it looks for"
    text = " ".join(str(error).split())
    for cut in (" but has", "{", "[", ": ", " but got"):
        text = text.split(cut)[0]
    text = text if "." not in text.split("'")[-1][:40] or " " in text else "a tensor that it does not expect"
    return f"{type(error).__name__}: {text[:90].strip()}"


def cores(layers: list[Layer]) -> Iterator[list[Layer]]:
    """What many adapters have: the layers of all blocks, or those of one kind of blocks, the most layers first."""
    yield [layer for layer in layers if layer.place.numbers] or layers
    stacks: dict[str, list[Layer]] = {}
    for layer in layers:
        stacks.setdefault(layer.place.module.original.partition(".")[0], []).append(layer)
    yield from sorted((each for each in stacks.values() if len(each) > 2), key=len, reverse=True)


def verdict(  # noqa: C901 - what is tried next depends on what was found
    family: str, model: Any, spelling: Spelling, layers: list[Layer]
) -> dict[str, Any]:
    """The line of the table for a spelling; modules by their rules in the original."""

    def tried(some: list[Layer]) -> Outcome:
        return outcome_of(family, model, File(spelling, some))

    whole, rest = tried(layers), layers
    refused: dict[str, str] = {}
    if whole.error:
        core = next((some for some in cores(layers) if tried(some).loaded), None)
        if core is None:
            return {"refuses": whole.error}
        refused = {
            layer.place.module.original: found.error
            for layer in layers
            if layer not in core and (found := tried([*core, layer])).error
        }
        rest = [layer for layer in layers if layer.place.module.original not in refused]
        whole = tried(rest)
        if whole.error or not rest:
            return {"refuses": whole.error or next(iter(refused.values()))}
    if not whole.loaded:
        return {"ignores": "all"}
    line: dict[str, Any] = {}
    left_out = {layer.place.module.original for layer in rest if not whole.loaded.issuperset(layer.parts)}
    misread = {layer.place.module.original for layer in rest if whole.wrong.intersection(layer.parts)}
    if refused:
        line["refuses modules"] = dict(sorted(refused.items()))
    if left_out:
        line["ignores"] = sorted(left_out)
    if misread:
        line["misreads"] = sorted(misread)
    if "diff_b" in spelling.extras and not whole.has_biases:
        line["ignores biases"] = True
    part = [each for each in rest if each.place.numbers[:1] == ("1",) and each.place.module.original not in left_out]
    if part and (error := tried(part[:1]).error):
        kinds = sorted({layer.place.module.original for layer in rest if layer.place.numbers})
        line["refuses parts"] = error
        line["needs"] = [
            kind for kind in kinds if tried([each for each in rest if each.place.module.original != kind]).error
        ]
    return line


# A spelling of the denoiser, and how text encoders are spelled in the same file.
ENCODERS = (
    ("COMPONENT. diffusers lora_A", ("text_encoder.", "text_encoder_2.", "text_encoder_3.")),
    ("lora_unet_ KOHYA lora_down alpha", ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")),
    *(
        (f"diffusion_model. COMFY {tensors}", tuple(f"text_encoders.{name}.transformer." for name in SLOTS))
        for tensors in ("lora_A", "lora_down alpha")
    ),
)


def without_output() -> str:
    """What diffusers says of a text encoder in kohya's names that lacks the output of its attention; "" for nothing."""
    model = model_of("sd")
    spelling = Spelling("lora_unet_", DIFFUSERS, "lora_down", ("alpha",))
    module = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    pair = (torch.randn(RANK, HIDDEN), torch.randn(HIDDEN, RANK), torch.tensor(ALPHA))
    every = {module + end: tensor for end, tensor in zip((*PAIRS["lora_down"], ".alpha"), pair, strict=True)}
    return load(with_encoders("sd", model), File(spelling, layers_of("sd", model)[:1]).tensors | every)


def encoders_of(family: str, model: Any, layers: list[Layer]) -> dict[str, list[str]]:
    """Text encoder → what stands before its modules, and how the denoiser is spelled, where diffusers loads it."""
    table, found = family_named(family), {}
    for text, prefixes in ENCODERS:
        prefix, naming, tensors, *extras = text.split()
        naming = {"KOHYA": table.kohya, "COMFY": table.comfy}.get(naming, naming)
        spelling = Spelling(prefix.replace("COMPONENT", table.component), naming, tensors, tuple(extras))
        for before in prefixes:
            every: dict[str, Tensor] = {}
            for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):  # without out_proj kohya's names are refused
                layer = f"text_model.encoder.layers.0.self_attn.{leaf}"
                stem = before + (layer.replace(".", "_") if before.endswith("_") else layer)
                pair = (torch.randn(RANK, HIDDEN), torch.randn(HIDDEN, RANK))
                every |= {stem + end: tensor for end, tensor in zip(PAIRS[tensors], pair, strict=True)}
                every |= {f"{stem}.alpha": torch.tensor(ALPHA)} if extras else {}
            for component in loaded_encoders(family, model, File(spelling, layers[:1]).tensors | every):
                found.setdefault(component, []).append(before + ENCODER_AND_DENOISER + spelling.key)
    return found


def loaded_encoders(family: str, model: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """The text encoders that get an adapter; none where the file is refused."""
    pipeline = with_encoders(family, model)
    if load(pipeline, tensors):
        return []
    return [name for name in NAMES if getattr(getattr(pipeline, name), "peft_config", None)]


def with_encoders(family: str, model: Any) -> Any:
    """The loader of a family around a model and three text encoders."""
    pipeline = pipeline_of(family, copy.deepcopy(model))
    config = CLIPTextConfig(
        hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    for name in NAMES:
        setattr(pipeline, name, CLIPTextModelWithProjection(config))
    return pipeline


def load(pipeline: Any, tensors: Mapping[str, Tensor]) -> str:
    """Load a file; the message where it is refused, or ""."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline.load_lora_weights({name: tensor.clone() for name, tensor in tensors.items()})
    except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
        return message_of(error)
    return ""


def family_of(name: str) -> dict[str, Any]:
    """The lines of a family: each verdict once, with its spellings; and how text encoders are loaded."""
    model = model_of(name)
    layers = layers_of(name, model)
    lines: dict[str, list[str]] = {}
    for each in spellings(name):
        line = json.dumps(verdict(name, model, each, layers), sort_keys=True)
        lines.setdefault(line, []).append(each.key)
    return {
        "encoders": encoders_of(name, model, layers),
        "lines": [json.loads(line) | {"spellings": keys} for line, keys in lines.items()],
    }


def text_of(value: Mapping[str, Any]) -> str:
    """JSON with a line for each verdict."""
    blocks = []
    for name, family in value["families"].items():
        rows = ",\n".join(f"        {json.dumps(line, sort_keys=True)}" for line in family["lines"])
        encoders = json.dumps(family["encoders"])
        blocks.append(
            f'    {json.dumps(name)}: {{\n      "encoders": {encoders},\n      "lines": [\n{rows}\n      ]\n    }}'
        )
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value[key])},\n" for key in ("version", OUTPUT))
    return f'{{\n{head}  "families": {{\n' + ",\n".join(blocks) + "\n  }\n}\n"


def main() -> int:
    logging.disable(logging.ERROR)
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    known = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"families": {}}
    found = {name: family_of(name) for name in names or MODELS}
    if "--check" in sys.argv:
        differing = [name for name, lines in found.items() if known["families"].get(name) != lines]
        print("differs:", ", ".join(differing) or "nothing")
        return int(bool(differing))
    every = {name: (known["families"] | found)[name] for name in MODELS if name in known["families"] | found}
    value = {"version": diffusers.__version__, OUTPUT: without_output(), "families": every}
    TABLE.write_text(text_of(value), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
