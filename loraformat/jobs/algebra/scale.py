"""scale: an adapter whose updates are multiplied by a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from loraformat.algebra.norms import frobenius
from loraformat.diagnostics import Finding, FindingLocation
from loraformat.errors import UnsupportedUpdate, UsageError
from loraformat.formats.kit.losses import folded_scale
from loraformat.formats.kit.normalize import multiplied
from loraformat.jobs.algebra.factoring import together
from loraformat.jobs.algebra.options import OutputOptions
from loraformat.jobs.algebra.output import origin_of, target_of, with_updates, write
from loraformat.jobs.algebra.sources import nbytes_of, open_source, ranks_before, require_additive, values_of
from loraformat.jobs.inputs.strength import with_strength
from loraformat.jobs.inputs.subject import open_base
from loraformat.model.adapter import Adapter
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.bundle import Json
from loraformat.model.floats import ROUNDOFF
from loraformat.model.results.factor_changes import FactorChange, FactorResult
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Update, scale_of
from loraformat.report import Report
from loraformat.storage import Location, Publication, uri_of, uri_or_none

_ALPHAS = ("alpha", "lora_alpha")
_PATTERNS = ("alpha_exceptions", "alpha_pattern")


def scale(
    adapter: Location,
    out: Location,
    *,
    weight: float | None = None,
    bake: bool = False,
    to: str | None = None,
    container: str | None = None,
    base: Location | None = None,
    format: str | None = None,  # noqa: A002
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
    """Multiply every ΔW of an adapter by a number, only through alpha: all tensors keep their bytes.

    >>> import loraformat
    >>> report = loraformat.scale("fixtures/good/peft/rslora", "half", weight=0.5)
    >>> before, after = (loraformat.load_adapter(each) for each in ("fixtures/good/peft/rslora", "half"))
    >>> name = "model.layers.0.self_attn.v_proj.weight"
    >>> bool((after.delta(name) == before.delta(name) * 0.5).all())
    True

    Args:
        adapter: folder or file; may end in "=WEIGHT" (see `merge`).
        weight: the number, if `adapter` does not end in it; may be negative or zero.
        bake: multiply `lora_B` instead, rounded once to its dtype, for programs that interpret alpha differently.
        out, to, container, base, format, alpha, assumptions: as for `resize`.
        dry_run, strict, force, overwrite, publication, announce, progress: as for `resize`.

    Raises: UsageError (LF021): no number. UnsupportedUpdate (LF013): DoRA, replaced tables, trained rows: their effect
        is not proportional to any value in their files. Otherwise as for `resize`.
    """
    uri, number = with_strength(uri_of(adapter)) if weight is None else (uri_of(adapter), weight)
    if weight is None and uri == uri_of(adapter):
        raise UsageError("the factor is missing", where="scale", hint="write ADAPTER=0.5")
    checkpoint = open_base(uri_or_none(base))
    known = with_alpha(alpha, assumptions)
    source = open_source(uri, number, base=checkpoint, assumptions=known, format=format, force=force)
    _require_proportional(source.adapter, uri)
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
    updates = {
        name: tuple(_times(update, number, bake=bake) for update in chain)
        for name, chain in source.adapter.updates.items()
    }
    made = with_updates(source.adapter, updates, is_fresh=False)
    if not bake:
        made = replace(made, config=replace(made.config, raw=_with_alphas(made.config.raw, number)))
    records = tuple(_record(name, chain, number) for name, chain in source.adapter.updates.items())
    result = FactorResult(
        method=f"{'B' if bake else 'alpha'} times {number:g}",
        target=target_of(options, source).NAME,
        adapters=((uri, number),),
        weights=tuple(each for each in records if each is not None),
        bytes_before=nbytes_of(source.adapter),
    )
    return write(
        made,
        together(result),
        origin_of((source,)),
        uri_of(out),
        job="scale",
        base=checkpoint,
        options=options,
        findings=_rounding(source.adapter, number) if bake else (),
    )


def _require_proportional(adapter: Adapter, uri: str) -> None:
    """Raises: UnsupportedUpdate (LF013): a weight whose change does not grow with a number in the adapter."""
    require_additive(adapter, uri, "scale")
    for name, chain in adapter.updates.items():
        if values_of(chain):
            raise UnsupportedUpdate(
                "the weight is replaced (modules_to_save, trained rows), so a share of the change depends on the base",
                where=FindingLocation(subject=uri, tensor=name),
                hint=f"drop it with pick --drop {name}, or merge at that strength",
            )


def _times(update: Update, number: float, *, bake: bool) -> Update:
    assert isinstance(update, (LowRank, Hadamard, Kronecker, Dense))
    assert update.scale is not None
    if not bake:
        return replace(update, scale=update.scale * number)
    match update:
        case LowRank(is_embedding=True):  # whose A is the table's side
            return replace(update, down=multiplied(update.down, number))
        case LowRank():
            return replace(update, up=multiplied(update.up, number))
        case Hadamard():
            return replace(update, up1=multiplied(update.up1, number))
        case Kronecker():
            return replace(update, left=(multiplied(update.left[0], number), *update.left[1:]))
        case Dense():
            return replace(update, delta=multiplied(update.delta, number))


def _with_alphas(raw: Mapping[str, Json], number: float) -> dict[str, Json]:
    """The source's own alphas multiplied, so that a writer which can say them exactly says them that way."""
    found = dict(raw)
    for name in _ALPHAS:
        found[name] = _product(found[name], number) if name in found else None
    for name in _PATTERNS:
        pattern = found.get(name)
        if isinstance(pattern, dict):
            found[name] = {key: _product(value, number) for key, value in pattern.items()}
    return {name: value for name, value in found.items() if name in raw}


def _product(value: Json, number: float) -> Json:
    return value * number if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _record(name: str, chain: tuple[Update, ...], number: float) -> FactorChange | None:
    """The record of what a weight's updates have become; None for a bias."""
    if len(chain[0].shape) < 2:
        return None
    norms = [frobenius(update) or 0.0 for update in chain]
    ranks = ranks_before(chain)
    return FactorChange(weight=name, rank_before=ranks, rank=ranks, norm=abs(number) * sum(norms))


def _rounding(adapter: Adapter, number: float) -> tuple[Finding, ...]:
    """LF701: the factor B, or what has its part, was multiplied and rounded."""
    import math

    if abs(math.frexp(number)[0]) == 0.5 or not number:
        return ()
    dtypes = [
        ROUNDOFF.get(update.up.dtype, 1.0)
        for chain in adapter.updates.values()
        for update in chain
        if isinstance(update, LowRank) and scale_of(update) is not None
    ]
    return (folded_scale("", sorted(adapter.updates), max(dtypes, default=0.0)),)
