"""Family 1: the config by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loraformat.diagnostics import FindingLocation, Severity, in_file
from loraformat.model.bundle import Json
from loraformat.rules.base import Hit, Subject, rule

PEFT_FILE = "adapter_config.json"
_NO_FILE = "config"


def config_file(subject: Subject) -> str:
    """The file in which the user would look for the config; "config" for formats that keep it elsewhere."""
    return {"peft": PEFT_FILE, "native": "lora_config.json"}.get(subject.format, _NO_FILE)


def config_at(subject: Subject, *path: str | int) -> FindingLocation:
    """The config, or a value in it."""
    file = config_file(subject)
    return FindingLocation(subject=file, path=path) if file == _NO_FILE else in_file(file, *path)


def peft_config(subject: Subject) -> Mapping[str, Json]:
    """The config of a PEFT adapter; {} for other formats, and for one of a pipeline, which has several."""
    assert subject.adapter is not None
    config = subject.adapter.config
    return config.raw if subject.format == "peft" and config.pipeline is None else {}


_LORA = ("LORA", "LOHA", "LOKR")


@rule("LF103", Severity.ERROR, since="0.1.0", forgivable=True)
def schema_violation(subject: Subject) -> Iterator[Hit]:
    """The config violates its JSON Schema: a key is missing, or a value has the wrong type or range.

    ## Why it matters
    Readers that do not check continue with a default, or with a string instead of a number, and fail much later or
    never. The intended rank, scale or targets are then a guess.

    ## Example
    `"r": "8"` in adapter_config.json: a string, not a number.

    ## What to do
    Write `"r": 8`. The schemas are `schemas/peft-{adapter,tuner}-config.schema.json` and
    `schemas/native-config-{0,1}.schema.json`.

    ## Source
    peft 0.21.2, tuners/lora/config.py `LoraConfig`; docs/formats/native.md.
    """
    from loraformat.schema import check

    assert subject.adapter is not None
    config = subject.adapter.config
    is_pipeline = subject.format == "peft" and config.pipeline is not None
    for component, raw in config.raw.items() if is_pipeline else [("", config.raw)]:
        name = _schema_of(subject.format, raw)
        for path, message in check(name, dict(raw)) if name and isinstance(raw, Mapping) else ():
            where = in_file(f"{component}/adapter_config.json", *path) if component else config_at(subject, *path)
            yield Hit(where, message)


def _schema_of(format_name: str, raw: object) -> str:
    """The schema of a config; "" for none."""
    if not isinstance(raw, Mapping) or not raw:
        return ""
    return {
        "peft": "peft-adapter-config" if raw.get("peft_type") in _LORA else "peft-tuner-config",
        "native": "native-config-1" if "format_version" in raw else "native-config-0",
    }.get(format_name, "")


@rule("LF105", Severity.WARNING, since="0.1.0")
def missing_base_model(subject: Subject) -> Iterator[Hit]:
    """A PEFT config does not name its base model.

    ## Why it matters
    An adapter works only with the model that it was trained on. PEFT's `AutoPeftModel`, vLLM and the Hub find it by
    `base_model_name_or_path`; without it every user has to know it, and no program can detect a wrong one.

    ## Example
    `"base_model_name_or_path": null`.

    ## What to do
    Write `"base_model_name_or_path": "meta-llama/Llama-3.1-8B"`, and `"revision"` if it matters.

    ## Source
    peft 0.21.2, config.py `PeftConfigMixin`; auto.py `_BaseAutoPeftModel.from_pretrained`.
    """
    assert subject.adapter is not None
    if subject.format == "peft" and not subject.adapter.config.base_model:
        yield Hit(config_at(subject, "base_model_name_or_path"), "expected the name of a model, found none")
