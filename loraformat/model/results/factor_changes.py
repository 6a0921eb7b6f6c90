"""The results of the verbs that make adapters from adapters or models."""

from __future__ import annotations

from dataclasses import dataclass

# What a rank leaves out is taken for rounding up to so many times the norm that rounding is expected to have.
NOISE_MARGIN = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorChange:
    """How the update of one weight changed. All norms are Frobenius norms; ΔW is the exact update.

    Attributes:
        weight: name of the base weight.
        rank_before: rank of the update, or of all that were combined together.
        rank: as written; 0 if it was left out.
        norm: ‖ΔW‖.
        spectral_norm: σ₁ of ΔW; None if it was not computed.
        error: ‖ΔW − written‖ / ‖ΔW‖, for the factors as written.
        optimum: the smallest such error of any factors of this rank; None if unknown.
        energy: share of ‖ΔW‖² that this rank can hold; None if unknown.
        conflicts: for methods that combine value by value, the share of values with opposite signs.
        cross_terms: for PEFT's combinations of factors, ‖Σ w·ΔW − written‖ / ‖Σ w·ΔW‖.
        floor: for `extract`, the share of ‖ΔW‖ that is expected to be rounding noise of the tuned model; an error below
            it loses nothing.
        retained: for `extract`, the share of the update that survives merging it into the base and rounding.
    """

    weight: str
    rank_before: int
    rank: int
    norm: float
    spectral_norm: float | None = None
    error: float = 0.0
    optimum: float | None = None
    energy: float | None = None
    conflicts: float | None = None
    cross_terms: float | None = None
    floor: float | None = None
    retained: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorResult:
    """What `resize`, `combine`, `scale`, `pick`, `extract`, `ablate` or `init` wrote, or would write.

    Attributes:
        method: such as "rank 8", "cat", "alpha".
        target: format of the output.
        adapters: (URI, weight) of each source adapter; empty if the sources are models.
        weights: one for each update of a weight, sorted by name.
        kept: weights that are replaced or have trained rows, copied unchanged.
        left_out: weights of the sources that the output does not change; for `extract`, changed weights that were left
            out.
        norm: of all updates together.
        error, optimum, energy, conflicts, cross_terms, floor, retained: as in FactorChange, of all updates together.
        dropped: share of the sources' Σ‖ΔW‖² that is in `left_out`.
        unchanged: for `extract`, how many tensors are equal in both models.
        vocabulary: for `extract`, the number of tokens of the tables in `kept`, if it differs from the base's: a model
            that loads the adapter in PEFT needs `resize_token_embeddings` first.
        models: URIs of the source models.
        cosines: of each pair of adapters that were combined: (first, second, cosine or None).
        bytes_before, bytes_written: of the tensors of the sources, and of the files; of the plan in a dry run.
        files: names of the output files, sorted.
    """

    method: str
    target: str
    adapters: tuple[tuple[str, float], ...]
    weights: tuple[FactorChange, ...]
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    norm: float = 0.0
    error: float = 0.0
    optimum: float | None = None
    energy: float | None = None
    conflicts: float | None = None
    cross_terms: float | None = None
    floor: float | None = None
    retained: float | None = None
    dropped: float = 0.0
    unchanged: int = 0
    vocabulary: int | None = None
    models: tuple[str, ...] = ()
    cosines: tuple[tuple[int, int, float | None], ...] = ()
    bytes_before: int = 0
    bytes_written: int = 0
    files: tuple[str, ...] = ()
    is_dry_run: bool = False
