"""Family 1, second part: settings of a PEFT config that contradict each other or should not be there."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from loraformat.budget import Budget
from loraformat.diagnostics import FindingLocation, Severity, counted, in_file
from loraformat.model.adapter import module_of
from loraformat.model.bundle import Json
from loraformat.model.patterns.keys import OutOfSteps, PatternKeys
from loraformat.rules.base import Hit, Subject, rule
from loraformat.rules.config import PEFT_FILE, config_at, peft_config
from loraformat.rules.consistency import is_one_of

if TYPE_CHECKING:
    from loraformat.model.patterns.matching import Matcher

NEWEST_PEFT = (0, 21)
_LONGEST_PATTERN = 10_000  # characters; compiling takes time in proportion
# peft 0.21.2, utils/peft_types.py `TaskType`.
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_USUAL_LIBRARIES = ("transformers", "diffusers", "peft", "torch", "sentence_transformers", "timm", "__main__")
_TRAINED_ON_CODES = (
    "to reproduce the trained model, merge into it with --dequantize, or, for bitsandbytes, into the 16-bit model "
    "with --as-trained"
)
_TRAINED_ON_AWQ = "merge into it with --dequantize; the update does not fit the 16-bit model"
_QUANTISED = re.compile(r"(?i)(?:^|[-_./])(bnb-4bit|bnb-8bit|4bit|8bit|int4|int8|gptq|awq|gguf|nf4|fp8|hqq|aqlm)\b")


@rule("LF106", Severity.WARNING, since="0.1.0", publishing=True)
def base_is_a_path(subject: Subject) -> Iterator[Hit]:
    """The config names the base model by a local path or a URL.

    ## Why it matters
    The path does not exist elsewhere. Servers that look up the base fail or skip the check, and the Hub rejects such a
    name in a model card.

    ## Example
    `"base_model_name_or_path": "/home/ana/models/llama"`.

    ## What to do
    Write its name on the Hub: `"base_model_name_or_path": "meta-llama/Llama-3.1-8B"`.

    ## Source
    transformers issue 33922; peft pull request 2124.
    """
    assert subject.adapter is not None
    named = subject.adapter.config.base_model
    if named and _is_place(named):
        yield Hit(config_at(subject, "base_model_name_or_path"), f'expected the name of a model, found "{named}"')


@rule("LF107", Severity.ERROR, since="0.1.0", forgivable=True)
def unknown_task(subject: Subject) -> Iterator[Hit]:
    """PEFT does not know this `task_type`.

    ## Why it matters
    PEFT raises `Invalid task type` and does not load the adapter.

    ## Example
    `"task_type": "CAUSAL_LANGUAGE_MODELING"`.

    ## What to do
    Write `"task_type": "CAUSAL_LM"`, or null if none of PEFT's types fits.

    ## Source
    peft 0.21.2, config.py `PeftConfigMixin.__post_init__`, utils/peft_types.py `TaskType`.
    """
    task = peft_config(subject).get("task_type")
    if isinstance(task, str) and task not in _TASKS:
        yield Hit(in_file(PEFT_FILE, "task_type"), f'expected one of {", ".join(_TASKS)}, found "{task}"')


@rule("LF117", Severity.ERROR, since="0.1.0", forgivable=True)
def broken_pattern(subject: Subject) -> Iterator[Hit]:
    """A regular expression in the config is invalid: Python's `re` rejects it.

    ## Why it matters
    PEFT raises an error when it compares the expression with the first module, and does not load the adapter.

    ## Example
    `"target_modules": "(q_proj|v_proj"`.

    ## What to do
    Close the bracket, or list the names.

    ## Source
    peft 0.21.2, tuners/tuners_utils.py `check_target_module_exists`; utils/other.py `get_pattern_key`.
    """
    raw = peft_config(subject)
    for field in ("target_modules", "exclude_modules"):
        pattern = raw.get(field)
        if isinstance(pattern, str) and (fault := _fault(pattern)):
            yield Hit(in_file(PEFT_FILE, field), f'"{pattern}" is not a regular expression: {fault}')
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = raw.get(field)
        for pattern in patterns if isinstance(patterns, dict) else ():
            if fault := _fault(f"({pattern})"):
                yield Hit(in_file(PEFT_FILE, field), f'"{pattern}" is not a regular expression: {fault}')


def _fault(pattern: str) -> str:
    """What is wrong with a regular expression; nothing where it is right, or too long to be compiled in no time."""
    if len(pattern) > _LONGEST_PATTERN:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except re.error as error:
        return error.msg
    except (RecursionError, OverflowError, MemoryError):
        return ""
    return ""


@rule("LF108", Severity.ERROR, since="0.1.0", forgivable=True)
def conflicting_settings(subject: Subject) -> Iterator[Hit]:
    """Two settings exclude each other, and PEFT rejects the config.

    ## Why it matters
    `LoraConfig` raises an error, so the adapter cannot be loaded, whatever its tensors are.

    ## Example
    `"layers_to_transform": [0, 1]` together with a `target_modules` that is a regular expression.

    ## What to do
    Put the layers into the expression, or list the modules.

    ## Source
    peft 0.21.2, tuners/lora/config.py `LoraConfig.__post_init__`.
    """
    raw = peft_config(subject)
    is_pattern = isinstance(raw.get("target_modules"), str)
    for field in ("layers_to_transform", "layers_pattern"):
        if is_pattern and raw.get(field) is not None:
            yield Hit(in_file(PEFT_FILE, field), "cannot be used when target_modules is a regular expression")
    if raw.get("layers_pattern") and raw.get("layers_to_transform") is None:
        yield Hit(in_file(PEFT_FILE, "layers_pattern"), "needs layers_to_transform, which is not set")
    for field in ("megatron_config", "lora_bias"):
        if raw.get("use_dora") is True and raw.get(field):
            yield Hit(in_file(PEFT_FILE, field), "cannot be used together with use_dora")


@rule("LF109", Severity.INFO, since="0.1.0")
def repeated_target(subject: Subject) -> Iterator[Hit]:
    """`target_modules` lists a module twice.

    ## Why it matters
    It is harmless, but suggests that somebody edited the list by hand and may have meant another name.

    ## Example
    `"target_modules": ["q_proj", "q_proj"]`.

    ## What to do
    List each name once.

    ## Source
    peft 0.21.2, tuners/lora/config.py makes a set of the list.
    """
    assert subject.adapter is not None
    targets = subject.adapter.config.targets
    if isinstance(targets, tuple):
        for name, count in Counter(targets).items():
            if count > 1:
                yield Hit(config_at(subject, "target_modules"), f'"{name}" appears {count} times')


@rule("LF110", Severity.WARNING, since="0.1.0")
def excluded_target(subject: Subject) -> Iterator[Hit]:
    """The adapter has tensors for a module that `exclude_modules` excludes.

    ## Why it matters
    PEFT does not create a layer for an excluded module, so it ignores the tensors as unexpected keys.

    ## Example
    `"exclude_modules": ["v_proj"]` and a tensor `v_proj.lora_A.weight`.

    ## What to do
    Remove the name from `exclude_modules`, or the tensors from the file.

    ## Source
    peft 0.21.2, tuners/tuners_utils.py `check_target_module_exists`.
    """
    assert subject.adapter is not None
    excluded = peft_config(subject).get("exclude_modules")
    names = frozenset(name for name in excluded if isinstance(name, str)) if isinstance(excluded, list) else ()
    where = in_file(PEFT_FILE, "exclude_modules")
    matcher = _matcher(excluded, subject.budget) if isinstance(excluded, str) else None
    modules = dict.fromkeys(module_of(weight) for weight in subject.adapter.updates)
    for number, module in enumerate(modules):
        is_out = matcher.fullmatch(module) if matcher is not None else is_one_of(module, names)
        if is_out is None:
            left = len(modules) - number
            subject.budget.leave_out(
                where, f"the pattern was not compared with {left} of {counted(len(modules), 'module')}"
            )
            return
        if is_out:
            yield Hit(where, f"leaves out {module}, although it has tensors")
            return


@rule("LF111", Severity.WARNING, since="0.1.0")
def ambiguous_pattern(subject: Subject) -> Iterator[Hit]:
    """Two keys of `rank_pattern` or `alpha_pattern` match one module and state different values.

    ## Why it matters
    The first key in the file wins, but JSON objects have no order: a program that sorts or rewrites the file changes
    the model.

    ## Example
    `"alpha_pattern": {"q_proj": 8, "layers.0.self_attn.q_proj": 16}`.

    ## What to do
    Use keys that cannot match the same module, such as full module paths.

    ## Source
    peft 0.21.2, utils/other.py `get_pattern_key`; RFC 8259, section 4.
    """
    assert subject.adapter is not None
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = peft_config(subject).get(field)
        if not isinstance(patterns, dict) or len(patterns) < 2:
            continue
        modules = dict.fromkeys(module_of(weight) for weight in subject.adapter.updates)
        keys = PatternKeys(list(patterns), subject.budget)
        try:
            ambiguous = next(_ambiguous(keys, patterns, modules), None)
        except OutOfSteps:
            of = counted(len(modules), "module")
            told = f"{counted(len(patterns), 'pattern', 'was')} not compared with {of} because that would take too long"
            subject.budget.leave_out(in_file(PEFT_FILE, field), told)
            continue
        if ambiguous is not None:
            module, first, other = ambiguous
            found = f'"{first}" and "{other}" both match {module}, with different values'
            yield Hit(in_file(PEFT_FILE, field), found)


def _ambiguous(keys: PatternKeys, values: Mapping[str, Json], modules: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Modules with the two first keys that match them and state different values."""
    for module in modules:
        first, *others = keys.all_matches(module) or ("",)
        other = next((key for key in others if str(values[key]) != str(values[first])), None)
        if other is not None:
            yield module, first, other


