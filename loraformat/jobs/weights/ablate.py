"""ablate: removes directions from the weights of a model, as an adapter or merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraformat import formats
from loraformat.algebra.decomposition import stored
from loraformat.algebra.norms import norm_of
from loraformat.algebra.rank_rules import RankRule
from loraformat.algebra.row_blocks import RowBlocks, leading, places
from loraformat.algebra.spectrum import singular_values
from loraformat.algebra.weights.directions import (
    NormKeeping,
    Stored,
    UnitRows,
    in_linear_orientation,
    removed_from_input,
    removed_from_output,
    span_of,
)
from loraformat.containers import bundle_of_store, save_bundle
from loraformat.diagnostics import Finding, show
from loraformat.engine import open_engine
from loraformat.errors import (
    AdapterRefused,
    NonFiniteValue,
    ShapeMismatch,
    UnsupportedUpdate,
    UsageError,
    require_one_of,
)
from loraformat.io import read_bundle
from loraformat.jobs.algebra.factoring import low_rank_of, tensor_of, together
from loraformat.jobs.algebra.options import OutputOptions, checked, dtype_of
from loraformat.jobs.algebra.output import config_of, write
from loraformat.jobs.algebra.selection import chosen_of, hits_of
from loraformat.jobs.inputs.strength import number_of
from loraformat.jobs.merge.prepare import Options, adapter_source, check_place, planned, report_of
from loraformat.jobs.merge.prepare import write as write_model
from loraformat.jobs.weights.changes import nbytes_of
from loraformat.jobs.weights.directions import directions_of
from loraformat.jobs.weights.models import Layout, config_for, layout_of, open_model, origin_of_models
from loraformat.merger import Arithmetic, Resources, Trust
from loraformat.model.adapter import Adapter, module_of
from loraformat.model.assumptions import Assumptions
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.factor_changes import FactorChange, FactorResult
from loraformat.model.tensors import DType
from loraformat.model.updates import LowRank, Update
from loraformat.report import Report
from loraformat.rules import doubts
from loraformat.storage import Location, MemoryStore, Publication, uri_of

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

SIDES = ("output", "input")
DEFAULT_MEMORY_NBYTES = 256 << 20
_MOST_DROPS = 12
# Beyond it a number is a slip of the keyboard; squares and products with weights stay far from overflow below it.
_LARGEST_STRENGTH = 1e6
_WHOLE = "1 removes the directions completely"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """How directions are taken out.

    Attributes:
        basis: (features, rank), orthonormal.
        rank: of the update where norms are kept; None where they are not.
    """

    basis: Floats
    side: str
    rank: int | None
    dtype: DType
    held_nbytes: int


def ablate(
    base: Location,
    out: Location,
    *,
    direction: Sequence[Location] = (),
    direction_from: Sequence[tuple[Location, Location]] = (),
    select: Sequence[str] = (),
    drop: Sequence[str] = (),
    strength: Sequence[str | float] = (),
    side: str = "output",
    keep_norms: bool = False,
    rank: int | None = None,
    merge: bool = False,
    dtype: str = "float32",
    to: str = "peft",
    container: str | None = None,
    jobs: int = 1,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    dry_run: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Remove directions from selected weights, W − λ D Dᵀ W, as an adapter of rank = number of directions.

    >>> import loraformat, numpy as np
    >>> np.save("direction.npy", np.arange(64.0))
    >>> report = loraformat.ablate(
    ...     "fixtures/minigpt/base", "without-direction", direction=["direction.npy"], select=["out_proj"]
    ... )
    >>> [each.rank for each in report.data.weights]
    [1, 1]

    Args:
        base: folder or file of a model.
        out: folder that does not exist yet.
        direction: files of vectors, `.safetensors`, `.pt` or `.npy`, of any length except 0; "file:tensor" if a file
            has several tensors. The span of all directions is removed.
        direction_from: pairs of files of activations (samples, features); a direction is the difference of the means.
        select: patterns of the weights to change, as for `pick`.
        drop: patterns of those to leave unchanged, of these.
        strength: λ, 1 by default: a number for all weights, or "PATTERN=λ" for some; the last match wins.
        side: "output": remove D from the outputs of the weights; "input": from their inputs. The output of an embedding
            table is a row.
        keep_norms: restore the norm of every row of W; ΔW then has full rank and is approximated at `rank`.
        rank: rank of the update, with `keep_norms`.
        merge: write the changed model instead of an adapter.
        dtype, to, container: as for `resize`; `dtype` and `to` not with `merge`: a weight keeps its own.
        jobs: threads.
        memory_nbytes: memory for matrices kept between passes.
        dry_run, strict, overwrite, publication, announce, progress: as for `resize`; `strict` not with `merge`.

    Raises: UsageError (LF021): nothing is selected, a pattern matches nothing, a direction is zero, a strength is 0 or
        too large, options cannot be combined. ShapeMismatch (LF302): the length of a direction is not the number of
        outputs of a weight. NonFiniteValue (LF402). UnsupportedUpdate (LF013): a weight that an adapter cannot change.
        StorageError, ContainerError, FormatError.
    """
    require_one_of(side, SIDES, "--side")
    _check_choice(select, rank, keep_norms=keep_norms)
    if merge:
        _check_merge(dtype, to, strict=strict)
    uri, known_dtype = uri_of(base), dtype_of(dtype)
    target = formats.writable(to)
    basis = span_of(directions_of(direction, direction_from))
    model = open_model(uri)
    layouts = _layouts(model, select, drop, merged=merge)
    strengths = _strengths(strength, tuple(layouts))
    wanted = _Wanted(
        basis=basis,
        side=side,
        rank=rank,
        dtype=known_dtype,
        held_nbytes=memory_nbytes // max(1, jobs),
    )
    _check(layouts, model, wanted)

    def one(name: str) -> tuple[LowRank | None, FactorChange]:
        return _ablated(name, layouts[name], model, wanted, strengths[name])

    updates: dict[str, tuple[Update, ...]] = {}
    changes = []
    for name, (update, change) in zip(layouts, open_engine(jobs).map(one, list(layouts)), strict=True):
        changes.append(change)
        if update is not None:
            updates[name] = (update,)
    if not updates:
        raise AdapterRefused("the selected weights have no component along the directions", where="ablate")
    config = config_of(config_for(uri, model, layouts.values()), updates, is_fresh=True)
    adapter = Adapter(config=config, updates=updates)
    findings = tuple(doubts(model))
    if merge:
        run = _Merge(model, uri, uri_of(out), Resources(jobs=jobs), announce, progress, publication)
        return _merged(run, adapter, container, findings, dry_run=dry_run, overwrite=overwrite)
    result = FactorResult(
        method=_words(wanted, strengths),
        target=target.NAME,
        adapters=(),
        models=(uri,),
        weights=tuple(changes),
        left_out=tuple(each.weight for each in changes if not each.rank),
        bytes_before=sum(nbytes_of(model.weights[name]) for name in layouts),
    )
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
    origin = origin_of_models({uri: model}, findings)
    return write(adapter, together(result), origin, uri_of(out), job="ablate", base=model, options=options)


