"""Reports and their renderers. A renderer knows `Report` and nothing of who made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from loraformat.report.base import Report
from loraformat.report.json import render as render_json
from loraformat.report.text import render as render_text

__all__ = ["RENDERERS", "Renderer", "Report", "render"]


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
