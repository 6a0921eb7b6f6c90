"""Whether several adapters may be added: of one base, with one vocabulary, without contradicting tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from loraformat.diagnostics import Finding, FindingLocation, show
from loraformat.errors import AdapterRefused, UnsupportedUpdate
from loraformat.formats.kit.losses import other_base_name
from loraformat.jobs.algebra.sources import OpenedSource, values_of
from loraformat.model.adapter import AdapterConfig, Pipeline
from loraformat.model.tensors import has_equal_values
from loraformat.model.updates import Replace, Rows

_TOKENIZER = "tokenizer.json"
_SAME_NAMES = "convert both to one format first, with the same --base or without one"


def require_one_base(sources: Sequence[OpenedSource], *, force: bool) -> tuple[Finding, ...]:
    """What is odd about the bases and vocabularies, where it does not forbid to add the adapters.

    Raises: AdapterRefused: the fingerprints are of different bases, or the vocabularies differ; not with `force`.
    """
    findings: list[Finding] = []
    for one, other in combinations(sources, 2):
        first, second = one.adapter.config, other.adapter.config
        if not force:
            reason = _contradiction(one, other)
            if reason:
                raise AdapterRefused(reason, where=other.opened.uri, hint="use --force to combine them anyway")
        has_prints = first.base_fingerprint is not None and second.base_fingerprint is not None
        if not has_prints and first.base_model and second.base_model and first.base_model != second.base_model:
            findings.append(other_base_name("", first.base_model, second.base_model))
    return tuple(dict.fromkeys(findings))


def _contradiction(one: OpenedSource, other: OpenedSource) -> str:
    first, second = one.adapter.config, other.adapter.config
    uri = show(one.opened.uri, 120)
    prints = first.base_fingerprint, second.base_fingerprint
    if None not in prints and prints[0] != prints[1]:
        return f"it was trained on another base than {uri}: their fingerprints differ"
    sizes = first.vocab_size, second.vocab_size
    if None not in sizes and sizes[0] != sizes[1]:
        return f"its vocabulary has {sizes[1]} tokens, but that of {uri} has {sizes[0]}"
    files = one.adapter.tokenizer.get(_TOKENIZER), other.adapter.tokenizer.get(_TOKENIZER)
    if files[0] is not None and files[1] is not None and files[0].read() != files[1].read():
        return f"its {_TOKENIZER} differs from that of {uri}: the vocabularies differ"
    return ""


def saved_values(sources: Sequence[OpenedSource]) -> dict[str, tuple[Replace | Rows, ...]]:
    """What sets values in any of the adapters: equal in all adapters that have it, or taken from the only one.

    Raises: UnsupportedUpdate (LF013): two adapters set a weight to different values, or one whose weight is not 1.
    """
    found: dict[str, tuple[OpenedSource, tuple[Replace | Rows, ...]]] = {}
    for source in sources:
        for weight, chain in source.adapter.updates.items():
            values = values_of(chain)
            if not values:
                continue
            place = FindingLocation(subject=source.opened.uri, tensor=weight)
            before = found.setdefault(weight, (source, values))
            if before[0] is source:
                continue
            if not _are_equal(before[1], values):
                raise UnsupportedUpdate(
                    f"the weight is replaced (modules_to_save, trained rows) by other values than in "
                    f"{show(before[0].opened.uri, 120)}, and replaced tables cannot be added",
                    where=place,
                    hint=f"drop one of them with pick --drop {weight}",
                )
    for weight, (source, _) in found.items():
        owners = [each for each in sources if values_of(each.adapter.updates.get(weight, ()))]
        if len(owners) == 1 and source.weight != 1:
            raise UnsupportedUpdate(
                f"the weight is replaced (modules_to_save, trained rows), and {source.weight:g} of it depends on the "
                "base",
                where=FindingLocation(subject=source.opened.uri, tensor=weight),
                hint=f"drop it with pick --drop {weight}, or use the adapter with weight 1",
            )
    return {weight: values for weight, (_, values) in found.items()}


def _are_equal(one: tuple[Replace | Rows, ...], other: tuple[Replace | Rows, ...]) -> bool:
    if len(one) != len(other):
        return False
    return all(_is_equal(first, second) for first, second in zip(one, other, strict=True))


def _is_equal(one: Replace | Rows, other: Replace | Rows) -> bool:
    if isinstance(one, Replace) and isinstance(other, Replace):
        return one.follows_tie == other.follows_tie and has_equal_values(one.value, other.value)
    if isinstance(one, Rows) and isinstance(other, Rows):
        is_alike = one.indices == other.indices and one.follows_tie == other.follows_tie
        return is_alike and has_equal_values(one.values, other.values)
    return False


def common_config(sources: Sequence[OpenedSource]) -> AdapterConfig:
    """What all that say anything say about the base and how it stores its weights.

    Raises: AdapterRefused: two adapters contradict each other about what changes the meaning of their updates.
    """
    configs = [source.adapter.config for source in sources]
    facts = dict(_agreed(configs, sources))
    prints = {config.base_fingerprint for config in configs}
    return AdapterConfig(
        base_model=next((config.base_model for config in configs if config.base_model), None),
        base_revision=_if_one(config.base_revision for config in configs),
        base_fingerprint=prints.pop() if len(prints) == 1 else None,
        task=_if_one(config.task for config in configs),
        pipeline=_common_pipeline(sources),
        **facts,
    )


def _common_pipeline(sources: Sequence[OpenedSource]) -> Pipeline | None:
    """The image or video model that all adapters can be for, with the components of any.

    Raises: AdapterRefused: there is none, or the names of one adapter are not those of another.
    """
    first, common = sources[0].adapter.config.pipeline, sources[0].adapter.config.pipeline
    for source in sources[1:]:
        found = source.adapter.config.pipeline
        if (found is None) is not (first is None):
            raise AdapterRefused(
                "it is for a single model, but another adapter is for a pipeline", where=source.opened.uri
            )
        if found is None or first is None or common is None:
            continue
        if (found.bare, found.prefix, found.is_original) != (first.bare, first.prefix, first.is_original):
            raise AdapterRefused("its weights follow another naming scheme", where=source.opened.uri, hint=_SAME_NAMES)
        families = tuple(family for family in common.families if family in found.families)
        if common.families and found.families and not families:
            text = f"it is for {found.family}, but another adapter is for {common.family}"
            raise AdapterRefused(text, where=source.opened.uri)
        components = tuple(sorted({*common.components, *found.components}))
        common = replace(common, families=families or common.families or found.families, components=components)
    return common


_BINDING = (
    *("vocab_size", "base_vocab_size", "tied", "fan_in_fan_out", "transposed", "transposes_square_experts", "layers"),
)


def _agreed(configs: Sequence[AdapterConfig], sources: Sequence[OpenedSource]) -> Iterator[tuple[str, Any]]:
    for name in _BINDING:
        values = [getattr(config, name) for config in configs]
        stated = [value for value in values if value is not None]
        at = next((number for number, value in enumerate(values) if value not in (None, *stated[:1])), None)
        if at is not None and name not in ("vocab_size", "base_vocab_size"):
            raise AdapterRefused(
                f"it says {name} {show(values[at], 60)}, another adapter {show(stated[0], 60)}",
                where=sources[at].opened.uri,
            )
        yield name, stated[0] if stated else None


def _if_one(values: Iterator[str | None]) -> str | None:
    found = {value for value in values if value is not None}
    return found.pop() if len(found) == 1 else None