def _check_choice(select: Sequence[str], rank: int | None, *, keep_norms: bool) -> None:
    """Raises: UsageError (LF021): no weight is selected, or a rank is missing or has no use."""
    if not select:
        raise UsageError("no weight is selected", where="--select", hint="for example --select '*.o_proj'")
    if keep_norms is (rank is None):
        text = "restores the norm of every row by a full-rank update, so it needs the rank to keep"
        if not keep_norms:
            text = "the rank is the number of directions; --rank needs --keep-norms"
        raise UsageError(text, where="--keep-norms" if keep_norms else "--rank", hint="for example --rank 8")
    checked(RankRule(rank=rank))


def _check_merge(dtype: str, to: str, *, strict: bool) -> None:
    """Raises: UsageError (LF021): an option of adapters, where a model is written."""
    text = "applies to an adapter, but --merge writes a model, whose weights keep their dtype and format"
    for option, is_given in (("--dtype", dtype != "float32"), ("--to", to != "peft"), ("--strict", strict)):
        if is_given:
            raise UsageError(text, where=option, hint=f"leave {option} out")


def _layouts(model: Checkpoint, select: Sequence[str], drop: Sequence[str], *, merged: bool) -> dict[str, Layout]:
    """The selected weights. Raises: UnsupportedUpdate (LF013): one of them is a weight that no adapter changes."""
    weights = [name for name, tensor in model.tensors.items() if tensor.dtype.is_floating and len(tensor.shape) > 1]
    found: dict[str, Layout] = {}
    for name in chosen_of(sorted(weights), select, drop, "the model"):
        shape = model.tensors[name].shape
        layout = layout_of(name, shape, model.config, merged=merged)
        if layout is None:
            text = f"{show(name, 200)}: an adapter cannot change a tensor of this name and shape"
            hint = "use --drop to leave it out"
            if layout_of(name, shape, model.config, merged=True) is not None:
                hint += "; PEFT refuses an adapter of it in this model, --merge writes the model"
            raise UnsupportedUpdate(text, where="--select", hint=hint)
        found[name] = layout
    if not found:
        raise UsageError("--drop leaves nothing selected", where="--drop")
    return found