@rule("LF112", Severity.WARNING, since="0.1.0")
def imports_library(subject: Subject) -> Iterator[Hit]:
    """The config names a Python library that PEFT imports when it loads the adapter.

    ## Why it matters
    Importing a module runs its code, and the file decides which module that is. loraformat does not import anything.

    ## Example
    `"auto_mapping": {"base_model_class": "Model", "parent_library": "antigravity"}`.

    ## What to do
    Set it to null, and load the adapter with `PeftModel.from_pretrained(model, …)` on a model that your own code built.

    ## Source
    peft 0.21.2, auto.py `_BaseAutoPeftModel.from_pretrained`; peft pull request 3085 on `megatron_core`.
    """
    raw = peft_config(subject)
    mapping = raw.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if isinstance(library, str) and library.partition(".")[0] not in _USUAL_LIBRARIES:
        yield Hit(in_file(PEFT_FILE, "auto_mapping"), f'PEFT would import "{library}" when it loads the adapter')
    core = raw.get("megatron_core")
    if isinstance(core, str) and core != "megatron.core":
        yield Hit(in_file(PEFT_FILE, "megatron_core"), f'PEFT would import "{core}" when it loads the adapter')


@rule("LF113", Severity.INFO, since="0.1.0")
def training_mode(subject: Subject) -> Iterator[Hit]:
    """The config was saved with `inference_mode: false`.

    ## Why it matters
    PEFT's `save_pretrained` sets it to true, so something else wrote this file: perhaps it is a copy of the training
    settings rather than of the trained adapter.

    ## Example
    `"inference_mode": false`.

    ## What to do
    Save the adapter with `model.save_pretrained(…)`, or set it to true.

    ## Source
    peft 0.21.2, peft_model.py `save_pretrained`.
    """
    if peft_config(subject).get("inference_mode") is False:
        yield Hit(in_file(PEFT_FILE, "inference_mode"), "false; PEFT saves adapters with true")


