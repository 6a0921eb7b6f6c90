"""The facts on a card, from the output's files and the run that made it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraformat import strict_json
from loraformat.containers import bundle_of_store
from loraformat.errors import InvalidJson, LoraFormatError
from loraformat.io import Opened, read_bundle
from loraformat.jobs.card import front_matter
from loraformat.merger.write.manifest import read_manifest
from loraformat.model.adapter import module_of
from loraformat.model.bundle import CARD, OpenedFiles
from loraformat.model.checkpoint import PIPELINE
from loraformat.model.summary import Summary, summarize
from loraformat.rules.metadata.card import is_repository
from loraformat.storage import CHECKPOINT_SUFFIXES, is_hub
from loraformat.strict_json import Json

_CONFIG = "config.json"
_MOST_NBYTES = 1 << 20
# Of the base's card, what is true of what is made of it.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_HEADS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_LIBRARIES = {"peft": "peft", "mlx": "mlx", "diffusers": "diffusers", "kohya": "diffusers", "comfy": "diffusers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedAdapter:
    """An adapter that was merged.

    Attributes:
        name: of its repository, its folder or its file.
        ranks: of its low-rank updates.
        targets: last names of the modules that it changes.
        is_on_the_hub: whether the name is that of a repository.
    """

    name: str
    strength: float = 1.0
    ranks: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    is_on_the_hub: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a run knows of its output beside its files.

    Attributes:
        base: URI of the base; "" where there is none, or it is not known.
        base_fields: of the base's card.
        adapters: those that were merged, or that the output is made of.
        retained: share of the update that survives the rounding.
        made: what was done, in words: "merged", "extracted from a fine-tuned model".
    """

    base: str = ""
    base_fields: Mapping[str, Json] = field(default_factory=dict)
    adapters: tuple[UsedAdapter, ...] = ()
    retained: float | None = None
    made: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a card says.

    Attributes:
        relation: of the output to its base, as the Hub calls it; "" for none of its words.
        base: name of the base on the Hub; "" where it is not there.
        base_label: name of the base for people.
        library: that loads it, as the Hub calls it.
        format: of an adapter; "gguf", "transformers", "diffusers" or "diffusers component" of a model.
        auto_class: of transformers, that loads a model, or the base of an adapter.
        summary: of an adapter.
        scheme: by which the weights are quantized.
        manifest: the SHA-256 that stands in the manifest.
        merges_before: how many merges had made the base.
        weights: names of the weight files.
    """

    relation: str
    base: str = ""
    base_label: str = ""
    library: str = ""
    pipeline_tag: str = ""
    tags: tuple[str, ...] = ()
    fields: Mapping[str, Json] = field(default_factory=dict)
    format: str = ""
    auto_class: str = "AutoModelForCausalLM"
    origin: Origin = field(default_factory=Origin)
    summary: Summary | None = None
    scheme: str = ""
    manifest: str = ""
    merges_before: int = 0
    weights: tuple[str, ...] = ()


def name_of(uri: str) -> str:
    """The name of a repository, or the last part of a path: paths of this machine tell others nothing."""
    if is_hub(uri):
        return "/".join(uri[5:].partition("@")[0].split("/")[:2])
    return os.path.basename(os.path.abspath(uri)) if uri else ""


def fields_of_card(store: OpenedFiles | None) -> Mapping[str, Json]:
    """The front matter of the card among some files; {} where there is none that can be read."""
    if store is None or store.files().get(CARD, _MOST_NBYTES + 1) > _MOST_NBYTES:
        return {}
    try:
        return front_matter.parse(store.read(CARD).decode("utf-8", "replace")).fields
    except LoraFormatError:
        return {}


def used_adapter(uri: str, strength: float, summary: Summary) -> UsedAdapter:
    """An adapter that was opened, for the card of what is made of it."""
    return UsedAdapter(
        name=name_of(uri),
        strength=strength,
        ranks=tuple(summary.ranks),
        targets=tuple(summary.module_kinds),
        is_on_the_hub=is_hub(uri),
    )


def facts_of(store: OpenedFiles, origin: Origin) -> Facts:
    """What the files of an output say, and what is known of it.

    Raises: FormatError and subclasses: it is neither a model nor an adapter that is read.
    """
    config = _object(store, _CONFIG)
    manifest = read_manifest(store)
    if manifest is None and PIPELINE not in store.files():
        opened = _adapter(store, is_model=bool(config))
        if opened is not None:
            return _finished(_of_adapter(opened, store), origin)
    return _finished(_of_model(store, config, manifest), _with_manifest(origin, manifest))


def _adapter(store: OpenedFiles, *, is_model: bool) -> Opened | None:
    """The files as an adapter; None for those of a model."""
    try:
        return read_bundle(bundle_of_store(store, store.uri))
    except LoraFormatError:
        if is_model or PIPELINE in store.files():
            return None
        raise


def _of_adapter(opened: Opened, store: OpenedFiles) -> Facts:
    summary, name = summarize(opened.adapter), opened.format.NAME
    is_image = summary.family is not None
    is_lora = set(summary.update_kinds) <= {"low-rank"}
    base = summary.base_model or ""
    is_named = is_repository(base)
    kinds = ("lora",) if is_lora else ()
    return Facts(
        relation="adapter",
        base=base if is_named else "",
        base_label=base if is_named else name_of(base),
        library="diffusers" if is_image else _LIBRARIES.get(name, ""),
        pipeline_tag="text-to-image" if is_image else _TASKS.get(summary.task or "", ""),
        tags=(*kinds, *(("gguf",) if name == "gguf" else ()), "loraformat"),
        format="diffusers" if is_image and name != "peft" else name,
        auto_class=_auto_class(_TASKS.get(summary.task or "", "text-generation")),
        summary=summary,
        weights=_weights(store),
    )


def _of_model(store: OpenedFiles, config: Mapping[str, Json], manifest: Mapping[str, Any] | None) -> Facts:
    architectures = front_matter.texts(config.get("architectures"))
    head = next((tag for end, tag in _HEADS.items() if architectures and architectures[0].endswith(end)), "")
    settings = config.get("quantization_config")
    scheme = settings.get("quant_method") if isinstance(settings, dict) else ""
    files, weights = store.files(), _weights(store)
    is_gguf = bool(weights) and all(name.endswith(".gguf") for name in weights)
    is_pipeline = PIPELINE in files
    is_component = "_class_name" in config
    form = "gguf" if is_gguf else "diffusers" if is_pipeline else "component" if is_component else "transformers"
    has_adapters = bool(manifest and manifest["adapters"])
    relation = "merge" if has_adapters else "quantized" if scheme or is_gguf else ""
    named = config.get("_name_or_path")
    base = named if isinstance(named, str) and is_repository(named) else ""
    return Facts(
        relation=relation,
        base=base,
        base_label=base,
        library={"diffusers": "diffusers", "component": "diffusers", "transformers": "transformers"}.get(form, ""),
        pipeline_tag=head,
        tags=(*(("merge",) if has_adapters else ()), *(("gguf",) if is_gguf else ()), "loraformat"),
        format=form,
        auto_class=_auto_class(head),
        scheme=scheme if isinstance(scheme, str) else "",
        manifest=str(manifest["sha256"]) if manifest is not None else "",
        merges_before=len(manifest["history"]) if manifest is not None else 0,
        weights=weights,
    )


def _with_manifest(origin: Origin, manifest: Mapping[str, Any] | None) -> Origin:
    """What is known, with what the manifest says of adapters where the run that merged them is over."""
    if manifest is None:
        return origin
    made = origin.made or {"merge": "merged", "dequantize": "dequantized"}.get(manifest["job"], "")
    if origin.adapters:
        return replace(origin, made=made)
    targets: dict[int, set[str]] = {}
    for weight in manifest["weights"].values():
        for term in weight["terms"]:
            targets.setdefault(term["adapter"], set()).add(module_of(term["weight"]).rpartition(".")[2])
    adapters = tuple(
        UsedAdapter(
            name=f"{one['files'][0]['name'] if one['files'] else 'adapter'}, digest {one['digest'][:12]}",
            strength=one["strength"],
            targets=tuple(sorted(targets.get(number, ()))),
        )
        for number, one in enumerate(manifest["adapters"])
    )
    return replace(origin, made=made, adapters=adapters)


def _finished(facts: Facts, origin: Origin) -> Facts:
    """The facts with the base of the run, and what its card says of everything made of it."""
    inherited: dict[str, Json] = {key: origin.base_fields[key] for key in _INHERITED if key in origin.base_fields}
    tag = inherited.pop("pipeline_tag", None)
    base, label = (name_of(origin.base) if is_hub(origin.base) else "", name_of(origin.base))
    return replace(
        facts,
        base=base or facts.base,
        base_label=(base or facts.base or label or facts.base_label),
        pipeline_tag=tag if isinstance(tag, str) else facts.pipeline_tag,
        fields=inherited,
        origin=origin,
    )


def _auto_class(tag: str) -> str:
    names = {
        "text-generation": "AutoModelForCausalLM",
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "question-answering": "AutoModelForQuestionAnswering",
    }
    return names.get(tag, "AutoModel")


def _weights(store: OpenedFiles) -> tuple[str, ...]:
    return tuple(name for name in store.files() if name.endswith((*CHECKPOINT_SUFFIXES, ".npz")))


def _object(store: OpenedFiles, name: str) -> Mapping[str, Json]:
    if store.files().get(name, _MOST_NBYTES + 1) > _MOST_NBYTES:
        return {}
    try:
        value = strict_json.parse(store.read(name), name, limit=_MOST_NBYTES)
    except InvalidJson:
        return {}
    return value if isinstance(value, dict) else {}


def sequence(values: Sequence[object]) -> str:
    """A few values for people: "8", "4, 8 and 16"."""
    words = [str(each) for each in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
