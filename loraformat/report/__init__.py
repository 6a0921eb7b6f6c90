"""Reports and their renderers. A renderer knows only `Report`, not the verb that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from loraformat.diagnostics import Severity
from loraformat.report.base import Report
from loraformat.report.json import render as render_json
from loraformat.report.json import render_lines as render_json_lines
from loraformat.report.json import render_list as render_json_list

if TYPE_CHECKING:
    from loraformat.report.ci.sarif import Described

__all__ = ["FORMS", "RENDERERS", "Renderer", "Report", "page", "render", "render_all", "terminal", "words"]


class Renderer(Protocol):
    """A report as text that ends with a newline."""

    def __call__(self, report: Report, *, width: int | None = None, color: bool = False) -> str:
        """The report as text.

        Args:
            width: columns of the terminal; None for a pipe or file, where nothing is cut.
            color: whether ANSI colors are wanted.
        """


def render_text(report: Report, *, width: int | None = None, color: bool = False) -> str:
    """See loraformat.report.terminal.text, which is not needed where JSON is asked for."""
    from loraformat.report.terminal.text import render as render_page

    return render_page(report, width=width, color=color)


RENDERERS: Mapping[str, Renderer] = {"text": render_text, "json": render_json}

# The forms of a list of reports, as `validate --format` has them.
FORMS = ("text", "concise", "json", "jsonl", "github", "gitlab", "junit", "sarif", "markdown")


def render(report: Report, format: str = "text", *, width: int | None = None, color: bool = False) -> str:  # noqa: A002
    """The report in one of RENDERERS; KeyError for a name that is none."""
    return RENDERERS[format](report, width=width, color=color)


def render_all(
    reports: Sequence[Report],
    form: str,
    *,
    fail_on: Severity | None = Severity.ERROR,
    pages: Mapping[str, Described] | None = None,
    width: int | None = None,
    color: bool = False,
) -> str:
    """Several reports in one of FORMS, as text that ends with a newline; KeyError for a name that is none.

    Args:
        fail_on: least severity that is a failure, for forms that have a verdict of their own (junit).
        pages: code → what is known of it, for forms that describe rules (sarif).
        width, color: of a terminal, for text.
    """
    if form in RENDERERS:
        if form == "json" and len(reports) != 1:
            return render_json_list(reports)
        if form == "text" and len(reports) > 1 and all(report.job == "validate" for report in reports):
            from loraformat.report.terminal.text import render_validations

            return render_validations(reports, width=width, color=color)
        together = _together(reports, width, color) if form == "text" else ""
        return "".join(render(report, form, width=width, color=color) for report in reports) + together
    if form == "jsonl":
        return render_json_lines(reports)
    if form == "junit":
        from loraformat.report.ci import junit

        return junit.render(reports, fail_on)
    if form == "sarif":
        from loraformat.report.ci import sarif

        return sarif.render(reports, pages or {})
    from loraformat.report import markdown
    from loraformat.report.ci import concise, github, gitlab

    plain = {
        "concise": concise.render,
        "github": github.render,
        "gitlab": gitlab.render,
        "markdown": markdown.render,
    }
    return plain[form](reports)


def _together(reports: Sequence[Report], width: int | None, color: bool) -> str:
    """What several inspections say side by side, below all of them."""
    if len(reports) < 2 or any(report.job != "inspect" for report in reports):
        return ""
    from loraformat.report.terminal.text import render_together

    return render_together(reports, width=width, color=color)
