"""The report of the verb that wrote an adapter, read back from its JSON and compared with the adapter."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any, cast

from loraformat import schema, strict_json
from loraformat.diagnostics import in_file, show
from loraformat.errors import ConfigError, UsageError
from loraformat.model.results.factor_changes import FactorChange, FactorResult
from loraformat.model.results.plot_data import MadeRecord
from loraformat.model.results.weight_figures import WeightRecord
from loraformat.storage import open_store

_MOST_NBYTES = 32 << 20  # of some 50,000 weights
_HOW = "pass the JSON report of `resize`, `combine`, `extract` or another verb that writes adapters (--format json)"
_FROM_CHANGE = tuple(
    field.name for field in fields(MadeRecord) if field.name not in {each.name for each in fields(WeightRecord)}
)


def read_made_by(uri: str) -> tuple[str, FactorResult]:
    """(verb, what it did) of a report.

    Raises: StorageError: the file cannot be read. InvalidJson: it is not JSON. ConfigError: it is not a report, or of a
        verb that does not write adapters, or of a dry run.
    """
    store = open_store(uri)
    (name, size), *more = store.files().items() or [("", 0)]
    if more or not name:
        raise ConfigError("expected one JSON file, found a folder", where=uri, hint=_HOW)
    if size > _MOST_NBYTES:
        raise ConfigError(f"{size} bytes, at most {_MOST_NBYTES} are read as a report", where=uri, hint=_HOW)
    value = strict_json.parse(store.read(name), uri, limit=_MOST_NBYTES)
    if not isinstance(value, dict):
        raise ConfigError("expected a JSON object", where=uri, hint=_HOW)
    fault = next(schema.check("report", value), None)
    if fault is not None:
        raise ConfigError(f"not a report of loraformat: {fault[1]}", where=in_file(uri, *fault[0]), hint=_HOW)
    data = cast("dict[str, Any] | None", value["data"])
    if data is None or "rank_before" not in (data.get("weights") or [{"rank_before": 0}])[0] or "cosines" not in data:
        raise ConfigError(f"the report of `{value['job']}`, which did not write an adapter", where=uri, hint=_HOW)
    if data["is_dry_run"]:
        raise ConfigError("the report of a dry run, which wrote nothing", where=uri, hint=_HOW)
    return str(value["job"]), _result(data)


def _result(data: dict[str, Any]) -> FactorResult:
    """What the schema has checked, as it was before it became JSON."""
    unknown = {key: math.nan for key in ("norm", "error", "dropped") if data[key] is None}
    weights = tuple(
        FactorChange(**{**each, **{key: math.nan for key in ("norm", "error") if each[key] is None}})
        for each in data["weights"]
    )
    adapters = tuple((str(uri), float(weight)) for uri, weight in data["adapters"])
    cosines = tuple((int(first), int(second), cosine) for first, second, cosine in data["cosines"])
    lists = {key: tuple(data[key]) for key in ("kept", "left_out", "models", "files")}
    return FactorResult(**{**data, **unknown, **lists, "weights": weights, "adapters": adapters, "cosines": cosines})


def with_made(
    records: Sequence[WeightRecord], made: FactorResult, uri: str, where: str, fused: Collection[str] = ()
) -> tuple[MadeRecord, ...]:
    """The weights of an adapter with what the report says about each.

    Args:
        uri: of the report.
        where: the adapter.
        fused: weights that share factors in the file, whose ranks add up there.

    Raises: UsageError (LF021): the report is about another adapter: other weights or other ranks.
    """
    written = {each.weight: each for each in made.weights if each.rank}
    if len(written) < sum(each.rank > 0 for each in made.weights):
        raise ConfigError("two entries about one weight", where=uri, hint=_HOW)
    carried = set(made.kept)
    low_rank = {record.weight for record in records if record.rank is not None and record.weight not in carried}
    for names, text in (
        (written.keys() - {record.weight for record in records}, "which the adapter does not change"),
        (low_rank - written.keys(), "about which the report says nothing"),
    ):
        if names:
            raise _of_another(uri, where, f"{show(min(names))}, {text} ({len(names)} such weights)")
    for record in records:
        change = written.get(record.weight)
        differs = change is not None and record.rank not in (None, change.rank)
        if change is not None and differs and record.weight not in fused:
            text = f"{show(record.weight)}, of rank {change.rank} in the report and {record.rank} in the adapter"
            raise _of_another(uri, where, text)
    return tuple(_made(record, None if record.rank is None else written.get(record.weight)) for record in records)


def _of_another(uri: str, where: str, what: str) -> UsageError:
    text = f"the report {show(uri, 200)} is about another adapter: it differs at {what}"
    return UsageError(text, where=where, hint="pass the report of the command that wrote this adapter")


def _made(record: WeightRecord, change: FactorChange | None) -> MadeRecord:
    own = {field.name: getattr(record, field.name) for field in fields(WeightRecord)}
    figures = {} if change is None else {name: getattr(change, name) for name in _FROM_CHANGE}
    return MadeRecord(
        **own, **{name: value for name, value in figures.items() if value is None or math.isfinite(value)}
    )
