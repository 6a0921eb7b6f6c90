"""A report for people. rich is imported here and nowhere else, and only when something is drawn.

What one verb alone says is imported with its result.
"""

from __future__ import annotations

import io
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TypeAlias

from loraformat.diagnostics import Finding, Severity, show
from loraformat.model.results.differences import DiffResult
from loraformat.model.results.estimates import EstimateResult
from loraformat.model.results.factor_changes import FactorResult
from loraformat.model.results.validation import Skipped, ValidateResult
from loraformat.model.results.verbs import (
    CardResult,
    Checked,
    ConvertResult,
    InspectResult,
    MergeResult,
    PlotResult,
    RenamedTensor,
    RoundTrip,
    UnmergeResult,
    VerifyResult,
)
from loraformat.report.base import Report
from loraformat.report.ci.concise import totals
from loraformat.report.lines import STYLES, Line, Page, Styled, columns_of, shorten
from loraformat.report.words import amount, counts, nbytes, number, plural

_FEW_FILES = 5
_FEW_CODES = 8
_WORST = 5
_NARROWEST_LABEL = 12
_NARROWEST_BAR, _WIDEST_BAR = 10, 40
_FULLY_KEPT = 0.9995
MOST_FINDINGS = 1000  # of one report: nobody reads more, and machines are given other forms

Progress: TypeAlias = Callable[[int, int], None]


def render(report: Report, *, width: int | None = None, color: bool = False) -> str:
    """The report as text that ends with a newline; findings stand before the closing line.

    Args:
        width: columns of the terminal; None for a pipe or file, where nothing is cut.
        color: whether ANSI colors are wanted.
    """
    page = Page(width)
    match report.data:
        case InspectResult():
            from loraformat.report.terminal.inspection import say_inspection

            say_inspection(page, report, report.data)
            _say_findings(page, report.findings)
        case DiffResult():
            from loraformat.report.terminal.difference import say_difference

            say_difference(page, report.data)
        case EstimateResult():
            from loraformat.report.terminal.estimation import say_estimate

            say_estimate(page, report.subject, report.data)
        case _:
            _say_findings(page, report.findings)
            _say_result(page, report)
    return _drawn(page.lines, color=color)


def _say_result(page: Page, report: Report) -> None:
    """What follows the findings."""
    match report.data:
        case ValidateResult():
            _say_validation(page, report, report.data)
        case ConvertResult():
            _say_conversion(page, report, report.data)
        case FactorResult():
            from loraformat.report.terminal.factor_changes import say_factors

            say_factors(page, report, report.data, _places(report))
        case MergeResult():
            _say_merge(page, report, report.data)
        case UnmergeResult():
            from loraformat.report.terminal.unmerging import say_unmerging

            say_unmerging(page, report.data, _places(report))
        case VerifyResult():
            _say_verification(page, report, report.data)
        case PlotResult():
            _say_plot(page, report, report.data)
        case CardResult():
            page.say(Styled("wrote  ", "dim"), Styled(", ".join(report.written), "bold"))
        case _:
            page.say(Styled(report.subject, "bold"), f": {counts(report.findings) or 'no findings'}")


def render_together(reports: Sequence[Report], *, width: int | None = None, color: bool = False) -> str:
    """What `inspect` says of several adapters together; "" for other jobs."""
    page = Page(width)
    page.say("")
    if all(isinstance(report.data, InspectResult) for report in reports):
        from loraformat.report.terminal.inspection import say_together

        say_together(page, reports)
    return _drawn(page.lines, color=color)


def render_validations(reports: Sequence[Report], *, width: int | None = None, color: bool = False) -> str:
    """Several validations: each adapter by name and what was found in it; at the end what was not checked in most."""
    page = Page(width)
    shared = Counter(report.skipped for report in reports).most_common(1)[0][0]
    for report in reports:
        if report.findings:
            page.say(Styled(report.subject, "bold"))
        _say_findings(page, report.findings)
        if isinstance(report.data, ValidateResult):
            _say_validation(page, report, report.data, but=shared)
        else:
            page.say(Styled(report.subject, "bold"), f": {counts(report.findings)}")
        page.say("")
    _say_skipped(page, shared)
    page.say(totals(reports))
    return _drawn(page.lines, color=color)


