"""Files and lines of findings, for reports that need them."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from urllib.parse import quote

from loraformat.diagnostics import Finding, show
from loraformat.model.results.validation import ValidateResult
from loraformat.report.base import Report


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A place in a file.

    Attributes:
        path: below the folder that the user was in, where the adapter was named so.
        line: from 1.
        name: of the weight or key that is meant; "" for the file as a whole.
    """

    path: str
    line: int
    name: str

    @property
    def uri(self) -> str:
        """The path as a URI reference."""
        return quote(self.path, safe="/")


def place_of(finding: Finding, report: Report) -> SourceLine:
    """The file that a finding is about: the one that it names, else the weights."""
    folder = report.subject.replace("\\", "/").rstrip("/") or "."
    weights = report.data.file if isinstance(report.data, ValidateResult) else ""
    file = finding.location.file or weights
    is_file = folder.endswith(f"/{file}") or folder == file
    path = posixpath.normpath(folder if is_file or not file else f"{folder}/{file}")
    return SourceLine(show(path), max(1, finding.location.line), show(finding.location.inside))
