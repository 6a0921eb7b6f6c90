"""A GGUF adapter, file to Adapter.

Source: llama.cpp of llama_cpp_python 0.3.36, src/llama-adapter.cpp `llama_adapter_lora_init_impl`, `get_scale`;
convert_lora_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loraformat.diagnostics import Finding, FindingLocation, in_file, in_weights, show
from loraformat.errors import ConfigError, FormatError, MissingFile, UnsupportedUpdate
from loraformat.formats.gguf.translate import in_order_of_halves
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.formats.kit.findings import unpaired_factor
from loraformat.formats.kit.folder import left_behind, other_files, tokenizer_files
from loraformat.formats.kit.scaling import agreed
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, Json
from loraformat.model.format_files import the_file
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Update
from loraformat.naming import LlamaCppModel, model_of_config, model_of_settings
from loraformat.naming.llama_cpp import ARCHITECTURE_KEY, EMBEDDING

ALPHA_KEY = "adapter.lora.alpha"
_SIDES = {".lora_a": "a", ".lora_b": "b"}
_BASE_NAME = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")


@dataclass(slots=True)
class _Found:
    """What the tensors of a file are."""

    pairs: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    unclaimed: dict[str, LazyTensor] = field(default_factory=dict)
    notes: list[Finding] = field(default_factory=list)


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a GGUF file: in the names of transformers, or in llama.cpp's where the base is a GGUF file.

    Without a base it keeps llama.cpp's names too where only a base tells in which order rows stand elsewhere.

    Raises:
        MissingFile (LF101): not exactly one weight file.
        FormatError (LF012): the file is a model, or says that it is for another architecture than the base.
        UnsupportedUpdate (LF013): another kind of adapter than LoRA.
        ConfigError (LF103): factors that do not fit each other; rows whose order only the base tells, without it.
    """
    file = the_file(bundle)
    if file is None:
        raise MissingFile("expected exactly one weight file", where=bundle.uri, hint="pass the path of the .gguf file")
    tensors, where = file.open(), in_file(file.name)
    settings = tensors.extras
    _check_kind(settings, where)
    found = _sorted(tensors.entries, where)
    alpha = agreed(_alpha(settings, where), hints.alpha, "alpha", where)
    updates: dict[str, tuple[Update, ...]] = {}
    model = _model(settings, found.pairs, hints, where)
    _check_architecture(settings, hints, where)
    for tensor, pair in found.pairs.items():
        update = _update(tensor, pair["a"], pair["b"], alpha, hints)
        for name, one in (
            {tensor: update} if model is None else _in_transformers(tensor, update, model, hints)
        ).items():
            updates[name] = (one,)
    own = (file.name,)
    return Adapter(
        config=AdapterConfig(base_model=_base_model(settings), raw=dict(settings)),
        updates=dict(sorted(updates.items())),
        tokenizer=tokenizer_files(bundle),
        other_files=other_files(bundle, own),
        unclaimed=found.unclaimed,
        notes=(*found.notes, *left_behind(bundle, own)),
    )


def _check_kind(settings: Mapping[str, Json], where: FindingLocation) -> None:
    kind, adapter = settings.get("general.type"), settings.get("adapter.type")
    if kind != "adapter":
        raise FormatError(
            f'general.type is "{show(kind, 40)}", expected "adapter"',
            where=where,
            hint="pass a model as the base of merge",
        )
    if adapter != "lora":
        raise UnsupportedUpdate(f'adapter.type is "{show(adapter, 40)}"; only "lora" is supported', where=where)


def _sorted(entries: Mapping[str, LazyTensor], where: FindingLocation) -> _Found:
    found = _Found()
    for name, tensor in entries.items():
        side = _SIDES.get(name[-7:])
        if side is None:
            found.unclaimed[name] = tensor
        else:
            found.pairs.setdefault(name[:-7], {})[side] = tensor
    for stem in [stem for stem, pair in found.pairs.items() if len(pair) < 2]:
        ((side, tensor),) = found.pairs.pop(stem).items()
        other = "b" if side == "a" else "a"
        found.unclaimed[f"{stem}.lora_{side}"] = tensor
        found.notes.append(unpaired_factor(in_weights(stem, file=where.file), f"lora_{side}", f"lora_{other}"))
    return found


