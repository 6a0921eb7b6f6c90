"""diff: what differs between two adapters or two checkpoints, by how much, and at what rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from loraformat.containers import open_checkpoint
from loraformat.errors import ConfigError, MissingFile, UnknownFormat, UsageError
from loraformat.formats.kit.base import Hints
from loraformat.io import Opened, hints_of, open_adapter
from loraformat.jobs.inputs.subject import require_real
from loraformat.jobs.measure.diff_adapters import update_difference
from loraformat.jobs.measure.diff_checkpoints import tensor_differences
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.differences import DiffResult, FieldDifference, WeightDifference
from loraformat.report import Report
from loraformat.storage import Location, uri_of

_SHARED_FIELDS = ("base_model", "base_revision", "vocab_size", "fan_in_fan_out", "layers")
GROUPINGS = ("auto", "module", "layer", "none")


def diff(
    before: Location,
    after: Location,
    *,
    tolerance: float = 0.0,
    group: str = "auto",
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare two adapters or two checkpoints: config, names, values.

    >>> import loraformat
    >>> report = loraformat.diff("fixtures/good/peft/tiny-llama", "fixtures/good/peft/rslora")
    >>> report.data.has_equal_values
    False

    Args:
        before, after: folders or files, both adapters or both checkpoints.
        tolerance: weights are equal if ‖difference‖ / ‖first‖ is at most this.
        group: how text output groups the weights, one of GROUPINGS.
        alpha, assumptions: what the adapters do not state.
        jobs: threads that compare tensors of checkpoints; each holds one tensor in memory.
        progress: called with bytes of the first checkpoint (compared, in all).

    Raises:
        ConfigError (LF103): one is an adapter and the other a checkpoint.
        UnsupportedUpdate (LF013): an adapter holds complex numbers.
        StorageError, ContainerError, FormatError: one of them cannot be read.
    """
    if group not in GROUPINGS:
        raise UsageError(f"group: expected one of {', '.join(GROUPINGS)}, found {group!r}", where="diff")
    before, after = uri_of(before), uri_of(after)
    hints = hints_of(with_alpha(alpha, assumptions))
    first, second = (_opened(uri, hints) for uri in (before, after))
    if isinstance(first, Checkpoint) != isinstance(second, Checkpoint):
        kinds = ["a checkpoint" if isinstance(one, Checkpoint) else "an adapter" for one in (first, second)]
        raise ConfigError(
            f"{before} is {kinds[0]}, but {after} is {kinds[1]}",
            where="diff",
            hint="compare two adapters or two checkpoints",
        )
    if isinstance(first, Opened) and isinstance(second, Opened):
        for opened in (first, second):
            require_real(opened.adapter, opened.uri)
        result = _of_adapters(first, second, tolerance, group)
    else:
        assert isinstance(first, Checkpoint)
        assert isinstance(second, Checkpoint)
        result = _of_checkpoints(first, second, tolerance, group, jobs, progress)
    return Report(job="diff", subject=before, format=result.formats[0], data=result)


def _opened(uri: str, hints: Hints) -> Opened | Checkpoint:
    """The adapter or the checkpoint at a path.

    Raises: what opening it as an adapter raises, where it opens as a checkpoint neither.
    """
    try:
        return open_adapter(uri, hints=hints)
    except UnknownFormat as unknown:
        try:
            return open_checkpoint(uri)
        except MissingFile:
            raise unknown from None


def _of_adapters(first: Opened, second: Opened, tolerance: float, group: str) -> DiffResult:
    one, other = first.adapter.updates, second.adapter.updates
    both = sorted(one.keys() & other.keys())
    weights = tuple(
        difference for name in both for difference in update_difference(name, one[name], other[name], tolerance)
    )
    return _result(
        subject_kind="adapters",
        places=(first.uri, second.uri),
        formats=(first.format.NAME, second.format.NAME),
        configs=_configs(first, second),
        names=(one.keys(), other.keys()),
        weights=weights,
        group=group,
    )


def _configs(first: Opened, second: Opened) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """What both configs say: verbatim where the formats are the same, else in the words that all formats share."""
    configs = (first.adapter.config, second.adapter.config)
    if first.format.NAME == second.format.NAME:
        raw, other_raw = (
            config.raw
            if config.base_fingerprint is None
            else {**config.raw, "base_fingerprint": config.base_fingerprint}
            for config in configs
        )
        return raw, other_raw
    one, other = (
        {field: getattr(config, field) for field in _SHARED_FIELDS if getattr(config, field) is not None}
        for config in configs
    )
    return one, other


def _of_checkpoints(
    first: Checkpoint,
    second: Checkpoint,
    tolerance: float,
    group: str,
    jobs: int,
    progress: Callable[[int, int], None] | None,
) -> DiffResult:
    weights = tensor_differences(first, second, tolerance=tolerance, jobs=jobs, progress=progress)
    return _result(
        subject_kind="checkpoints",
        places=(first.uri, second.uri),
        formats=("", ""),
        configs=(first.config, second.config),
        names=(first.tensors.keys(), second.tensors.keys()),
        weights=weights,
        group=group,
    )


def _result(
    *,
    subject_kind: str,
    places: tuple[str, str],
    formats: tuple[str, str],
    configs: tuple[Mapping[str, object], Mapping[str, object]],
    names: tuple[Iterable[str], Iterable[str]],
    weights: tuple[WeightDifference, ...],
    group: str,
) -> DiffResult:
    one, other = (frozenset(each) for each in names)
    fields = tuple(_field_differences(*configs))
    compared = [weight for weight in weights if weight.distance is not None]
    before, after, distance = (
        math.hypot(*(figure or 0.0 for figure in figures))
        for figures in (
            [weight.norm for weight in compared],
            [weight.norm_after for weight in compared],
            [weight.distance for weight in compared],
        )
    )
    # ‖D‖² = ‖A‖² + ‖B‖² - 2⟨A, B⟩
    inner = math.fsum((w.cosine or 0.0) * (w.norm or 0.0) * (w.norm_after or 0.0) for w in compared)
    has_equal_values = one == other and all(weight.status == "equal" for weight in weights)
    return DiffResult(
        before=places[0],
        after=places[1],
        subject_kind=subject_kind,
        formats=formats,
        fields=fields,
        only_before=tuple(sorted(one - other)),
        only_after=tuple(sorted(other - one)),
        weights=weights,
        distance=distance if compared else None,
        relative=distance / before if before > 0 else None,
        cosine=max(-1.0, min(1.0, inner / (before * after))) if before > 0 and after > 0 else None,
        has_equal_values=has_equal_values,
        has_equal_metadata=not fields,
        is_equal=has_equal_values and not fields,
        grouping=group,
    )


def _field_differences(one: Mapping[str, object], other: Mapping[str, object]) -> Iterator[FieldDifference]:
    before, after = dict(_flat(one)), dict(_flat(other))
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) != after.get(field):
            yield FieldDifference(field=field, before=before.get(field, ""), after=after.get(field, ""))


def _flat(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path → JSON text of every leaf; lists are leaves."""
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value, sort_keys=True, default=list)
