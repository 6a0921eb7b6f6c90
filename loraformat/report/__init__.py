"""Reports and their renderers. A renderer knows `Report` and nothing of who made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from loraformat.report.base import Report
from loraformat.report.json import render as render_json
from loraformat.report.json import render_list
from loraformat.report.text import render as render_text
from loraformat.report.text import render_together

__all__ = ["RENDERERS", "Renderer", "Report", "render", "render_all"]


class Renderer(Protocol):
    """A report as text that ends with a newline."""

    def __call__(self, report: Report, *, width: int | None = None, color: bool = False) -> str:
        """The report as text.

        Args:
            width: columns of the terminal; None for a pipe or file, where nothing is cut.
            color: whether ANSI colours are wanted.
        """


RENDERERS: Mapping[str, Renderer] = {"text": render_text, "json": render_json}


def render(report: Report, format: str = "text", *, width: int | None = None, color: bool = False) -> str:  # noqa: A002
    """The report in one of RENDERERS; KeyError for a name that is none."""
    return RENDERERS[format](report, width=width, color=color)


def render_all(
    reports: Sequence[Report],
    format: str = "text",  # noqa: A002
    *,
    width: int | None = None,
    color: bool = False,
) -> str:
    """Several reports: one after the other, in JSON as a list. One report alone is rendered as itself."""
    if len(reports) > 1 and format == "json":
        return render_list(reports)
    texts = [render(report, format, width=width, color=color) for report in reports]
    if len(texts) == 1:
        return texts[0]
    return "\n".join([*texts, render_together(reports, width=width, color=color)])
