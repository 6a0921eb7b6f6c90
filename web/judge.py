"""The verbs as the page in the browser calls them: the command line on dropped files, its answer as JSON.

Python in WebAssembly runs this; it needs nothing beyond the standard library and the core of loraformat.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any

from loraformat.cli import main

VERBS = ("validate", "inspect", "formats")
# A page that shows more freezes the tab that it is in.
MOST_FINDINGS = 500
MOST_CHARACTERS = 200_000


def judge(verb: str, names: Sequence[str], folder: str, options: Mapping[str, str]) -> str:
    """What the command line says of files and folders.

    Args:
        verb: one of VERBS.
        names: what is judged, below `folder`.
        folder: the working directory meanwhile.
        options: long name of an option, without its dashes → value.

    Returns: JSON: `exit`, the exit code; `text`, what a terminal shows; `findings` with the `subject` of each;
        `left_out`, how many findings, and `cut`, how many characters are more than a page should hold.
    """
    assert verb in VERBS
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    before = os.getcwd()
    os.chdir(folder)
    try:
        code, text = _run([verb, *given, "--", *names])
        found = [] if verb == "formats" else _findings([verb, *given, "--format", "json", "--", *names])
    finally:
        os.chdir(before)
    return json.dumps(
        {
            "exit": code,
            "text": text[:MOST_CHARACTERS],
            "cut": max(0, len(text) - MOST_CHARACTERS),
            "findings": found[:MOST_FINDINGS],
            "left_out": max(0, len(found) - MOST_FINDINGS),
        }
    )


def about() -> str:
    """JSON: the `version`, and the `targets` of validate, a name and a title each."""
    from loraformat._version import __version__
    from loraformat.jobs.explain import known_targets

    return json.dumps({"version": __version__, "targets": known_targets()})


def _run(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of a command, what it says on stderr in its place among the rest."""
    said = io.StringIO()
    code: object = 0
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main(arguments, prog_name="loraformat")
        except SystemExit as left:
            code = left.code or 0
    return (code if isinstance(code, int) else 1), said.getvalue()


def _findings(arguments: list[str]) -> list[dict[str, Any]]:
    """The findings of all reports that a command prints as JSON, each with the subject of its report."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(io.StringIO()), suppress(SystemExit):
        main(arguments, prog_name="loraformat")
    answer = json.loads(said.getvalue() or "{}")
    reports = answer if isinstance(answer, list) else answer.get("reports", [answer])
    return [{**finding, "subject": report.get("subject", "")} for report in reports for finding in report["findings"]]