@rule("LF114", Severity.INFO, since="0.1.0")
def newer_writer(subject: Subject) -> Iterator[Hit]:
    """The adapter was written by a newer PEFT than this version of loraformat supports.

    ## Why it matters
    Usually it is harmless. But settings that the newer PEFT added may change what the tensors mean, and loraformat
    would not notice.

    ## Example
    `"peft_version": "0.99.0"`.

    ## What to do
    Use a newer loraformat, if there is one.

    ## Source
    peft pull request 2782, which writes `peft_version`.
    """
    version = peft_config(subject).get("peft_version")
    found = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    if found and (int(found[1]), int(found[2])) > NEWEST_PEFT:
        yield Hit(
            in_file(PEFT_FILE, "peft_version"),
            f"{version} is newer than {'.'.join(map(str, NEWEST_PEFT))}, the latest known version",
        )


@rule("LF115", Severity.WARNING, since="0.1.0")
def quantized_base_name(subject: Subject) -> Iterator[Hit]:
    """The config or the card names a quantized copy of a model as the base.

    ## Why it matters
    Whoever loads the adapter by this name gets the quantized copy, and servers compare architectures with it. The
    adapter was trained on the dequantized values. Merged into those it gives the model that was trained; merged into
    the original 16-bit model it gives a different one. With AWQ, never merge into the 16-bit model: AWQ rescales
    channels before it quantizes, so the update does not fit weights without these scales.

    ## Example
    `"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"`.

    ## What to do
    For the model that was trained, use `merge --dequantize` with the quantized base or, for bitsandbytes, `merge
    --as-trained nf4` with the 16-bit model. To use the adapter with the full-precision model, name that one:
    `"meta-llama/Meta-Llama-3-8B"`. docs/quantized.md has measurements.

    ## Source
    Dettmers et al. 2023, arXiv 2305.14314; Lin et al. 2023, arXiv 2306.00978 (AWQ); unsloth-zoo issue 810.
    """
    named = named_quantization(subject)
    if named is not None:
        where, name, method = named
        hint = _TRAINED_ON_AWQ if method.lower() == "awq" else _TRAINED_ON_CODES
        yield Hit(where, f'"{name}" is a quantized model ({method})', hint)


