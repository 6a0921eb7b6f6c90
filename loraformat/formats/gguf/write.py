"""A GGUF adapter, Adapter to file: what llama.cpp and Ollama load with a GGUF base.

Source: llama.cpp of llama_cpp_python 0.3.36, src/llama-adapter.cpp; convert_lora_to_gguf.py; ollama fb30760, docs of
the Modelfile.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from loraformat.diagnostics import Finding
from loraformat.errors import FormatError
from loraformat.formats.gguf.read import ALPHA_KEY
from loraformat.formats.gguf.translate import Translated, translated
from loraformat.formats.kit.base import DEFAULT_OPTIONS, WriteOptions
from loraformat.formats.kit.folder import bundle_of, lost_beside
from loraformat.formats.kit.losses import (
    folded_scale,
    reduced_precision,
    unknown_scale,
    unsupported_update,
    unsupported_updates,
)
from loraformat.formats.kit.normalize import folding_error, multiplied
from loraformat.formats.kit.update_slots import most_common, unsaid, unstated_fields
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle, File, Json, RawFile, TensorFile, Tensors
from loraformat.model.floats import ROUNDOFF
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import LowRank, Update, kind_of
from loraformat.naming import LlamaCppModel, known_classes, model_of_config, model_of_settings
from loraformat.naming.llama_cpp import ARCHITECTURE_KEY, EMBEDDING, HEAD, Place

FILE = "adapter.gguf"
MODELFILE = "Modelfile"
_DTYPES = (DType.F32, DType.F16, DType.BF16)
_WHOSE = "a GGUF adapter"
# Settings of a source that is GGUF which this writer states itself.
_OWN = (ARCHITECTURE_KEY, "general.type", "adapter.type", ALPHA_KEY, "general.alignment", "general.file_type")
_ALORA = "adapter.alora.invocation_tokens"
_MOST_NAME_NBYTES = 63


def losses(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:
    """What llama.cpp cannot hold, and what one alpha for all changes."""
    model = _model(options)
    if model is None:
        what = _unknown_base(options)
        if what:
            yield unsupported_update("", what, _WHOSE)
        else:
            yield unsupported_update("", "an adapter without its base", _WHOSE, hint="pass the base with --base BASE")
        return
    faults = list(_faults(adapter, model, options))
    yield from unsupported_updates(faults, _WHOSE)
    unknown = [weight for weight, chain in adapter.updates.items() if _has_no_scale(chain)]
    if unknown:
        yield unknown_scale("", unknown)
    if not adapter.updates:
        yield unsupported_update("", "an adapter without low-rank updates", _WHOSE)
    if not faults and not unknown and adapter.updates:
        try:
            found = _in_llama_cpp(adapter, model, options)
        except FormatError as error:
            yield unsupported_update(error.location.tensor or "", f"({error.message}), an update", _WHOSE)
            return
        yield from found.changes
        yield from _even(_low_ranks(found.adapter)).changes
    yield from lost_beside(adapter, _dropped(adapter), (FILE, *([MODELFILE] if options.modelfile else [])))


def write(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:
    """A folder with adapter.gguf, and a Modelfile where one is wanted.

    Raises: AssertionError: `losses` has an error-level finding.
    """
    model = _model(options)
    assert model is not None
    even = _even(_low_ranks(_in_llama_cpp(adapter, model, options).adapter))
    entries: dict[str, LazyTensor] = {}
    for name, update in even.updates.items():
        a, b = (update.up, update.down.T) if name == EMBEDDING else (update.down, update.up)
        entries[f"{name}.lora_a"], entries[f"{name}.lora_b"] = a, b
    tensors = Tensors("gguf", entries, extras=_settings(adapter, model, even.alpha))
    nbytes = sum(entry.nbytes for entry in entries.values())
    files: list[File] = [TensorFile(FILE, nbytes, lambda: tensors)]
    if options.modelfile:
        content = f"FROM {options.modelfile}\nADAPTER ./{FILE}\n".encode()
        files.append(RawFile(MODELFILE, len(content), lambda: content))
    return bundle_of(files, adapter)


@dataclass(frozen=True, slots=True)
class _Even:
    """Low-rank updates with one alpha: the scale of each is alpha through its rank."""

    updates: Mapping[str, LowRank]
    alpha: float
    changes: tuple[Finding, ...]


def _even(updates: Mapping[str, LowRank]) -> _Even:
    """The most common alpha, and the scales that are others worked into `up`.

    An alpha of 0 means a scale of 1 in llama.cpp, so that updates of scale 0 are worked in as well.
    """
    wanted = {name: (update.scale or 0.0) * update.rank for name, update in updates.items()}
    exact = most_common([alpha for alpha in wanted.values() if alpha], default=1.0)
    (alpha,) = struct.unpack("<f", struct.pack("<f", exact))
    changes: list[Finding] = []
    if alpha != exact:
        changes.append(reduced_precision("", "alpha in float64", "float32", ROUNDOFF[DType.F32]))
    others = {name: update for name, update in updates.items() if wanted[name] != exact}
    folded = {
        name: replace(
            update, up=multiplied(update.up, (update.scale or 0.0) * update.rank / alpha), scale=alpha / update.rank
        )
        for name, update in others.items()
    }
    if others:
        error = max(folding_error(update, alpha / update.rank) for update in others.values())
        changes.append(folded_scale("", list(others), error))
    return _Even({**updates, **folded}, alpha, tuple(changes))


def _model(options: WriteOptions) -> LlamaCppModel | None:
    """The model of the base; whether its head is the embedding is read from config.json, else from its tensors."""
    weights = options.base.weights or {}
    if options.base.settings:
        found = model_of_settings(options.base.settings)
        return None if found is None else replace(found, is_tied=HEAD not in weights)
    found = model_of_config(options.base.config)
    if found is None or found.is_tied is not None or not weights:
        return found
    return replace(found, is_tied=not any(name.endswith("lm_head.weight") for name in weights))


def _unknown_base(options: WriteOptions) -> str:
    """What is not known of the base; "" where none was given."""
    if options.base.config or options.base.settings:
        stated = options.base.config.get("architectures") or options.base.settings.get(ARCHITECTURE_KEY)
        if not stated:
            return "an adapter whose base states no architecture in its config.json"
        return f"an adapter for {stated}, whose names in llama.cpp are unknown (known: {', '.join(known_classes())}),"
    return ""


def _in_llama_cpp(adapter: Adapter, model: LlamaCppModel, options: WriteOptions) -> Translated:
    experts = next(
        (value for key in _EXPERT_KEYS if isinstance(value := options.base.config.get(key), int) and value > 0), None
    )
    if options.base.settings:  # read in its names already
        return Translated(adapter, (), ())
    return translated(adapter, model, experts)


# Source: llama.cpp, conversion/base.py and qwen.py, `find_hparam`.
_EXPERT_KEYS = ("num_local_experts", "num_experts")


def _faults(adapter: Adapter, model: LlamaCppModel, options: WriteOptions) -> Iterator[tuple[str, str]]:
    for weight, chain in adapter.updates.items():
        names = model.stacks(weight)
        if names:
            if (fault := _fault(names[0], chain, model)) is not None:
                yield weight, fault
            continue
        try:
            place = Place(weight) if options.base.settings else model.place(weight)
        except LookupError:
            yield weight, "an update whose rows belong to a number of heads that the base does not state"
            continue
        if place is None:
            yield weight, f"an update of a weight that llama.cpp has no tensor for in {model.architecture}"
        elif (fault := _fault(place.tensor, chain, model)) is not None:
            yield weight, fault


def _fault(weight: str, chain: tuple[Update, ...], model: LlamaCppModel) -> str | None:
    if model.is_tied and weight in (HEAD, EMBEDDING):
        return f"an update of {weight}, a tied table that llama.cpp loads only once,"
    (update, *others) = chain
    if others:
        return "several updates of one weight"
    if not isinstance(update, LowRank):
        return f"an update of the kind {kind_of(update).name}"
    if update.magnitude is not None:
        return "a DoRA magnitude"
    if update.kernel:
        return "a low-rank update of a convolution"
    if not weight.endswith(".weight"):
        return "a low-rank update of a parameter that is not called weight"
    if update.up.dtype not in _DTYPES or update.down.dtype not in _DTYPES:
        return f"a tensor in {update.up.dtype.torch_name} (--dtype float32 rounds it)"
    if len(weight) + len(".lora_a") > _MOST_NAME_NBYTES:
        return "a name that is too long for GGUF"
    return None


def _low_ranks(adapter: Adapter) -> dict[str, LowRank]:
    return {
        weight: update for weight, chain in adapter.updates.items() for update in chain if isinstance(update, LowRank)
    }


def _has_no_scale(chain: tuple[Update, ...]) -> bool:
    return any(isinstance(update, LowRank) and update.scale is None for update in chain)


def _settings(adapter: Adapter, model: LlamaCppModel, alpha: float) -> dict[str, Json]:
    raw = adapter.config.raw
    is_gguf = raw.get("general.type") == "adapter"
    carried = {key: value for key, value in raw.items() if key not in _OWN and _is_plain(value)} if is_gguf else {}
    tokens = raw.get("alora_invocation_tokens")
    return {
        ARCHITECTURE_KEY: model.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        ALPHA_KEY: alpha,
        **_base_model(adapter.config.base_model),
        **({_ALORA: tokens} if isinstance(tokens, list) and tokens else {}),
        **carried,
    }


def _base_model(name: str | None) -> dict[str, Json]:
    """The base as llama.cpp's converter names it, where the Hub has it."""
    if not name:
        return {}
    owner, slash, short = name.partition("/")
    if not slash or "/" in short or not owner:
        return {"general.base_model.count": 1, "general.base_model.0.name": name}
    return {
        "general.base_model.count": 1,
        "general.base_model.0.name": short,
        "general.base_model.0.organization": owner,
        "general.base_model.0.repo_url": f"https://huggingface.co/{name}",
    }


def _is_plain(value: Json) -> bool:
    several = value if isinstance(value, list) else [value]
    is_whole = all(not isinstance(one, int) or 0 <= one < 1 << 32 for one in several)
    return bool(several) and is_whole and all(isinstance(one, (str, int, float)) for one in several)


def _dropped(adapter: Adapter) -> list[str]:
    raw = adapter.config.raw
    if raw.get("general.type") == "adapter":
        return [key for key, value in raw.items() if key not in _OWN and not _is_plain(value)]
    names = unsaid(adapter.config, "base_model", "task", container="gguf")
    return names + [name for name in unstated_fields(raw) if name not in ("alora_invocation_tokens", "peft_type")]
