"""combine: several adapters as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import TypeAlias

from loraformat.algebra.decomposition import Decomposition
from loraformat.algebra.elementwise import Sparsity
from loraformat.algebra.factors import Product, pairs_of, values_of
from loraformat.algebra.norms import inner_of, norm_of
from loraformat.algebra.rank_rules import RankRule
from loraformat.diagnostics import Finding
from loraformat.errors import UnsupportedUpdate, UsageError, require_one_of
from loraformat.jobs.algebra.compatible import common_config, require_one_base, saved_values
from loraformat.jobs.algebra.factoring import Form, change_of, low_rank_of, together
from loraformat.jobs.algebra.methods import SHARED, Contribution, Mixed, concatenated, like_peft, mixed
from loraformat.jobs.algebra.options import OutputOptions, checked, described, dtype_of
from loraformat.jobs.algebra.output import config_of, nothing_left, origin_of, target_of, write
from loraformat.jobs.algebra.sizes import not_met, ranks_within
from loraformat.jobs.algebra.sources import (
    OpenedSource,
    finite,
    forms_of,
    matrices,
    nbytes_of,
    open_source,
    ranks_before,
    require_additive,
    sums_of,
    vectors_of,
)
from loraformat.jobs.inputs.strength import with_strength
from loraformat.jobs.inputs.subject import open_base
from loraformat.model.adapter import Adapter, module_of
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.floats import float64_of
from loraformat.model.results.factor_changes import FactorChange, FactorResult
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import Dense, LowRank, Update
from loraformat.report import Report
from loraformat.storage import Location, Publication, listed, uri_of, uri_or_none

METHODS = (
    *("cat", "svd", "ties", "dare", "dare-ties", "magnitude", "breadcrumbs", "della", "knots-ties", "core-ties"),
)
# PEFT's `combination_type` → our method in ΔW space, or of factors.
PEFT_SPACES = {
    "cat": "cat",
    "svd": "svd",
    "ties_svd": "ties",
    "dare_linear_svd": "dare",
    "dare_ties_svd": "dare-ties",
    "magnitude_prune_svd": "magnitude",
}
PEFT_FACTORS = {
    "linear": "magnitude",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare-ties",
    "magnitude_prune": "magnitude",
}


# (first, second adapter) → [inner product, squared norm of the first, of the second] over the weights that both change.
_Products: TypeAlias = dict[tuple[int, int], list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """How each weight is combined.

    Attributes:
        method: one of METHODS, or "" for factors as PEFT combines them.
    """

    method: str
    sparsity: Sparsity
    rule: RankRule
    dtype: DType


def combine(
    adapters: Sequence[Location],
    out: Location,
    *,
    method: str | None = None,
    density: float | None = None,
    sign: str = "total",
    gamma: float = 0.01,
    epsilon: float = 0.1,
    seed: int = 0,
    like_peft: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    size: int | None = None,
    max_rank: int | None = None,
    dtype: str = "float32",
    to: str | None = None,
    container: str | None = None,
    base: Location | None = None,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    dry_run: bool = False,
    strict: bool = False,
    force: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Combine adapters into one that changes each weight by Σ w · ΔW, or as another method combines the ΔW.

    >>> import loraformat
    >>> one = "fixtures/good/peft/tiny-llama"
    >>> report = loraformat.combine([f"{one}=0.5", f"{one}=0.25"], "combined")
    >>> report.data.method, {(each.rank_before, each.rank) for each in report.data.weights}, report.data.error < 1e-6
    ('cat', {(4, 4)}, True)

    Args:
        adapters: folders or files; each may end in "=WEIGHT".
        out: folder that does not exist yet.
        method: "cat" (the default), "svd" (the default if an argument sets the rank), "ties", "dare", "dare-ties",
            "magnitude", "breadcrumbs", "della", "knots-ties" or "core-ties".
        density: share of the values of each ΔW to keep, for the methods that drop values.
        sign: for ties and related methods: elect signs by "total", the sum of all values, or by "frequency", the
            majority.
        gamma: for breadcrumbs. epsilon: for della.
        seed: for dare, dare-ties and della; the same seed gives the same bytes.
        like_peft: a `combination_type` of PEFT's `add_weighted_adapter`, to reproduce its result.
        rank, energy, error, sv_ratio, sv_cumulative, sv_fro, size, max_rank: as for `resize`.
        dtype, to, container, base: as for `resize`.
        alpha, assumptions: apply to every adapter that does not state it.
        dry_run, strict, overwrite, publication, announce, progress: as for `resize`.
        force: downgrade forgivable errors to warnings, and combine adapters of different bases or vocabularies.

    Raises: UsageError (LF021). UnsupportedUpdate (LF013): DoRA, or another update that its factors do not fully
        describe; tables that contradict each other. AdapterRefused: different bases or vocabularies; a sum that is
        zero. NonFiniteValue (LF402); StorageError, ContainerError, FormatError.
    """
    rule = checked(
        RankRule(
            rank=rank,
            energy=energy,
            error=error,
            sv_ratio=sv_ratio,
            sv_cumulative=sv_cumulative,
            sv_fro=sv_fro,
            size=size,
            max_rank=max_rank,
        )
    )
    name = _method(method, like_peft, rule)
    sparsity = _sparsity(name or PEFT_FACTORS[str(like_peft)], like_peft, density, sign, gamma, epsilon, seed)
    wanted = _Wanted(method=name, sparsity=sparsity, rule=rule, dtype=dtype_of(dtype))
    chosen = [with_strength(each) for each in listed(adapters)]
    checkpoint, known = open_base(uri_or_none(base)), with_alpha(alpha, assumptions)
    sources = [open_source(uri, weight, base=checkpoint, assumptions=known, force=force) for uri, weight in chosen]
    for source in sources:
        require_additive(source.adapter, source.opened.uri, "combine")
    if not sources:
        raise UsageError("no adapters given", where="combine")
    findings = require_one_base(sources, force=force)
    wanted = replace(wanted, rule=_rule(wanted, sources, like_peft))
    options = OutputOptions(
        to=to,
        container=container,
        dry_run=dry_run,
        strict=strict,
        overwrite=overwrite,
        publication=publication,
        announce=announce,
        progress=progress,
    )
    made, changes, products = _combined(sources, wanted)
    result = FactorResult(
        method=_words(wanted, like_peft),
        target=target_of(options, sources[0]).NAME,
        adapters=tuple((source.opened.uri, source.weight) for source in sources),
        weights=changes,
        kept=tuple(sorted(saved_values(sources))),
        left_out=tuple(sorted({each for source in sources for each in source.adapter.updates} - made.updates.keys())),
        conflicts=_conflicts(changes),
        cosines=tuple(_cosines(products)),
        bytes_before=sum(nbytes_of(source.adapter) for source in sources),
    )
    return write(
        made,
        together(result),
        origin_of(sources),
        uri_of(out),
        job="combine",
        base=checkpoint,
        options=options,
        findings=(*findings, *not_met(changes, wanted.rule)),
    )


