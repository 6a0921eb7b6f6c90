"""Family 2, second part: the config against the tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from loraformat.budget import Budget
from loraformat.diagnostics import FindingLocation, Severity, counted
from loraformat.model.adapter import module_of
from loraformat.model.patterns.keys import OutOfSteps, PatternKeys
from loraformat.model.updates import Hadamard, Kronecker, LowRank, kind_of, rank_of, scale_of
from loraformat.rules.base import Hit, Subject, rule
from loraformat.rules.config import config_at, config_file
from loraformat.rules.shapes import is_exchanged, updates_of, weights_where

# The end of the name of a low-rank factor: `.lora_A.weight`, `.lora_embedding_B`, `.lora.A`, `.lora_a`.
_FACTOR = re.compile(r"\.lora(?:_|_embedding_|\.)[ab](?:\.|\Z)", re.IGNORECASE).search


@rule("LF204", Severity.ERROR, since="0.1.0", forgivable=True)
def rank_against_config(subject: Subject) -> Iterator[Hit]:
    """The rank of a tensor differs from the rank in the config.

    ## Why it matters
    The scale is alpha / rank: with the wrong rank the update is applied too strongly or too weakly. PEFT builds layers
    of the stated rank and then rejects the tensors, or drops them because of `ignore_mismatched_sizes`.

    ## Example
    `"r": 16` and an empty `rank_pattern`, where `up_proj.lora_A.weight` has shape (32, 4096).

    ## What to do
    Write `"rank_pattern": {"up_proj": 32}`, or set `r` to the rank of the tensors.

    ## Source
    peft 0.21.2, tuners/lora/layer.py `update_layer`; utils/save_and_load.py `set_peft_model_state_dict`.
    """
    assert subject.adapter is not None
    for group in subject.adapter.update_groups:
        rank, expected = rank_of(group.update), group.declared_rank
        if is_exchanged(group):
            continue  # LF220 says so
        if rank and expected is not None and rank != expected:
            message = f"expected rank {expected}, as {config_file(subject)} says, found {rank}"
            yield from (Hit(base_weight, message) for base_weight in group.weights)


@rule("LF206", Severity.ERROR, since="0.1.0")
def missing_scale(subject: Subject) -> Iterator[Hit]:
    """The adapter states neither alpha nor a scale, so the strength of its updates is unknown.

    ## Why it matters
    Common guesses differ widely: alpha = rank gives a factor of 1, alpha = 1 a factor of 1/rank, alpha = 16 something
    else again. A wrong factor looks like a weak or broken adapter, not like an error.

    ## Example
    `lora_config.json` with `"rank": 4` and no `"alpha"`.

    ## What to do
    Write the value that the training code used: `"alpha": 1.0` in the config, or `--alpha 1.0` on the command line.

    ## Source
    Hu et al. 2021, arXiv 2106.09685, section 4.1: the update is scaled by alpha / r.
    """
    assert subject.adapter is not None
    unknown = weights_where(subject.adapter, lambda update: kind_of(update).has_scale and scale_of(update) is None)
    if unknown:
        message = f"alpha is not stated, so the scale is unknown: {_some(unknown)}"
        yield Hit(config_at(subject), message, "pass it with --alpha A")


@rule("LF207", Severity.WARNING, since="0.1.0")
def target_without_tensors(subject: Subject) -> Iterator[Hit]:
    """The adapter has no tensors for a module in `target_modules`.

    ## Why it matters
    Part of the adapter may be missing. A loader creates the layer anyway, with random `lora_A` and zero `lora_B`, and
    at best warns about missing keys.

    ## Example
    `"target_modules": ["q_proj", "v_proj"]`, and no key in the file contains `v_proj`.

    ## What to do
    List only the trained modules: `"target_modules": ["q_proj"]`.

    ## Source
    peft 0.21.2, tuners/tuners_utils.py `check_target_module_exists`.
    """
    assert subject.adapter is not None
    targets = subject.adapter.config.targets
    if not isinstance(targets, tuple) or not subject.adapter.updates:
        return
    modules = {module_of(name) for name in subject.adapter.updates}
    last = {module.rpartition(".")[2] for module in modules}
    if last.issuperset(targets):
        return
    suffixes = {part for module in modules for part in _suffixes(module)}
    for target in dict.fromkeys(targets):
        if target not in suffixes and not _is_shorthand(target):
            yield Hit(config_at(subject, "target_modules"), f'no tensor adapts "{target}"')


@rule("LF208", Severity.WARNING, since="0.1.0")
def tensor_outside_targets(subject: Subject) -> Iterator[Hit]:
    """The adapter has updates for modules that its config does not target.

    ## Why it matters
    Loaders create layers only for the targets; PEFT ignores tensors of other modules as unexpected keys. The adapter
    then behaves differently than after training.

    ## Example
    `"target_modules": ["q_proj"]` where the file also has `model.layers.0.self_attn.v_proj.lora_A.weight`.

    ## What to do
    List all of them: `"target_modules": ["q_proj", "v_proj"]`.

    ## Source
    peft 0.21.2, tuners/tuners_utils.py `check_target_module_exists`; utils/save_and_load.py.
    """
    assert subject.adapter is not None
    config = subject.adapter.config
    if config.targets is None:
        return
    parameters = config.raw.get("target_parameters")
    extra = frozenset(str(name) for name in parameters) if isinstance(parameters, list) else frozenset()
    targets = config.targets if isinstance(config.targets, str) else frozenset(config.targets)
    if not isinstance(targets, str) and any(_is_shorthand(target) for target in targets):
        return
    outside = [
        name
        for name, update in updates_of(subject.adapter)
        if isinstance(update, (LowRank, Hadamard, Kronecker))
        and not is_one_of(name, extra)
        and not is_one_of(name.removesuffix(".weight"), extra)
    ]
    if isinstance(targets, str):
        selected = selected_by(targets, map(module_of, outside), subject.budget, config_at(subject, "target_modules"))
        outside = [name for name in outside if module_of(name) not in selected]
    else:
        outside = [name for name in outside if not is_one_of(module_of(name), targets)]
    if outside:
        yield Hit(config_at(subject, "target_modules"), f"target_modules does not cover {_some(outside)}")


@rule("LF210", Severity.ERROR, since="0.1.0", forgivable=True)
def unclaimed_tensor(subject: Subject) -> Iterator[Hit]:
    """The adapter holds tensors that belong to no known update.

    ## Why it matters
    They were trained, and would be lost: every reader that skips unknown tensors makes a different model of the same
    file.

    ## Example
    `base_model.model.model.layers.0.self_attn.q_proj.lora_mystery.weight`.

    ## What to do
    Give whole weights, such as new embeddings, their names from the base, and pass `--base`. Remove tensors that do not
    belong to the adapter, or name its format with `--from`. `--force` continues without them.

    ## Source
    peft 0.21.2, utils/save_and_load.py `set_peft_model_state_dict` returns such keys as `unexpected_keys`.
    """
    assert subject.adapter is not None
    unpaired = {note.location.tensor for note in subject.adapter.notes if note.code == "LF201"}
    unclaimed = [name for name in subject.adapter.unclaimed if not _is_half(name, unpaired)]
    if unclaimed:
        message = f"not part of any update: {_some(unclaimed, noun='tensor')}; that training would be lost"
        it = "it" if len(unclaimed) == 1 else "them"
        yield Hit("", message, f"rename {it} to match the base and pass --base, or remove {it}")


@rule("LF211", Severity.WARNING, since="0.1.0")
def pattern_without_match(subject: Subject) -> Iterator[Hit]:
    """A key of `rank_pattern` or `alpha_pattern` matches none of the adapter's modules.

    ## Why it matters
    Some modules were meant to differ. PEFT ignores a key that matches nothing, so they load with the default rank or
    alpha, without a warning.

    ## Example
    `"rank_pattern": {"layers.0.attn.q_proj": 4}` where the module is `model.layers.0.self_attn.q_proj`.

    ## What to do
    Write `"rank_pattern": {"layers.0.self_attn.q_proj": 4}`: a key must match the end of the module path, starting
    after a dot.

    ## Source
    peft 0.21.2, utils/other.py `get_pattern_key`.
    """
    assert subject.adapter is not None
    modules = dict.fromkeys(module_of(name) for name in subject.adapter.updates)
    for field, patterns in _patterns(subject):
        keys = PatternKeys(list(patterns), subject.budget)
        try:
            matched = keys.matched_by(modules).union(keys.unread)  # LF216 says what is not evaluated
        except OutOfSteps:
            subject.budget.leave_out(config_at(subject, field), _too_many(len(patterns), len(modules)))
            continue
        for key in patterns:
            if key not in matched:
                yield Hit(config_at(subject, field, key), "matches no module")


@rule("LF215", Severity.WARNING, since="0.1.0")
def unusual_scale(subject: Subject) -> Iterator[Hit]:
    """The scale of an update is zero, negative or not finite.

    ## Why it matters
    With zero the update does nothing; with a negative factor it does the opposite of what was learned. Both are legal
    but hardly ever intended. A factor that is not finite destroys the weight.

    ## Example
    `"lora_alpha": -16`.

    ## What to do
    Use a positive alpha. Keep a negative one only to subtract the adapter from the model on purpose.

    ## Source
    Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    assert subject.adapter is not None
    odd: dict[float, list[str]] = {}
    for group in subject.adapter.update_groups:
        scale = scale_of(group.update)
        if scale is not None and not (scale > 0 and math.isfinite(scale)):
            odd.setdefault(scale, []).extend(group.weights)
    for scale, names in odd.items():
        yield Hit(config_at(subject), f"expected a positive scale, found {scale:g} for {_some(sorted(names))}")


