"""What is drawn: adapters with their figures, as data for every kind of picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraformat.diagnostics import Finding
from loraformat.model.bundle import Json
from loraformat.model.results.factor_changes import FactorResult
from loraformat.model.results.verbs import InspectResult
from loraformat.model.results.weight_figures import WeightRecord
from loraformat.model.summary import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeRecord(WeightRecord):
    """A weight, with what the verb that wrote its update reported about it; see FactorChange.

    Attributes:
        rank_before, error, optimum, energy, conflicts, cross_terms, floor, retained: as in FactorChange; None for
            weights that were carried over.
    """

    rank_before: int | None = None
    error: float | None = None
    optimum: float | None = None
    energy: float | None = None
    conflicts: float | None = None
    cross_terms: float | None = None
    floor: float | None = None
    retained: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecord:
    """What an adapter of an image or video model does to one component of the pipeline.

    Attributes:
        component: "unet", "text_encoder", "transformer_2".
        weights: how many updates it has.
        ranks: rank → updates of that rank.
        parameters: elements of its tensors.
        norm: ‖ΔW‖ of all its updates whose norm is known; None where none is.
        relative_norm: ‖ΔW‖ / ‖W‖ of all its updates; None without the base.
    """

    component: str
    weights: int
    ranks: Mapping[int, int]
    parameters: int
    norm: float | None = None
    relative_norm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One adapter.

    Attributes:
        uri: as it was given.
        label: a short name, apart from those of the others: the step, or the last part of the path.
        step: of training; None where nothing says it.
        cosine: of all updates together with those of the last subject; None where they do not compare.
        components: of an adapter of an image or video model; () for an adapter of one model.
        made_by, made: the verb that wrote the adapter, and what it reported; "" and None where that was not given. The
            weights of `result` are MadeRecords then.
        base_bins, update_bins: how many values of a sample of rows of W and of W' - W have which exponent of float32
            (0 to 255, less 127); empty where the base was not read for it.
    """

    uri: str
    label: str
    step: int | None
    format: str
    summary: Summary
    result: InspectResult
    findings: tuple[Finding, ...] = ()
    config: Mapping[str, Json] | None = None
    cosine: float | None = None
    components: tuple[ComponentRecord, ...] = ()
    made_by: str = ""
    made: FactorResult | None = None
    base_bins: tuple[int, ...] = ()
    update_bins: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """All that a page or a figure shows. Of the checkpoints of a run the last is shown weight by weight, else all are.

    Attributes:
        version: of this package.
        base: URI of the base; None where there was none.
        subjects: at least one; by step where they are checkpoints of one run.
        is_run: whether they are: all have a step of their own and change the same weights.
    """

    version: str
    base: str | None
    subjects: tuple[Subject, ...]
    is_run: bool = False

    @property
    def main(self) -> Subject:
        """The last subject."""
        return self.subjects[-1]

    @property
    def shown(self) -> tuple[Subject, ...]:
        """The subjects that are shown weight by weight."""
        return self.subjects[-1:] if self.is_run else self.subjects