def _method(method: str | None, like: str | None, rule: RankRule) -> str:
    """The method in ΔW space; "" for PEFT's combinations of factors.

    Raises: UsageError (LF021): two methods, or one that needs a rule of ranks and has none.
    """
    if method is not None and like is not None:
        raise UsageError("--method and --like-peft cannot be combined", where="combine")
    if like is not None:
        require_one_of(like, (*PEFT_FACTORS, *PEFT_SPACES), "--like-peft")
        return PEFT_SPACES.get(like, "")
    has_rule = bool(rule.names) or rule.max_rank is not None
    found = method or ("svd" if has_rule else "cat")
    require_one_of(found, METHODS, "--method")
    if found == "cat" and has_rule:
        raise UsageError("cat keeps every rank", where="--method", hint="use svd for the same sum at a lower rank")
    if found not in ("cat", *SHARED) and not has_rule:
        raise UsageError(
            f"{found} needs an option that sets the rank",
            where="--method",
            hint="for example --rank 32 or --error 0.1",
        )
    return found


def _sparsity(
    method: str, like: str | None, density: float | None, sign: str, gamma: float, epsilon: float, seed: int
) -> Sparsity:
    """Raises: UsageError (LF021): a share outside its range, or a density that is missing or has no meaning."""
    require_one_of(sign, ("total", "frequency"), "--sign")
    is_sparse = method not in ("cat", "svd") and like != "linear"
    if is_sparse and density is None:
        raise UsageError(f"{like or method} needs the share of the values to keep", where="--density")
    if not is_sparse and density is not None:
        raise UsageError(f"{like or method} does not drop values", where="--density")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"expected a share above 0 and up to 1, found {density:g}", where="--density")
    if not 0 <= gamma < 1:
        raise UsageError(f"expected a share from 0 to below 1, found {gamma:g}", where="--gamma")
    if method == "della" and density is not None and not 0 < epsilon < density:
        raise UsageError(f"expected a number above 0 and below the density, found {epsilon:g}", where="--epsilon")
    name = {"knots-ties": "ties", "core-ties": "ties"}.get(method, method)
    return Sparsity(
        method=name, density=1.0 if density is None else density, sign=sign, gamma=gamma, epsilon=epsilon, seed=seed
    )


