"""A report as JSON: ASCII, sorted, the same bytes for the same report. Described by schemas/report.schema.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum

from loraformat._version import __version__
from loraformat.diagnostics import Finding, json_text
from loraformat.report.base import Report

SCHEMA = "loraformat.report/1"
SCHEMA_OF_SEVERAL = "loraformat.reports/1"


def render(report: Report, *, width: int | None = None, color: bool = False) -> str:  # noqa: ARG001 - a Renderer
    """The report as JSON text that ends with a newline; neither width nor color has a meaning here."""
    return json_text(document(report), indent=2) + "\n"


def document(report: Report) -> dict[str, object]:
    """The envelope, as plain JSON values. NaN and infinity become null; keys that are numbers become text."""
    body = {field.name: _plain(getattr(report, field.name)) for field in fields(report)}
    return {"schema": SCHEMA, "tool": {"name": "loraformat", "version": __version__}, "ok": report.ok, **body}


def render_list(reports: Sequence[Report]) -> str:
    """Several reports as one JSON text; described by schemas/reports.schema.json."""
    envelope = {
        "schema": SCHEMA_OF_SEVERAL,
        "tool": {"name": "loraformat", "version": __version__},
        "ok": all(report.ok for report in reports),
        "reports": [document(report) for report in reports],
    }
    return json_text(envelope, indent=2) + "\n"


def render_lines(reports: Sequence[Report]) -> str:
    """A line of JSON for each finding, with the adapter that it is about."""
    lines = [{"adapter": report.subject, **found.record()} for report in reports for found in report.findings]
    return "".join(json_text(line) + "\n" for line in lines)


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Finding):
        return value.record()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {"unknown" if key is None else str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise TypeError(f"no JSON for {type(value).__name__}")