def named_quantization(subject: Subject) -> tuple[FindingLocation, str, str] | None:
    """(where, name, method) of a quantized base that the config or the card of a PEFT adapter names."""
    from loraformat.model.bundle import CARD
    from loraformat.rules.metadata.card import first_text, front_matter

    assert subject.adapter is not None
    if subject.format != "peft":
        return None
    name, where = subject.adapter.config.base_model or "", config_at(subject, "base_model_name_or_path")
    if not name:
        name, where = first_text((front_matter(subject.bundle) or {}).get("base_model")), in_file(CARD, "base_model")
    found = _QUANTISED.search(name)
    return None if found is None else (where, name, found[1])


@rule("LF116", Severity.WARNING, since="0.1.0")
def saved_and_targeted(subject: Subject) -> Iterator[Hit]:
    """A module is both adapted with LoRA and saved as a whole.

    ## Why it matters
    PEFT replaces the module by a copy, and the version decides whether the LoRA layer is inside it. One of the two has
    no effect.

    ## Example
    `"target_modules": ["q_proj", "lm_head"]` with `"modules_to_save": ["lm_head"]`.

    ## What to do
    Keep the module in only one of the two lists.

    ## Source
    peft 0.21.2, tuners/tuners_utils.py `inject_adapter`, utils/other.py `ModulesToSaveWrapper`.
    """
    assert subject.adapter is not None
    targets, saved = subject.adapter.config.targets, peft_config(subject).get("modules_to_save")
    if isinstance(targets, tuple) and isinstance(saved, list):
        for name in sorted({str(name) for name in saved} & set(targets)):
            yield Hit(in_file(PEFT_FILE, "modules_to_save"), f'"{name}" is also in target_modules')


def _is_place(name: str) -> bool:
    return (
        name.startswith(("/", "./", "../", "~", "\\")) or "://" in name or re.match(r"[A-Za-z]:[\\/]", name) is not None
    )


def _matcher(pattern: str, budget: Budget) -> Matcher:
    from loraformat.model.patterns.matching import Matcher

    return Matcher(pattern, budget)