def _strengths(given: Sequence[str | float], weights: Sequence[str]) -> dict[str, float]:
    """The strength of each weight. Raises: UsageError (LF021)."""
    found = dict.fromkeys(weights, 1.0)
    for each in given:
        text = str(each)
        number, chosen = number_of(text), set(weights)
        if number is None:
            pattern, _, tail = text.rpartition("=")
            number = number_of(tail)
            if not pattern or number is None:
                text = f"{show(text, 100)}: expected a number, or PATTERN=NUMBER"
                raise UsageError(text, where="--strength", hint="for example 'layers=10-20=0.7'")
            chosen = hits_of(pattern, weights, "--strength", "the selection")
        if abs(number) > _LARGEST_STRENGTH:
            text = f"expected a strength of at most {_LARGEST_STRENGTH:g}, found {number:g}"
            raise UsageError(text, where="--strength", hint=_WHOLE)
        found.update(dict.fromkeys(chosen, number))
    if not any(found.values()):
        raise UsageError("a strength of 0 changes nothing", where="--strength", hint=_WHOLE)
    return found


def _check(layouts: Mapping[str, Layout], model: Checkpoint, wanted: _Wanted) -> None:
    """Raises: ShapeMismatch (LF302), UnsupportedUpdate (LF013): the directions are not over that side of a weight."""
    features = wanted.basis.shape[0]
    sides = {name: _sides(name, layout, model, wanted.side) for name, layout in layouts.items()}
    unfit = [name for name, (length, _) in sides.items() if length != features]
    if not unfit:
        return
    length, other = sides[unfit[0]]
    hint = "do the directions belong to this model?"
    if len(unfit) < len(sides):
        fit = {module_of(name).rpartition(".")[2] for name in sides.keys() - set(unfit)}
        kinds = sorted({module_of(name).rpartition(".")[2] for name in unfit})
        # A name that others have too, which fit, is dropped in full.
        drops = [each for each in kinds if each not in fit] or [module_of(unfit[0])]
        hint = " ".join(f"--drop {each}" for each in drops[:_MOST_DROPS])
    elif other == features:
        hint = f"it has as many on the other side: --side {'input' if wanted.side == 'output' else 'output'}"
    which = "outputs" if wanted.side == "output" else "inputs"
    text = f"{unfit[0]} has {length} {which}, but the direction has {features} features"
    raise ShapeMismatch(text, where="ablate", hint=hint)


def _sides(name: str, layout: Layout, model: Checkpoint, side: str) -> tuple[int, int]:
    """The length of a weight over the wanted side, and over the other.

    Raises: UnsupportedUpdate (LF013): it is the input of a kernel.
    """
    out, cols, *kernel = model.tensors[name].shape
    if layout.is_transposed:
        out, cols = cols, out
    if _is_over_rows(layout, side):
        return out, cols
    if any(size != 1 for size in kernel):
        text = f"{name}: the input of a convolution with a kernel of {kernel} is not a vector"
        raise UnsupportedUpdate(text, where="--side input")
    return cols, out


def _is_over_rows(layout: Layout, side: str) -> bool:
    """Whether directions are over the rows of (out, in): a table of embeddings writes its rows."""
    return (side == "output") is not layout.form.is_embedding