def render_findings(findings: Sequence[Finding], *, color: bool = False) -> str:
    """Findings alone, a line or two each; "" for none."""
    page = Page()
    _say_findings(page, findings)
    return _drawn(page.lines, color=color)


@contextmanager
def progress(total_label: str) -> Iterator[Progress]:
    """A bar on stderr with bytes, rate and time left; silent where stderr is no terminal.

    Yields: a function of (bytes done, bytes in all).
    """
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    label = shorten(show(total_label), max(_NARROWEST_LABEL, console.width // 3))
    # As rich draws them: "123.4/567.8 GB", "0:12:34", "123.4 MB/s", each with a space before it.
    spare = console.width - columns_of(label) - 1 - _NARROWEST_BAR
    figures = []
    for figure, columns in ((DownloadColumn(), 15), (TimeRemainingColumn(), 8), (TransferSpeedColumn(), 11)):
        if columns > spare:
            break
        spare -= columns
        figures.append(figure)
    bar = BarColumn(bar_width=min(_WIDEST_BAR, _NARROWEST_BAR + max(0, spare)))
    bars = Bars(TextColumn("{task.description}", markup=False), bar, *figures, console=console, transient=True)
    task = bars.add_task(label, total=None)

    def advance(done: int, total: int) -> None:
        bars.start()  # not before: what is said on stderr until then would run into the bar
        bars.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bars.stop()


def _silent(done: int, total: int) -> None:
    del done, total


def _say_findings(page: Page, findings: Sequence[Finding]) -> None:
    """The findings; of a flood the most severe, in their order, and how many more there are."""
    shown = set(sorted(range(len(findings)), key=lambda at: findings[at].severity, reverse=True)[:MOST_FINDINGS])
    for at, finding in enumerate(findings):
        if at in shown:
            page.finding(finding)
    left_out = [finding for at, finding in enumerate(findings) if at not in shown]
    if left_out:
        page.say(Styled("not shown: ", "dim"), f"{counts(left_out)} more (--format json lists all of them)")


def _say_skipped(page: Page, skips: Sequence[Skipped]) -> None:
    by_reason: dict[str, list[Skipped]] = defaultdict(list)
    for skipped in skips:
        by_reason[skipped.reason].append(skipped)
    for reason, group in by_reason.items():
        codes = ", ".join(skipped.code for skipped in group) if len(group) <= _FEW_CODES else plural(len(group), "rule")
        page.say(Styled("not checked: ", "dim"), f"{codes} ({reason})")


def _say_validation(page: Page, report: Report, result: ValidateResult, *, but: Sequence[Skipped] = ()) -> None:
    """What ran, and what did not but for the rules that are named elsewhere."""
    _say_skipped(page, () if report.skipped == but else report.skipped)
    if result.base.startswith("hf://"):
        page.say(Styled("base: ", "dim"), result.base)
    if result.ignored:
        page.say(Styled("ignored: ", "dim"), plural(len(result.ignored), "finding"))
    verdict = counts(report.findings)
    style = STYLES[report.worst] if report.worst else "bold green"
    read_as = f" ({report.format})" if report.format else ""
    checked = plural(len(result.checked), "rule")
    page.say(Styled(report.subject, "bold"), f"{read_as}: ", Styled(verdict or "OK", style), f", {checked} checked")


def render_names(renamed: Sequence[RenamedTensor], idle: Sequence[str], *, color: bool = False) -> str:
    """What `--map` makes of the names of tensors, and the patterns that match none."""
    page = Page()
    _say_names(page, renamed, idle)
    return _drawn(page.lines, color=color)


def _say_names(page: Page, renamed: Sequence[RenamedTensor], idle: Sequence[str]) -> None:
    for each in renamed:
        page.say(Styled("renamed", "dim"), f" {each.before} → {each.after}")
    for pattern in idle:
        page.say(Styled("unused ", "dim"), f" --map {pattern}: no tensor name matches")


def _say_conversion(page: Page, report: Report, result: ConvertResult) -> None:
    if result.proposed:
        _say_proposal(page, result)
        return
    _say_names(page, result.renamed if result.is_dry_run else (), result.idle_maps)
    reason = f" ({report.reason})" if report.reason else ""
    page.say(Styled("read   ", "dim"), Styled(report.subject, "bold"), f" as {result.source}{reason}")
    wrote = f" as {result.target}: {plural(result.weights, 'weight')}, {plural(len(result.files), 'file')}"
    if result.is_dry_run:
        names = ", ".join(result.files)
        page.say(Styled("nothing written", "bold"), f" (dry run): {names}{wrote}")
        return
    page.say(Styled("wrote  ", "dim"), Styled(_places(report), "bold"), f"{wrote}, {nbytes(result.bytes_written)}")
    if result.roundtrip is not None:
        page.say(Styled("checked", "dim"), f" {_roundtrip(result.roundtrip)}")


def _say_proposal(page: Page, result: ConvertResult) -> None:
    """The options as a shell takes them, and what they leave open as comments."""
    import shlex

    for each in result.proposed:
        if each.after:
            page.say(f"--map {shlex.quote(each.before)} {shlex.quote(each.after)}")
    for each in result.proposed:
        if not each.after:
            fits = f"one of {', '.join(each.candidates)}"
            if len(each.candidates) == 1:
                fits = f"{each.candidates[0]}, though other names fit as well"
            if not each.candidates:
                fits = "nothing in the base has these shapes in the same layers"
            page.say(Styled(f"# {each.before}: {fits}", "dim"))


def _roundtrip(found: RoundTrip) -> str:
    counted = plural(found.weights, "weight")
    if found.exact == found.weights:
        return f"{counted} read back, all bit-identical"
    bound = f"values rounded by up to {found.roundoff:.1e}" if found.roundoff else "values not rounded, sums in float64"
    worst = f"the others within {found.worst:.0%} of the bound ({bound})"
    return f"{counted} read back, {found.exact} bit-identical, {worst}"


def _say_verification(page: Page, report: Report, data: VerifyResult) -> None:
    missed = data.bytes_total - data.bytes_read
    verdict = Styled(
        counts(report.findings) or ("no differences in what was compared" if missed else "OK"),
        STYLES[Severity.ERROR] if not report.ok else "bold" if missed else "bold green",
    )
    compared = f"{plural(data.files, 'file')}, {plural(data.weights, 'computed weight')}"
    of_base = "" if data.tensors_of_base is None else f", {plural(data.tensors_of_base, 'copied tensor')} with the base"
    page.say(
        *(Styled(report.subject, "bold"), ": ", verdict),
        f", {compared}{of_base}: {nbytes(data.bytes_read)} of {nbytes(data.bytes_total)} compared",
    )
    if missed and not report.ok:
        page.say(f"not compared: {nbytes(missed)} ({missed} bytes)")
    elif missed:
        text = f"not compared: {nbytes(missed)} ({missed} bytes), copied from the base and without digests"
        page.say(text if data.tensors_of_base is not None else f"{text} (--base BASE compares them)")


def _say_merge(page: Page, report: Report, result: MergeResult) -> None:
    page.say(Styled("base    ", "dim"), Styled(result.base, "bold"))
    for adapter in result.adapters:
        page.say(
            Styled("adapter ", "dim"),
            Styled(adapter.uri, "bold"),
            f" ({adapter.format}): {adapter.applied} of {adapter.modules} modules"
            + ("" if adapter.strength == 1 else f", strength {adapter.strength:g}"),
        )
    if result.share is not None:
        from loraformat.report.terminal.unmerging import say_share

        say_share(page, result.share)
        return
    if result.as_trained:
        base_change = result.base_change
        change = "" if base_change is None else f"; the quantization error is {base_change:.3g} of the update"
        text = f"{result.as_trained}: linear layers quantized and dequantized{change}"
        page.say(Styled("trained ", "dim"), text)
    elif result.tensors_dequantized:
        text = f"{plural(result.tensors_dequantized, 'quantized weight')} dequantized"
        page.say(
            Styled("dense   ", "dim"), text if result.adapters else f"{text}, {amount(result.tensors_copied)} copied"
        )
    if result.recoded:
        error = "" if result.code_error is None else f"; ‖W' - (W + Δ)‖/‖Δ‖ = {result.code_error:.3g}"
        page.say(Styled("codes   ", "dim"), f"{plural(result.recoded, 'weight')} quantized again{error}")
    if result.adapters:
        _say_changes(page, result)
    if result.checked is not None:
        page.say(
            Styled("checked ", "dim"),
            _checked(result.checked, "computed" if result.tensors_cast or result.tensors_dequantized else "changed"),
        )
    size = f"{plural(len(result.files), 'file')}, {nbytes(result.bytes_written)}"
    if result.is_dry_run:
        page.say(Styled("nothing written", "bold"), f" (dry run): {size}")
    else:
        page.say(Styled("wrote   ", "dim"), Styled(_places(report), "bold"), f": {size}")


def _say_changes(page: Page, result: MergeResult) -> None:
    decoded = result.tensors_dequantized if result.as_trained else 0
    counts = ((decoded, "quantized and dequantized"), (result.tensors_cast, "cast"))
    others = "".join(f", {amount(count)} only {how}" for count, how in counts if count)
    page.say(
        Styled("merge   " if result.is_dry_run else "merged  ", "dim"),
        f"{plural(result.tensors_touched, 'tensor')} changed ({amount(result.parameters_touched)} parameters), "
        f"{amount(result.tensors_copied)} copied{others}",
    )
    _say_retention(page, result)


def _say_retention(page: Page, result: MergeResult) -> None:
    """How much of the update survived rounding, in all and for the weights where least did."""
    if result.retained is None:
        return
    page.say(Styled("kept    ", "dim"), f"{result.retained:.2%} of the update after rounding")
    worst = sorted(result.retention, key=lambda one: (one.share is None, one.share, one.weight))[:_WORST]
    if result.retained >= _FULLY_KEPT and all(one.share is None or one.share >= _FULLY_KEPT for one in worst):
        return
    rows = [[one.weight, _percent(one.share), _percent(one.unchanged), number(one.largest)] for one in worst]
    page.table(["least kept", "kept", "unchanged", "largest"], rows)


def _checked(found: Checked, how: str) -> str:
    """What was compared before the output was moved into place, and what could not be.

    Args: how: what the tensors are that are not copies: changed, or computed, where some were only cast.
    """
    copies = "1 copy" if found.copied == 1 else f"{amount(found.copied)} copies"
    told = (
        f"{amount(found.compared)} of {plural(found.changed, f'{how} tensor')} against an independent computation, "
        f"{amount(found.copies_compared)} of {copies} against the base"
    )
    unknown = found.changed - found.followed
    told += f"; for {amount(unknown)} it cannot tell where the updates belong" if unknown else ""
    return told + (
        f"; {plural(found.unscaled, 'scale')} taken as read: the format defines no formula" if found.unscaled else ""
    )


def _say_plot(page: Page, report: Report, result: PlotResult) -> None:
    steps = f" (steps {result.steps[0]:,} to {result.steps[-1]:,})" if result.steps else ""
    page.say(Styled("read   ", "dim"), f"{plural(len(result.adapters), 'adapter')}{steps}")
    for skipped in report.skipped:
        page.say(Styled("not measured against the base: ", "bold"), skipped.reason)
    alone = ", self-contained" if result.form == "html" else ""
    page.say(Styled("wrote  ", "dim"), Styled(", ".join(report.written), "bold"), f": {nbytes(result.nbytes)}{alone}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _places(report: Report) -> str:
    """The folder that was written and its files; only the folder where they are many."""
    folders = {os.path.dirname(path) for path in report.written}
    if len(folders) != 1:
        common = _common(report.written) if len(report.written) > _FEW_FILES else ""
        return common if common not in ("", os.sep) else ", ".join(report.written) or "nothing"
    names = [os.path.basename(path) for path in report.written]
    return folders.pop() + (f" ({', '.join(names)})" if len(names) <= _FEW_FILES else "")


def _common(paths: Sequence[str]) -> str:
    """The folder above all; "" where there is none."""
    if "://" not in paths[0]:
        return os.path.commonpath(paths)
    split = [path.split("/") for path in paths]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))]
    return "/".join(shared) if len(shared) > 3 else ""


def _drawn(lines: Sequence[Line], *, color: bool) -> str:
    """The lines as one string; rich turns styles into ANSI codes and is never asked to wrap or to read markup."""
    if not color:
        return "".join("".join(piece.text for piece in line) + "\n" for line in lines)
    from rich.console import Console
    from rich.text import Text

    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system="standard",
        width=100_000,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    with console.capture() as capture:
        for line in lines:
            text = Text.assemble(*((piece.text, piece.style) for piece in line), overflow="ignore", no_wrap=True)
            console.print(text, soft_wrap=True)
    return capture.get()
