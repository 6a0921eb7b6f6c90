"""pick: some of an adapter's updates, under their own or other names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from loraformat.algebra.norms import frobenius
from loraformat.diagnostics import Finding, show
from loraformat.errors import UsageError
from loraformat.jobs.algebra.factoring import together
from loraformat.jobs.algebra.options import OutputOptions
from loraformat.jobs.algebra.output import origin_of, target_of, with_updates, write
from loraformat.jobs.algebra.selection import chosen_of
from loraformat.jobs.algebra.sources import nbytes_of, open_source, ranks_before, sums_of, values_of
from loraformat.jobs.inputs.subject import open_base
from loraformat.model.adapter import Adapter
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.results.factor_changes import FactorChange, FactorResult
from loraformat.model.updates import Update
from loraformat.report import Report
from loraformat.storage import Location, Publication, uri_of, uri_or_none


def pick(
    adapter: Location,
    out: Location,
    *,
    select: Sequence[str] = (),
    drop: Sequence[str] = (),
    rename: Sequence[tuple[str, str]] = (),
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
    """Keep some of the updates of an adapter, bit for bit; its config names the remaining modules.

    >>> import loraformat
    >>> report = loraformat.pick("fixtures/good/peft/tiny-llama", "queries", select=["q_proj"])
    >>> [each.weight for each in report.data.weights], len(report.data.left_out)
    (['model.layers.0.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight'], 7)

    A pattern is one of

    - a glob over the path of a module or the name of a weight, `*` matching dots too: "model.layers.1.*", "lm_head";
    - the same for the last components of a path: "q_proj", "self_attn.*_proj";
    - layers by number: "layers=0-7,12".

    Args:
        adapter: folder or file.
        out: folder that does not exist yet.
        select: patterns of the updates to keep; all by default.
        drop: patterns of those to drop, of these.
        rename: (old, new) runs of whole components of names: ("model.layers", "language_model.layers").
        to, container, base, format, alpha, assumptions: as for `resize`.
        dry_run, strict, force, overwrite, publication, announce, progress: as for `resize`.

    Raises: UsageError (LF021): a pattern or an old name that matches nothing, or two weights with one new name.
        AdapterRefused: nothing is left. Otherwise as for `resize`.
    """
    if not (select or drop or rename):
        raise UsageError("nothing to do", where="pick", hint="use --select, --drop or --rename")
    checkpoint = open_base(uri_or_none(base))
    known = with_alpha(alpha, assumptions)
    source = open_source(uri_of(adapter), base=checkpoint, assumptions=known, format=format, force=force)
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
    names = chosen_of(tuple(source.adapter.updates), select, drop, "the adapter")
    chosen = {weight: source.adapter.updates[weight] for weight in names}
    new_names = _renamed(names, rename)
    updates = {new_names[weight]: chain for weight, chain in chosen.items()}
    made = _with_names(with_updates(source.adapter, updates, is_fresh=False), new_names)
    left_out = tuple(weight for weight in source.adapter.updates if weight not in chosen)
    result = FactorResult(
        method=f"{len(chosen)} of {len(source.adapter.updates)}",
        target=target_of(options, source).NAME,
        adapters=((source.opened.uri, 1.0),),
        weights=tuple(_record(weight, chain) for weight, chain in sorted(updates.items()) if sums_of(chain)),
        kept=tuple(sorted(weight for weight, chain in updates.items() if values_of(chain))),
        left_out=left_out,
        dropped=_dropped(source.adapter, left_out),
        bytes_before=nbytes_of(source.adapter),
    )
    return write(
        made, together(result), origin_of((source,)), uri_of(out), job="pick", base=checkpoint, options=options
    )


def _renamed(weights: Sequence[str], rename: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Old name → new name. Raises: UsageError (LF021)."""
    names = {weight: weight for weight in weights}
    for old, new in rename:
        if not old.strip(".") or not new.strip(".") or not new.isprintable():
            raise UsageError(f"expected OLD=NEW, found {show(f'{old}={new}', 200)}", where="--rename")
        whole = re.compile(rf"(?<![^.]){re.escape(old.strip('.'))}(?![^.])")
        changed = {weight: whole.sub(new.strip(".").replace("\\", r"\\"), name) for weight, name in names.items()}
        if changed == names:
            raise UsageError(f"no name contains the components {show(old, 200)}", where="--rename")
        names = changed
    twice = next((name for name, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"two weights would be called {show(twice, 200)}", where="--rename")
    return names


def _with_names(adapter: Adapter, names: dict[str, str]) -> Adapter:
    """The adapter whose config says the new names, too, and nothing of weights that have gone."""
    config = adapter.config
    if all(old == new for old, new in names.items()):
        return adapter
    tied = config.tied and tuple(tuple(names.get(name, name) for name in group) for group in config.tied)
    return replace(adapter, config=replace(config, tied=tied, targets=None))


def _record(weight: str, chain: tuple[Update, ...]) -> FactorChange:
    ranks = ranks_before(sums_of(chain))
    norm = math.hypot(*(frobenius(update) or 0.0 for update in sums_of(chain)))
    return FactorChange(weight=weight, rank_before=ranks, rank=ranks, norm=norm)


def _dropped(adapter: Adapter, left_out: Sequence[str]) -> float:
    """The share of all squares of norms that stands in weights that were left out."""
    norms = {
        weight: math.hypot(*(frobenius(update) or 0.0 for update in sums_of(chain)))
        for weight, chain in adapter.updates.items()
    }
    whole = math.fsum(norm**2 for norm in norms.values())
    return math.fsum(norms[weight] ** 2 for weight in left_out) / whole if whole else 0.0