def _rule(wanted: _Wanted, sources: Sequence[OpenedSource], like: str | None) -> RankRule:
    """The rule; for PEFT's methods in ΔW space its default, the largest rank of any adapter."""
    if like is None or wanted.method in ("", "cat") or wanted.rule.names:
        return wanted.rule
    ranks = [ranks_before(sums_of(chain)) for source in sources for chain in source.adapter.updates.values()]
    return replace(wanted.rule, rank=max(ranks, default=1))


def _words(wanted: _Wanted, like: str | None) -> str:
    parts = [f"{like} of PEFT" if like is not None else wanted.method]
    if wanted.method not in ("cat", "svd") and like != "linear":
        parts.append(f"density {wanted.sparsity.density:g}")
    return ", ".join([*parts, *filter(None, [described(wanted.rule)])])


def _combined(sources: Sequence[OpenedSource], wanted: _Wanted) -> tuple[Adapter, tuple[FactorChange, ...], _Products]:
    """The adapter, a record of each weight that gets an update, and how the adapters compare.

    Raises: AdapterRefused: all sums are zero.
    """
    saved = saved_values(sources)
    weights = sorted({weight for source in sources for weight in source.adapter.updates})
    biases = _biases(sources)
    unscaled = {module_of(weight) for weight in biases}
    steps = {weight: partial(_spectra, weight, sources, wanted) for weight in weights if _has_sums(weight, sources)}
    others = [*(each for several in saved.values() for each in several), *biases.values()]
    ranks = {}
    if wanted.rule.size is not None:
        ranks = ranks_within(wanted.rule, wanted.dtype, steps, others)
    updates: dict[str, tuple[Update, ...]] = {}
    changes: list[FactorChange] = []
    products: _Products = {}
    for weight in weights:
        chain: tuple[Update, ...] = saved.get(weight, ())
        if weight in steps:
            terms, form = _terms(weight, sources)
            _compare(terms, products)
            is_unscaled = module_of(weight) in unscaled
            update, change = _one(weight, terms, form, wanted, ranks.get(weight), unscaled=is_unscaled)
            changes.append(change)
            chain = chain if update is None else (*chain, update)
        if weight in biases:
            chain = (*chain, biases[weight])
        if chain:
            updates[weight] = chain
    if changes and not any(each.rank for each in changes):
        raise nothing_left("combine", len(changes))
    config = common_config(sources)
    same = {source.adapter.config.targets for source in sources}
    if len(same) == 1 and all(source.adapter.updates.keys() == updates.keys() for source in sources):
        config = replace(config, targets=same.pop())
    tokenizer = next((source.adapter.tokenizer for source in sources if source.adapter.tokenizer), {})
    unclaimed = {name: tensor for source in sources for name, tensor in source.adapter.unclaimed.items()}
    adapter = Adapter(
        config=config_of(config, updates, is_fresh=True), updates=updates, tokenizer=tokenizer, unclaimed=unclaimed
    )
    return adapter, tuple(changes), products


def _spectra(weight: str, sources: Sequence[OpenedSource], wanted: _Wanted) -> Sequence[Decomposition]:
    return _decomposed(weight, _terms(weight, sources)[0], wanted).found


def _has_sums(weight: str, sources: Sequence[OpenedSource]) -> bool:
    return any(sums_of(source.adapter.updates.get(weight, ())) for source in sources)