@rule("LF216", Severity.WARNING, since="0.1.0")
def pattern_not_evaluated(subject: Subject) -> Iterator[Hit]:
    r"""A regular expression of the config was not evaluated, or not for all modules, because it could take for ever.

    ## Why it matters
    loraformat does not know what the pattern selects, so targets, ranks and alphas that depend on it are not checked.
    Look-around, back references and flags have no matcher with a guaranteed running time. All other patterns of an
    adapter share a budget of steps; when it is used up, the message says how many modules were left out.

    ## Example
    `"target_modules": "(.*)\\1_proj"`.

    ## What to do
    Use a list of module names, or a pattern of literals, classes, groups, `|` and quantifiers: `".*\\.(q|v)_proj"`.

    ## Source
    Cox 2007, "Regular Expression Matching Can Be Simple And Fast".
    """
    assert subject.adapter is not None
    config = subject.adapter.config
    fields = [(name, list(patterns)) for name, patterns in _patterns(subject)]
    if isinstance(config.targets, str) and not _is_shorthand(config.targets):
        fields.insert(0, ("target_modules", [config.targets]))
    for field, patterns in fields:
        where = config_at(subject, field)
        unread = PatternKeys(patterns, subject.budget).unread
        if unread and subject.budget.left < 0:
            subject.budget.leave_out(
                where, f"{counted(len(unread), 'pattern', 'was')} skipped because matching would take too long"
            )
            continue
        for key in unread:
            yield Hit(where, f'pattern not evaluated: "{key}"')


