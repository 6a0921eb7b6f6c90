"""Source models of adapters: which can be opened, how a weight is adapted, how the config names the base."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraformat.containers import open_checkpoint
from loraformat.diagnostics import Finding, listed
from loraformat.errors import UnsupportedUpdate
from loraformat.jobs.algebra.factoring import Form
from loraformat.jobs.algebra.output import Origin
from loraformat.jobs.algebra.selection import matching
from loraformat.matching import is_conv1d, is_table
from loraformat.matching.base_fingerprint import fingerprint_of
from loraformat.model.adapter import AdapterConfig, module_of
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint
from loraformat.naming import architecture_of

_HUB = "hf://"
# The longest kernel of a convolution of one axis; a third axis that is longer is that of matrices, one an expert.
_LONGEST_KERNEL = 16

# Modules that PEFT refuses to adapt, whose weights these models read past the module, and the types of those models.
# Source: peft 0.21.2, tuners/tuners_utils.py `_check_lora_target_modules_mamba`.
_PAST_MODULES = ("out_proj", "conv1d")
_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight is adapted.

    Attributes:
        form: of its update.
        is_transposed: whether the model stores it as (in, out).
    """

    form: Form
    is_transposed: bool = False


def open_model(uri: str) -> Checkpoint:
    """A model of which an adapter can be made.

    Raises: UnsupportedUpdate (LF013): a pipeline, or a GGUF file; and as `open_checkpoint`.
    """
    found = open_checkpoint(uri)
    if found.components:
        names = ", ".join(sorted(found.components))
        raise UnsupportedUpdate(
            "a pipeline of several models; pass one of them",
            where=uri,
            hint=f"pass the folder of a component: {names}",
        )
    if found.settings:
        raise UnsupportedUpdate(
            "a GGUF file has llama.cpp's tensor names, which adapters for training do not use",
            where=uri,
            hint="pass the checkpoint that it was made from",
        )
    return found


def layout_of(
    weight: str, shape: tuple[int, ...], config: Mapping[str, Json], *, merged: bool = False
) -> Layout | None:
    """How LoRA adapts a weight; None where it does not: a vector, a stack of experts, a parameter of another name.

    Nor a convolution of each channel for itself, (C, 1, …): PEFT's factors have its groups, which must divide the rank,
    and are not a product of matrices. Source: peft 0.21.2, tuners/lora/layer.py `_ConvNd.update_layer`.

    Args:
        merged: whether the update goes into the model, so that PEFT need not load an adapter of it.
    """
    if not weight.endswith(".weight") or not 2 <= len(shape) <= 5 or 0 in shape:
        return None
    is_past_module = config.get("model_type") in _MAMBAS and module_of(weight).rpartition(".")[2] in _PAST_MODULES
    if is_past_module and not merged:
        return None
    if len(shape) == 2:
        return Layout(Form(is_embedding=is_table(weight)), is_conv1d(weight, config))
    if len(shape) == 3 and shape[2] > _LONGEST_KERNEL and "conv" not in weight:
        return None
    if shape[0] > 1 and shape[1] == 1:
        return None
    return Layout(Form(kernel=shape[2:]))


def refuse_others(pattern: str, model: Checkpoint, option: str) -> None:
    """Raises: UnsupportedUpdate (LF013): a pattern that matches no weight that LoRA adapts matches other tensors."""
    others = matching(pattern, [name for name, tensor in model.tensors.items() if len(tensor.shape) > 1])
    if others:
        text = f"an adapter cannot change a tensor of this name and shape: {listed(sorted(others))}"
        raise UnsupportedUpdate(text, where=option)


def config_for(
    uri: str,
    base: Checkpoint,
    layouts: Iterable[Layout],
    *,
    raw: Mapping[str, Json] | None = None,
    targets: tuple[str, ...] | None = None,
) -> AdapterConfig:
    """What an adapter for a base says of it.

    Args:
        raw: settings of a PEFT config that are to be in it.
        targets: names by which the modules were chosen.
    """
    name, revision = _name_of(uri, base)
    return AdapterConfig(
        base_model=name,
        base_revision=revision,
        base_fingerprint=fingerprint_of(base).text,
        task=_task_of(base.config),
        fan_in_fan_out=True if any(each.is_transposed for each in layouts) else None,
        targets=targets,
        raw=raw or {},
    )


def _name_of(uri: str, base: Checkpoint) -> tuple[str, str | None]:
    """(name, revision) of a base: of its repository, or the path by which it was given."""
    if not uri.startswith(_HUB):
        return os.path.normpath(uri), None
    name, _, rest = base.uri.removeprefix(_HUB).partition("@")
    return name, rest.partition("/")[0] or None


def _task_of(config: Mapping[str, Json]) -> str | None:
    """PEFT's word for what the class of a model is for, where it needs no head beside the weights."""
    name = architecture_of(config) or ""
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def origin_of_models(models: Mapping[str, Checkpoint], findings: Iterable[Finding] = ()) -> Origin:
    """Models as what an output is made of, by their URIs, the first of which the report is about."""
    return Origin(
        uri=next(iter(models)),
        inputs=tuple(models),
        used=tuple((one.store, _names(one)) for one in models.values()),
        findings=tuple(findings),
    )


def _names(model: Checkpoint) -> list[str]:
    stored = model.as_stored
    return sorted({tensor.file for tensor in stored.tensors.values()})