def _terms(weight: str, sources: Sequence[OpenedSource]) -> tuple[list[Contribution], Form]:
    """What the adapters whose weight is not 0 do to a weight, and what it is.

    Raises: UnsupportedUpdate (LF013): the shapes differ, or it is a convolution for one adapter and none for another.
    """
    terms, forms = [], []
    for number, source in enumerate(sources):
        sums = sums_of(source.adapter.updates.get(weight, ()))
        if not sums:
            continue
        forms.append(Form.of(forms_of(sums)))
        only = sums[0] if len(sums) == 1 else None
        scale = 1.0
        if isinstance(only, LowRank) and only.scale:
            scale = only.scale
            pairs = (Product(values_of(up), values_of(down)) for up, down in pairs_of(only))
            found = tuple(finite(pair, weight) for pair in pairs)
        else:
            found = tuple(matrices(sums, weight))
        terms.append(Contribution(number, source.weight, found, scale, ranks_before(sums)))
    if len(set(forms)) > 1 or len({tuple(each.shape for each in term.matrices) for term in terms}) > 1:
        raise UnsupportedUpdate("the adapters change it as weights of different shapes or kinds", where=weight)
    return terms, forms[0]


def _decomposed(weight: str, terms: Sequence[Contribution], wanted: _Wanted) -> Mixed:
    rule = wanted.rule
    if rule.size is not None:
        nbytes = sum(sum(each.shape) for each in terms[0].matrices) * wanted.dtype.itemsize
        rule = RankRule(rank=max(1, rule.size // nbytes), max_rank=rule.max_rank)
    return mixed(terms, wanted.method or "svd", wanted.sparsity, rule, weight)


def _one(
    weight: str, terms: Sequence[Contribution], form: Form, wanted: _Wanted, rank: int | None, *, unscaled: bool
) -> tuple[LowRank | None, FactorChange]:
    """The combined update of one weight, None where nothing is left, and its record."""
    if wanted.method == "":
        return like_peft(weight, terms, wanted.sparsity, form, wanted.dtype)
    if wanted.method == "cat":
        return concatenated(weight, terms, form, wanted.dtype, keeps_scale=not unscaled)
    found = _decomposed(weight, terms, wanted)
    chosen = max(wanted.rule.least(each) for each in found.found) if rank is None else rank
    before = sum(term.rank for term in terms)
    if not chosen:
        change = change_of(weight, found.found, 0, before, [0.0])
        return None, replace(change, conflicts=found.conflicts)
    update, change = low_rank_of(weight, found.found, chosen, before, form, wanted.dtype)
    return update, replace(change, conflicts=found.conflicts)


def _biases(sources: Sequence[OpenedSource]) -> dict[str, Dense]:
    """Σ w · Δb of the biases that adapters train beside their factors."""
    import numpy as np

    found: dict[str, list[tuple[float, Dense]]] = {}
    for source in sources:
        for weight, chain in source.adapter.updates.items():
            for update in vectors_of(chain):
                found.setdefault(weight, []).append((source.weight, update))
    biases = {}
    for weight, several in found.items():
        if len({update.shape for _, update in several}) > 1:
            raise UnsupportedUpdate("the adapters change it as biases of different lengths", where=weight)
        total = np.zeros(several[0][1].shape)
        for factor, update in several:
            total += factor * (update.scale or 0.0) * float64_of(update.delta)
        biases[weight] = Dense(LazyTensor.of(total.astype(np.float32), DType.F32), 1.0)
    return biases


def _conflicts(changes: Sequence[FactorChange]) -> float | None:
    """The mean over all weights; None where values are not combined one by one."""
    known = [each.conflicts for each in changes if each.conflicts is not None]
    return sum(known) / len(known) if known else None


def _compare(terms: Sequence[Contribution], products: _Products) -> None:
    """Adds the inner products of all pairs of a weight's updates, and their squared norms."""
    norms = [sum(norm_of(each) ** 2 for each in term.matrices) * term.scale**2 for term in terms]
    for (one, norm), (other, another) in combinations(zip(terms, norms, strict=True), 2):
        inner = sum(inner_of(left, right) for left, right in zip(one.matrices, other.matrices, strict=True))
        entry = products.setdefault((one.number, other.number), [0.0, 0.0, 0.0])
        entry[0] += inner * one.scale * other.scale
        entry[1] += norm
        entry[2] += another


def _cosines(products: _Products) -> Iterator[tuple[int, int, float | None]]:
    """The cosine of each pair of adapters over all weights that both change."""
    for (one, other), (product, first, second) in sorted(products.items()):
        length = math.sqrt(first * second)
        yield one, other, max(-1.0, min(1.0, product / length)) if length else None
