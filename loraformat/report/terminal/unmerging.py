"""The text report of `unmerge`."""

from __future__ import annotations

from loraformat.model.results.verbs import FileShare, UndoneWeight, UnmergeResult
from loraformat.report.lines import Page, Styled
from loraformat.report.words import amount, nbytes, number, percent, plural

_WORST = 8


def say_unmerging(page: Page, result: UnmergeResult, written: str) -> None:
    """The adapters, the proof, the weights of which most is unknown, the files.

    Args:
        written: where the output stands.
    """
    page.say(Styled("merged  ", "dim"), Styled(result.merged, "bold"))
    for each in result.adapters:
        strength = "" if each.strength == 1 else f", strength {each.strength:g}"
        page.say(Styled("without ", "dim"), Styled(each.uri, "bold"), f" ({each.format}){strength}")
    if result.share is not None:
        say_share(page, result.share)
        return
    for line in _proof(result):
        page.say(Styled("proof   ", "dim"), line)
    if result.proof != "base":
        _say_unknown(page, result)
    size = f"{plural(len(result.files), 'file')}, {nbytes(result.bytes_written)}"
    if result.is_dry_run:
        page.say(Styled("nothing written", "bold"), f" (dry run): {size}")
    else:
        page.say(Styled("wrote   ", "dim"), Styled(written, "bold"), f": {size}")


def say_share(page: Page, share: FileShare) -> None:
    """What one of several processes computed."""
    files = (
        f"{plural(len(share.files), 'weight file')}, {nbytes(share.nbytes)}"
        if share.files
        else "no file: there are fewer files than ranks"
    )
    page.say(Styled("share   ", "dim"), Styled(f"rank {share.rank} of {share.world}", "bold"), f": {files}")
    page.say(
        Styled("next    ", "dim"), "when all ranks are done, run the same command with --finish to publish the output"
    )


def _proof(result: UnmergeResult) -> list[str]:
    values, unlike = sum(each.values for each in result.weights), sum(each.unlike for each in result.weights)
    if result.proof == "base":
        if not unlike:
            return ["merging these adapters into the base gives the model, bit for bit; the output is the base"]
        share = f"{amount(unlike)} of {amount(values)} values ({percent(unlike / values)})"
        return [
            f"merging these adapters into the base gives the model but for rounding in {share}; the output is the base"
        ]
    if result.is_exact:
        return [
            "the manifest and its digests show that these adapters made the model; the output has the base's tensors"
        ]
    if result.proof == "manifest":
        return [
            "the manifest and its digests show that these adapters made the model; losses by rounding are listed below"
        ]
    lines = ["none: nothing shows that these adapters made the model; use --base BASE to prove it"]
    if result.doubt:
        lines = [
            f"none: {result.doubt}",
            "the manifest names these adapters, but the output is not proven; use --base BASE to compare all of it",
        ]
    if unlike:
        share = f"{amount(unlike)} of {amount(values)} values ({percent(unlike / values)})"
        lines.append(f"{share} are not what merging these adapters into a base and rounding once gives")
    return lines


def _say_unknown(page: Page, result: UnmergeResult) -> None:
    values, unknown = (sum(getattr(each, name) for each in result.weights) for name in ("values", "unknown"))
    if not unknown:
        page.say(Styled("unknown ", "dim"), f"none of {amount(values)} values")
        return
    bound, odd = max(each.bound for each in result.weights), sum(each.not_finite for each in result.weights)
    text = f"{amount(unknown)} of {amount(values)} values ({percent(unknown / values)})"
    if odd:
        text += f", {amount(odd)} of them not finite (NaN or infinity)"
    if unknown > odd:
        text += f"{', the others' if odd else ','} off by at most {number(bound)}"
    page.say(Styled("unknown ", "dim"), text)
    worst = sorted(result.weights, key=lambda each: (-each.unknown / max(1, each.values), each.weight))[:_WORST]
    page.table(["most unknown", "values", "unknown", "off by at most"], [_row(each) for each in worst if each.unknown])


def _row(each: UndoneWeight) -> list[str]:
    return [each.weight, amount(each.values), percent(each.unknown / each.values), number(each.bound)]