def _ablated(
    name: str, layout: Layout, model: Checkpoint, wanted: _Wanted, strength: float
) -> tuple[LowRank | None, FactorChange]:
    """The update of one weight, None where it would change nothing, and its record."""
    remove = removed_from_output if _is_over_rows(layout, wanted.side) else removed_from_input
    source = in_linear_orientation(Stored(model.weights[name]), is_transposed=layout.is_transposed)
    _require_finite(name, source)
    count = wanted.basis.shape[1]
    if wanted.rank is not None:
        removal = remove(UnitRows(source), wanted.basis, strength)
        rule = RankRule(rank=wanted.rank)
        found = leading(NormKeeping(source, removal), rule, held_nbytes=wanted.held_nbytes)
        rank = rule.least(found)
        if not rank:
            return None, FactorChange(weight=name, rank_before=min(source.shape), rank=0, norm=found.norm)
        return low_rank_of(name, [found], rank, min(source.shape), layout.form, wanted.dtype)
    change = remove(source, wanted.basis, strength)
    norm = norm_of(change)
    if not norm:
        return None, FactorChange(weight=name, rank_before=count, rank=0, norm=0.0)
    written, error = stored(change, wanted.dtype)
    update = LowRank(
        tensor_of(written.left, wanted.dtype),
        tensor_of(written.right, wanted.dtype),
        1.0,
        kernel=layout.form.kernel,
        is_embedding=layout.form.is_embedding,
    )
    values = singular_values(change)
    return update, FactorChange(
        weight=name,
        rank_before=count,
        rank=count,
        norm=norm,
        spectral_norm=None if values is None else float(values[0]),
        error=error / norm,
        optimum=0.0,
        energy=1.0,
    )


def _require_finite(name: str, source: RowBlocks) -> None:
    import numpy as np

    for start, stop in places(source.shape[0]):
        if not np.isfinite(source.block(start, stop)).all():
            raise NonFiniteValue("the weight holds NaN or infinity", where=name)


def _words(wanted: _Wanted, strengths: Mapping[str, float]) -> str:
    count = wanted.basis.shape[1]
    words = [f"{count} direction{'s' if count > 1 else ''}", f"{wanted.side} side"]
    values = sorted(set(strengths.values()))
    if values != [1.0]:
        words.append(f"strength {values[0]:g}" + (f" to {values[-1]:g}" if len(values) > 1 else ""))
    if wanted.rank is not None:
        words.append(f"row norms kept, rank {wanted.rank}")
    return ", ".join(words)


@dataclass(frozen=True, slots=True)
class _Merge:
    """Where and how a change is merged."""

    model: Checkpoint
    uri: str
    out: str
    limits: Resources
    announce: Callable[[tuple[Finding, ...]], None] | None
    progress: Callable[[int, int], None] | None
    publication: Publication | None


def _merged(
    run: _Merge,
    adapter: Adapter,
    container: str | None,
    findings: tuple[Finding, ...],
    *,
    dry_run: bool,
    overwrite: bool,
) -> Report:
    """The model with an adapter merged into it that is in memory alone."""
    store = MemoryStore(uri="directions")
    save_bundle(formats.get("peft").write(adapter), store)
    opened = replace(read_bundle(bundle_of_store(store, store.uri), format="peft"), uri="directions")
    source = adapter_source(opened, Assumptions(), 1.0, whole=False)
    options = Options(container, None, Arithmetic(), None, None, None)
    prepared = planned(run.model, [opened], [source], options, findings)
    if run.announce is not None:
        run.announce(prepared.findings)
    if dry_run:
        check_place(prepared.plan, run.out, (run.uri,), overwrite=overwrite)
        return replace(report_of(prepared, run.uri), job="ablate")
    met: list[Finding] = []

    def meet(more: tuple[Finding, ...]) -> None:
        met.extend(more)
        if run.announce is not None:
            run.announce(more)

    outcome = write_model(
        prepared,
        run.out,
        run.limits,
        Trust(),
        (run.uri,),
        meet,
        overwrite=overwrite,
        progress=run.progress,
        publication=run.publication,
    )
    prepared = replace(prepared, findings=(*prepared.findings, *met))
    return replace(report_of(prepared, run.uri, run.out, outcome, Trust().verify), job="ablate")
