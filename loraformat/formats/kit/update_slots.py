"""The updates of one weight in the only order that files can express: replace, set rows, add low-rank, add dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Json
from loraformat.model.updates import Dense, LowRank, Replace, Rows, Update, kind_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """What happens to one weight, at most one update of each kind, in the order of the fields."""

    replace: Replace | None = None
    rows: Rows | None = None
    low_rank: LowRank | None = None
    dense: Dense | None = None

    def updates(self) -> tuple[Update, ...]:
        """The updates that are there, in order."""
        every = (self.replace, self.rows, self.low_rank, self.dense)
        return tuple(update for update in every if update is not None)


def slots_of(updates: tuple[Update, ...]) -> Slots | None:
    """The slots that give `updates` back, or None: another kind, two of a kind, another order, or a stack."""
    found = Slots(
        replace=_only(Replace, updates),
        rows=_only(Rows, updates),
        low_rank=_only(LowRank, updates),
        dense=_only(Dense, updates),
    )
    is_stack = found.low_rank is not None and found.low_rank.is_stack
    return found if found.updates() == updates and not is_stack else None


def faults_of(adapter: Adapter, judge: Callable[[str, Slots], str | None]) -> Iterator[tuple[str, str]]:
    """(weight, fault) of every weight that has no slots, and of every one in whose slots `judge` finds a fault."""
    for base_weight, updates in adapter.updates.items():
        slots = slots_of(updates)
        fault = _sequence_fault(updates) if slots is None else judge(base_weight, slots)
        if fault:
            yield base_weight, fault


def low_ranks_of(adapter: Adapter) -> dict[str, LowRank]:
    """Base weight → its low-rank update, the last where there are several."""
    return {
        weight: update for weight, chain in adapter.updates.items() for update in chain if isinstance(update, LowRank)
    }


def _sequence_fault(updates: tuple[Update, ...]) -> str:
    """Why `updates` have no slots: a kind that has none, or their number and order."""
    foreign = next((each for each in updates if not isinstance(each, (Replace, Rows, LowRank, Dense))), None)
    return "this sequence of updates" if foreign is None else f"an update of the kind {kind_of(foreign).name}"


def _only(kind: type[T], updates: tuple[Update, ...]) -> T | None:
    return next((update for update in updates if isinstance(update, kind)), None)


def all_slots(adapter: Adapter) -> Iterator[tuple[str, Slots]]:
    """Every weight with its slots. Raises AssertionError where there are none: `losses` reports them before."""
    for base_weight, updates in adapter.updates.items():
        slots = slots_of(updates)
        assert slots is not None
        yield base_weight, slots


def vocabulary_of(updates: Mapping[str, tuple[Update, ...]]) -> int | None:
    """Rows of the replaced embedding tables, where there are any and all agree."""
    tables = [
        update.value.shape[0]
        for several in updates.values()
        for update in several
        if isinstance(update, Replace) and update.follows_tie and len(update.value.shape) == 2
    ]
    return tables[0] if len(set(tables)) == 1 and tables[0] else None


def most_common(values: Iterable[T], default: T) -> T:
    """The value that occurs most often, the first of several; `default` where there are none."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


_STATED_IN_THE_HUB = frozenset(
    [
        *("alpha", "alpha_exceptions", "alpha_pattern", "base_model", "base_model_name_or_path", "base_vocab_size"),
        *("bias", "difference_scale", "dtype", "fan_in_fan_out", "format_version", "lora_alpha", "lora_bias"),
        *("method", "modules_to_save", "peft_type", "r", "rank", "rank_exceptions", "rank_pattern", "revision"),
        *("rows", "scaling", "target_modules", "task", "task_type", "tied", "trainable_token_indices", "use_dora"),
        *("use_rslora", "vocab_size"),
    ]
)


def is_stated(name: str) -> bool:
    """Whether a field of a source config only says what the hub holds; `peft_type` says more, where it came from."""
    return name in _STATED_IN_THE_HUB and name != "peft_type"


def unstated_fields(raw: Mapping[str, Json]) -> list[str]:
    """Fields of a source config that say something which the hub does not hold; empty values say nothing."""
    return sorted(name for name, value in raw.items() if name not in _STATED_IN_THE_HUB and not _is_empty(value))


def unsaid(config: AdapterConfig, *said: str, container: str) -> list[str]:
    """What the hub knows about the base and a format has no place for, by name.

    Args:
        said: what this format has a place for.
        container: of the weights; safetensors and GGUF have room for the base and its fingerprint.
    """
    if container in ("safetensors", "gguf") and config.base_fingerprint is not None:
        said = (*said, "base_model", "base_revision", "base_fingerprint")
    facts = ("base_model", "base_fingerprint", "base_revision", "base_vocab_size", "task", "tied")
    return [fact for fact in facts if fact not in said and getattr(config, fact) is not None]


def _is_empty(value: Json) -> bool:
    return value is None or value is False or value in ("", 0, [], {})


def stated_alphas(raw: Mapping[str, Json]) -> list[float]:
    """Alphas that a source config states, under any format's name for them, the general one first."""
    values = [raw.get("alpha"), raw.get("lora_alpha")]
    for name in ("alpha_exceptions", "alpha_pattern"):
        exceptions = raw.get(name)
        values += exceptions.values() if isinstance(exceptions, dict) else []
    return [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]


def stated_rank(raw: Mapping[str, Json]) -> int:
    """The rank that a source config states, or 1."""
    stated = [raw.get("rank"), raw.get("r")]
    return next((value for value in stated if isinstance(value, int) and not isinstance(value, bool)), 1)
