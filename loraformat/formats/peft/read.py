"""PEFT, files to Adapter: headers and adapter_config.json only.

Source: peft 0.21.2, utils/save_and_load.py `set_peft_model_state_dict`; tuners/lora/layer.py `update_layer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from loraformat.diagnostics import Finding, FindingLocation, in_file
from loraformat.errors import MissingFile
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.formats.kit.fields import optional_text, readable
from loraformat.formats.kit.findings import (
    announced_but_absent,
    for_residual_base,
    not_only_tensors,
    unknown_setting,
)
from loraformat.formats.kit.folder import left_behind, other_files, tokenizer_files
from loraformat.formats.kit.scaling import agreed
from loraformat.formats.kit.update_slots import vocabulary_of
from loraformat.formats.peft.components import components_of, read_components
from loraformat.formats.peft.config.fields import KNOWN_FIELDS, PeftConfig, parse
from loraformat.formats.peft.files import upcast, weights_of
from loraformat.formats.peft.full_weights import read_wholes
from loraformat.formats.peft.keys import CONFIG, OWN_FILES, Sorted, sort
from loraformat.formats.peft.layers import Built, read_layers
from loraformat.formats.peft.other_weights import notes_of, read_beside
from loraformat.formats.peft.transposed import transpose_back
from loraformat.formats.peft.tuner_layers import part_names, read_tuned, split_shared
from loraformat.formats.peft.tuners import TUNERS
from loraformat.formats.peft.wrapped_layers import transposes_square_experts
from loraformat.model.adapter import Adapter, AdapterConfig, module_of
from loraformat.model.bundle import Bundle, JsonFile
from loraformat.model.updates import Replace, Update


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a PEFT folder, or of one for each component of a pipeline.

    Raises:
        MissingFile (LF101): no adapter_config.json, or no weights.
        ConfigError (LF103): a field that cannot be used, or one that contradicts a hint.
        UnsupportedUpdate (LF013): a kind of adapter that is not read; the message names it.
        FormatError (LF012): two names mean the same tensor, or several adapters lie in one file.
    """
    return read_components(bundle, hints, _read) if components_of(bundle) else _read(bundle, hints)


def _read(bundle: Bundle, hints: Hints) -> Adapter:
    config = _config(bundle, hints)
    file = weights_of(bundle)
    where = in_file(file.name)
    tensors = file.open()
    tensors = replace(tensors, entries=upcast(tensors.entries))
    tuner = TUNERS.get(config.peft_type)
    if tuner is None:
        found = sort(tensors.entries, where)
        found.notes.extend(transpose_back(found, config, hints, where))
        built = read_layers(found, config, hints)
    else:
        shared, entries = split_shared(tensors.entries, tuner)
        found = sort(entries, where, part_names(tuner))
        built = read_tuned(tuner, found, shared, config, hints)
    read_wholes(found, config, built)
    beside = read_beside(bundle, built.layer_weights())
    built.notes.extend(notes_of(beside, built.replaces))
    built.replaces = {**{weight: Replace(value) for weight, value in beside.weights.items()}, **built.replaces}
    updates = built.updates()
    notes = [*found.notes, *built.notes, *_findings(config, built, found, where)]
    if tensors.wrapper or tensors.extras:
        notes.append(not_only_tensors(where, tensors.wrapper, sorted(tensors.extras)))
    return Adapter(
        config=_with_ratio(bundle, _hub_config(config, built, updates, hints)),
        updates=updates,
        tokenizer=tokenizer_files(bundle),
        other_files=other_files(bundle, OWN_FILES),
        unclaimed={**{name: tensors.entries[name] for name in sorted(built.unclaimed)}, **beside.unclaimed},
        notes=(*notes, *_of_trainers(bundle), *left_behind(bundle, (CONFIG, *file.parts, *beside.files))),
    )


_NO_CONFIG = (
    "copy it from where the weights come from, or do without it: convert --from dump --alpha A --to peft -o OUT"
)


def _config(bundle: Bundle, hints: Hints) -> PeftConfig:
    file = bundle.files.get(CONFIG)
    if not isinstance(file, JsonFile):
        raise MissingFile(f"{CONFIG} is missing", where=bundle.uri, hint=_NO_CONFIG)
    return parse(file.load(), hints)


def _findings(config: PeftConfig, built: Built, found: Sorted, where: FindingLocation) -> Iterator[Finding]:
    known = KNOWN_FIELDS.union(TUNERS[config.peft_type].settings if config.peft_type in TUNERS else ())
    unknown = [name for name, value in config.raw.items() if name not in known and value]
    if unknown:
        yield unknown_setting(in_file(CONFIG), sorted(unknown))
    present = {name for weight in found.weights for name in config.saved.of(module_of(weight))}
    missing = [name for name in config.required_modules() if name not in present]
    if missing:
        yield announced_but_absent(where, "the config lists them in modules_to_save", missing)
    plain = [weight for weight, update in built.low_ranks.items() if update.magnitude is None]
    if config.is_dora and plain:
        yield announced_but_absent(where, "the config sets use_dora", plain)
    if config.token_indices is not None and not built.rows:
        yield announced_but_absent(where, "the config has trainable_token_indices", ["trainable_tokens_delta"])


# Folders that LLaMA-Factory puts beside an adapter of PiSSA.
_RESIDUAL = ("pissa_init", "pissa_backup")
# What ms-swift keeps beside adapter_config.json. Source: ms-swift 3602360, tuners/peft.py `LoraConfig`.
_SWIFT, _SWIFT_RATIO = "additional_config.json", "lorap_lr_ratio"


def _of_trainers(bundle: Bundle) -> Iterator[Finding]:
    folder = bundle.uri.rstrip("/").rpartition("/")[2]
    if folder in _RESIDUAL:
        yield for_residual_base(bundle.uri, folder)


def _with_ratio(bundle: Bundle, config: AdapterConfig) -> AdapterConfig:
    """The config with the ratio of LoRA+ that ms-swift writes into a file of its own."""
    stated = readable(bundle, _SWIFT)
    ratio = stated.get(_SWIFT_RATIO) if isinstance(stated, dict) else None
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio < math.inf:
        return config
    return replace(config, raw={"loraplus_lr_ratio": ratio, **config.raw})


def _hub_config(
    config: PeftConfig, built: Built, updates: Mapping[str, tuple[Update, ...]], hints: Hints
) -> AdapterConfig:
    raw = config.raw
    return AdapterConfig(
        base_model=optional_text(raw, "base_model_name_or_path", CONFIG),
        base_revision=optional_text(raw, "revision", CONFIG),
        task=optional_text(raw, "task_type", CONFIG),
        declared_ranks={
            weight: config.rank_of(built.scaled_as.get(weight, module_of(weight))) * built.parts.get(weight, 1)
            for weight in sorted(built.ranked_weights())
        },
        targets=config.targets,
        vocab_size=vocabulary_of(updates),
        fan_in_fan_out=agreed(
            config.fan_in_fan_out, hints.all_transposed, "fan_in_fan_out", in_file(CONFIG, "fan_in_fan_out")
        ),
        transposes_square_experts=transposes_square_experts(config.version) if config.parameters else None,
        layers=config.layers,
        raw=raw,
    )