def _alpha(settings: Mapping[str, Json], where: FindingLocation) -> float:
    """0 where the file has none, as in llama.cpp."""
    value = settings.get(ALPHA_KEY, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{ALPHA_KEY}: expected a number, found {show(value, 40)}", where=where)
    return float(value)


def _update(name: str, a: LazyTensor, b: LazyTensor, alpha: float | None, hints: Hints) -> LowRank:
    """The update of a tensor of llama.cpp; of the input embedding A stands as (vocabulary, rank)."""
    is_embedding = name == EMBEDDING
    axes = 3 if len(a.shape) == 3 else 2
    rank = b.shape[-1] if b.shape else 0
    fits = len(a.shape) == len(b.shape) == axes and rank > 0 and rank == (a.shape[-1] if is_embedding else a.shape[-2])
    if not fits or (axes == 3 and (is_embedding or a.shape[0] != b.shape[0])):
        text = f"lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit each other"
        raise ConfigError(text, where=in_weights(name))
    scale = alpha / rank if alpha else 1.0
    stated = agreed(scale, hints.scale, "a scale of", in_weights(name))
    if is_embedding:
        return LowRank(a, b.T, stated, is_embedding=True)
    return LowRank(b, a, stated)


def _model(
    settings: Mapping[str, Json], tensors: Iterable[str], hints: Hints, where: FindingLocation
) -> LlamaCppModel | None:
    """The model that the adapter is for, from the base's config where there is one; None to keep llama.cpp's names."""
    if hints.settings:
        return None
    stated = model_of_settings(settings)
    if stated is None:
        name = show(settings.get(ARCHITECTURE_KEY), 60)
        raise UnsupportedUpdate(
            f'the tensor names of the architecture "{name}" are unknown',
            where=where,
            hint="pass the base as a GGUF file with --base: its names are the adapter's",
        )
    if hints.weights is None and not hints.config and not stated.heads and any(map(stated.is_turned, tensors)):
        return None
    return model_of_config(hints.config) or stated


def _check_architecture(settings: Mapping[str, Json], hints: Hints, where: FindingLocation) -> None:
    of_base = hints.settings.get(ARCHITECTURE_KEY)
    known = model_of_config(hints.config)
    wanted = of_base if of_base is not None else None if known is None else known.architecture
    stated = settings.get(ARCHITECTURE_KEY)
    if wanted is not None and stated != wanted:
        text = f'the adapter is for the architecture "{show(stated, 60)}", the base is "{show(wanted, 60)}"'
        raise FormatError(text, where=where, hint="is this the base that the adapter was trained on?")


def _in_transformers(tensor: str, update: LowRank, model: LlamaCppModel, hints: Hints) -> dict[str, LowRank]:
    """The updates of a tensor under the names of transformers, with rows in its order."""
    if update.is_stack:
        return {
            _name(tensor, model, hints, number): LowRank(
                update.up.rows(number, number + 1).reshape(*update.up.shape[1:]),
                update.down.rows(number, number + 1).reshape(*update.down.shape[1:]),
                update.scale,
            )
            for number in range(update.up.shape[0])
        }
    try:
        heads = model.heads_of(tensor)
    except LookupError:
        raise ConfigError(
            f"llama.cpp reorders the rows of q and k of {model.architecture}, and the number of heads is unknown",
            where=in_weights(tensor),
            hint="pass the base with --base: its config.json has it",
        ) from None
    if heads:
        up = in_order_of_halves(tensor, update.up, heads, inverse=True)
        update = LowRank(up, update.down, update.scale)
    return {_name(tensor, model, hints, None): update}


def _name(tensor: str, model: LlamaCppModel, hints: Hints, expert: int | None) -> str:
    names = list(model.weights_of(tensor, expert))
    if not names:
        raise UnsupportedUpdate(
            f"its name in transformers is unknown for {model.architecture}",
            where=in_weights(tensor),
            hint="pass the base as a GGUF file with --base: its names are the adapter's",
        )
    nested = [name.replace("model.", "model.language_model.", 1) for name in names]
    known = (name for name in (*names, *nested) if name in (hints.weights or {}))
    return next(known, names[0])


def _base_model(settings: Mapping[str, Json]) -> str | None:
    """What the Hub calls the base."""
    url = settings.get("general.base_model.0.repo_url")
    found = _BASE_NAME.fullmatch(url) if isinstance(url, str) else None
    name = settings.get("general.base_model.0.name")
    return found[1] if found else name if isinstance(name, str) else None