def _patterns(subject: Subject) -> Iterator[tuple[str, Mapping[str, object]]]:
    """`rank_pattern` and `alpha_pattern`, where the config has them."""
    assert subject.adapter is not None
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = subject.adapter.config.raw.get(field)
        if isinstance(patterns, Mapping):
            yield field, patterns


def _too_many(keys: int, modules: int) -> str:
    return f"{keys} patterns were not compared with {modules} modules because that would take too long"


def selected_by(pattern: str, modules: Iterable[str], budget: Budget, where: FindingLocation) -> set[str]:
    """The modules that a regular expression of the config selects; also those that were not compared with it.

    The latter are counted in the budget's `left_out`, except where the pattern as a whole cannot be evaluated (LF216).
    """
    # The matcher is imported only where there is a pattern: most adapters have none.
    from loraformat.model.patterns.matching import Matcher

    every = set(modules)
    matcher = Matcher(pattern, budget)
    if _is_shorthand(pattern) or not matcher.is_linear:
        return every
    matches = {module: matcher.fullmatch(module) for module in sorted(every)}
    unknown = sum(found is None for found in matches.values())
    if unknown:
        budget.leave_out(
            where,
            f"the pattern was not compared with {unknown} of {counted(len(every), 'module')} because that would "
            "take too long",
        )
    return {module for module, found in matches.items() if found is not False}


def is_one_of(module: str, names: Collection[str]) -> bool:
    """Whether one of the names is the end of a module path, from a dot or the start on."""
    if not names:
        return False
    return module.rpartition(".")[2] in names or any(suffix in names for suffix in _suffixes(module))


def _is_shorthand(target: str) -> bool:
    # Source: peft 0.21.2, utils/constants.py INCLUDE_LINEAR_LAYERS_SHORTHAND.
    return target.lower() == "all-linear"


def _suffixes(module: str) -> Iterator[str]:
    parts = module.split(".")
    # Targets name the last few components of a path; more would only cost a hostile path's square.
    return (".".join(parts[start:]) for start in range(max(0, len(parts) - 40), len(parts)))


def _is_half(name: str, unpaired: Collection[str]) -> bool:
    """Whether a tensor is the one factor of an update whose other is missing, which LF201 reports."""
    factor = _FACTOR(name)
    if factor is None:
        return False
    parts = name[: factor.start()].removesuffix(".weight").split(".")
    modules = (".".join(parts[at:]) for at in range(len(parts)))  # without a prefix that its format puts before
    return any(module in unpaired or f"{module}.weight" in unpaired for module in modules)


def _some(names: list[str], noun: str = "weight") -> str:
    count = f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"
    return f"{count}, first {names[0]}" if len(names) > 1 else names[0]
