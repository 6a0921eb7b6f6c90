"""Names of weights in a transformers checkpoint and in the loaded model.

The rules stand in transformers_names.json, which tests/derive_names.py makes from transformers' own tables.

Source: transformers 5.23.0, conversion_mapping.py `get_model_conversion_mapping`; core_model_loading.py
`rename_source_key`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from loraformat.naming.tables import table
from loraformat.naming.ties import architecture_of

_TABLE = "transformers_names.json"
# Names of the oldest checkpoints, which transformers renames for every class.
_LEGACY = "legacy"


@dataclass(frozen=True, slots=True)
class Rule:
    """One step from the stored name to the name in memory.

    Attributes:
        pattern: with the groups g0, g1, … for the alternatives and e0, e1, … for the number of an expert in each.
        targets: what takes the place of the match; several where one stored tensor becomes several.
        operation: "rename", "experts" (stacked, several sources joined by rows), "join" (several sources joined by
            rows), "split" (cut into equal runs of rows), "transpose" (transposed), "other" (anything else).
        sources: how many alternatives there are.
        scope: prefixes that a name must have one of, the longest first; it is taken off for the match.
    """

    pattern: re.Pattern[str]
    targets: tuple[str, ...]
    operation: str
    sources: int
    scope: tuple[str, ...] = ("",)


@dataclass(frozen=True, slots=True)
class Spelled:
    """The name of a stored tensor in the loaded model.

    Attributes:
        names: one, or several where the stored tensor is cut.
        operation: see Rule.
        source: which of the tensors that are joined this one is.
        sources: how many are joined.
        expert: which slice of the stack it is.
    """

    names: tuple[str, ...]
    operation: str = "rename"
    source: int = 0
    sources: int = 1
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Spelling:
    """The rules of one model.

    Attributes:
        rules: in order: all renamings apply, then at most one of the others.
        prefix: the part that models with a head add to the names of the bare model (`base_model_prefix`), or "".
    """

    rules: tuple[Rule, ...]
    prefix: str = ""

    def in_memory(self, stored: str) -> Spelled:
        """What the loaded model calls the tensor `stored`. A name that is in memory's spelling already stays."""
        name = stored
        for rule in self.rules:
            if rule.operation == "rename":
                name = _applied(rule, name).names[0]
        for rule in self.rules:
            if rule.operation != "rename":
                found = _applied(rule, name)
                if found.operation != "rename":
                    return found
        return Spelled((name,))


def _applied(rule: Rule, name: str) -> Spelled:
    prefix = next((prefix for prefix in rule.scope if name.startswith(prefix)), None)
    if prefix is None:
        return Spelled((name,))
    rest = name[len(prefix) :]
    found = rule.pattern.search(rest)
    if found is None:
        return Spelled((name,))
    source = next(number for number in range(rule.sources) if found.group(f"g{number}") is not None)
    names = tuple(prefix + rest.replace(found.group(0), _filled(target, found, source), 1) for target in rule.targets)
    expert = found.groupdict().get(f"e{source}")
    return Spelled(names, rule.operation, source, rule.sources, None if expert is None else int(expert))


def _filled(target: str, found: re.Match[str], source: int) -> str:
    if r"\1" not in target:
        return target
    return target.replace(r"\1", found.group(found.re.groupindex[f"g{source}"] + 1))


def spelling_of(config: Mapping[str, object]) -> Spelling:
    """The rules for a checkpoint with this config.json; none where the model is not in the table.

    The class in `architectures` decides, since parts of a composed model have rules of their own; without it the
    `model_type` does, for the whole model and for its `text_config`.
    """
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    names = (architecture_of(config), config.get("model_type"), inner)
    return _spelling(*(name if isinstance(name, str) else "" for name in names))


@cache
def _spelling(architecture: str, model_type: str, text_type: str) -> Spelling:
    rules_of, models = table(_TABLE)["rules"], table(_TABLE)["models"]
    model = models.get(architecture, {})
    prefix = model.get("prefix", "")
    own = next(([[None, name]] for name in (architecture, model_type) if name in rules_of), [])
    parts = list(model.get("parts", own))
    known = {name for _, name in parts}
    if text_type in rules_of and text_type not in known and text_type not in model.get("covers", ()):
        parts.append([None, text_type])
    if any((architecture, model_type, text_type)):
        parts.append([None, _LEGACY])
    rules = [_rule(rule, scope, prefix) for scope, name in parts for rule in _entries(rules_of, name)]
    return Spelling(tuple(rules), prefix)


def _entries(rules: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The rules of a name; a name in their place is that of a model with the same rules."""
    found = rules.get(name, [])
    return list(rules[found] if isinstance(found, str) else found)


def _rule(entry: Mapping[str, Any], scope: str | None, prefix: str) -> Rule:
    """A rule of one part of a model: None for the model itself, else the part's path below `prefix`."""
    inner, outer = (f"{scope}." if scope else ""), (f"{prefix}." if prefix else "")
    return Rule(
        pattern=re.compile(entry["find"]),
        targets=tuple(entry["to"]),
        operation=entry.get("op", "rename"),
        sources=entry.get("sources", 1),
        scope=("",) if scope is None else tuple(dict.fromkeys((outer + inner, inner))),
    )
