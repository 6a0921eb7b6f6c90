"""Text reports of the verbs that make adapters from adapters or models."""

from __future__ import annotations

from loraformat.model.results.factor_changes import NOISE_MARGIN, FactorChange, FactorResult
from loraformat.report.base import Report
from loraformat.report.lines import Page, Styled
from loraformat.report.words import cut, nbytes, number, percent, plural, rank_change

_WORST = 8
_FEW_PAIRS = 3


def say_factors(page: Page, report: Report, result: FactorResult, written: str) -> None:
    """The sources, the ranks, the errors, the files.

    Args:
        written: where the output stands.
    """
    for uri, weight in result.adapters:
        page.say(Styled("adapter ", "dim"), Styled(uri, "bold"), "" if weight == 1 else f", weight {weight:g}")
    for role, uri in zip(("base", "tuned"), result.models, strict=False):
        page.say(Styled(f"{role:<8}", "dim"), Styled(uri, "bold"))
    page.say(Styled(f"{report.job:<8}", "dim"), result.method)
    if report.job in ("resize", "combine", "extract", "ablate"):
        page.say(Styled("ranks   ", "dim"), rank_change(result.weights))
        _say_errors(page, result)
    _say_cosines(page, result)
    if result.floor is not None:
        _say_floor(page, result)
    if result.unchanged:
        page.say(Styled("equal   ", "dim"), plural(result.unchanged, "tensor"))
    if result.kept:
        text = "with new values" if result.models else "unchanged"
        page.say(Styled("kept    ", "dim"), f"{plural(len(result.kept), 'weight')} {text}: {cut(result.kept)}")
    if result.vocabulary is not None:
        call = f"model.resize_token_embeddings({result.vocabulary})"
        page.say(
            Styled("tokens  ", "dim"), f"their number differs from the base's: PEFT needs {call} before it loads this"
        )
    if result.left_out:
        text = f"{plural(len(result.left_out), 'weight')} with {percent(result.dropped)} of Σ‖ΔW‖²"
        page.say(Styled("left out", "dim"), f" {text}: {cut(result.left_out)}")
    _say_size(page, report, result, written)


def _say_size(page: Page, report: Report, result: FactorResult, written: str) -> None:
    """The files, and the bytes of the tensors before and after: files hold settings and a header beside them."""
    size = f"as {result.target}: {plural(len(result.files), 'file')}"
    if not result.is_dry_run:
        size += f", {nbytes(result.bytes_written)}"
    if report.summary is not None:
        before = f", from {nbytes(result.bytes_before)}" if result.bytes_before else ""
        size += f"; tensors {nbytes(report.summary.nbytes)}{before}"
    if result.is_dry_run:
        page.say(Styled("nothing written", "bold"), f" (dry run) {size}")
    else:
        page.say(Styled("wrote   ", "dim"), Styled(written, "bold"), f" {size}")


def _say_cosines(page: Page, result: FactorResult) -> None:
    """Of each pair; of many the least and the largest."""
    pairs = sorted((cosine, first, second) for first, second, cosine in result.cosines if cosine is not None)
    for cosine, first, second in pairs if len(pairs) <= _FEW_PAIRS else (pairs[0], pairs[-1]):
        page.say(Styled("cosine  ", "dim"), f"{cosine:+.4f} of adapters {first + 1} and {second + 1}")


def _say_floor(page: Page, result: FactorResult) -> None:
    """What of the difference is rounding of the tuned model, and what merging the adapter back would keep."""
    assert result.floor is not None
    text = f"{number(result.floor)} of ‖ΔW‖ is rounding in the tuned model"
    if result.error <= result.floor * NOISE_MARGIN:
        text += ": the error is about as large, so a larger rank would only store rounding"
    page.say(Styled("noise   ", "dim"), text)
    if result.retained is not None:
        page.say(Styled("merging ", "dim"), f"into the base retains {percent(result.retained)} of the update")


def _say_errors(page: Page, result: FactorResult) -> None:
    parts = [f"{number(result.error)} of ‖ΔW‖"]
    if result.optimum is not None:
        parts.append(f"least possible {number(result.optimum)}")
    if result.energy is not None:
        parts.append(f"energy {percent(result.energy)}")
    if result.conflicts is not None:
        parts.append(f"opposite signs in {percent(result.conflicts)} of the values")
    if result.cross_terms is not None:
        parts.append(f"off Σ w·ΔW by {percent(result.cross_terms)}")
    page.say(Styled("error   ", "dim"), ", ".join(parts))
    worst = sorted(result.weights, key=lambda each: (-each.error, each.weight))[:_WORST]
    if worst and worst[0].error > _TINY:
        page.table(["largest errors", "rank", "error", "optimum", "‖ΔW‖"], [_row(each) for each in worst])


_TINY = 1e-6


def _row(each: FactorChange) -> list[str]:
    optimum = "-" if each.optimum is None else number(each.optimum)
    return [each.weight, f"{each.rank_before} → {each.rank}", number(each.error), optimum, number(each.norm)]
