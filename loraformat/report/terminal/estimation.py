"""The page of `estimate`."""

from __future__ import annotations

from loraformat.model.results.estimates import EstimateResult
from loraformat.report.lines import Page, Styled
from loraformat.report.words import amount, nbytes, plural, shape

_MOST_DIGITS = 4


def say_estimate(page: Page, subject: str, result: EstimateResult) -> None:
    """What an adapter would cost."""
    page.flow(Styled(subject, "bold"), f"  {amount(result.base_parameters)} parameters, by {result.source}")
    page.fact("rank", str(result.rank))
    page.fact("parameters", f"{amount(result.parameters)} ({result.share:.{_MOST_DIGITS}%} of base and adapter)")
    page.fact("size", ", ".join(f"{nbytes(count)} in {dtype}" for dtype, count in result.nbytes.items()))
    layers = set(result.parameters_by_layer.values())
    if layers:
        low, high = min(layers), max(layers)
        each = amount(low) if low == high else f"{amount(low)} to {amount(high)}"
        page.fact("a layer", f"{each} in each of {plural(len(result.parameters_by_layer), 'layer')}")
    page.table(
        ["module", "shape", "weights", "each", "parameters"],
        [
            [
                one.module,
                shape(one.shape),
                amount(one.weights),
                amount(one.parameters // one.weights),
                amount(one.parameters),
            ]
            for one in result.modules
        ],
    )
    page.say("")
    page.table(
        ["training", "weights", "gradients", "optimizer", "together"],
        [
            [one.method, nbytes(one.weights), nbytes(one.gradients), nbytes(one.optimizer), nbytes(one.total)]
            for one in result.memory
        ],
    )
    note = "16-bit weights and gradients, float32 master copy and moments of Adam, NF4 for qlora; without activations"
    page.flow(Styled(f"  {note}", "dim"), indent=2)
