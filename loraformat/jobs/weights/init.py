"""init: an untrained adapter for a base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from loraformat import formats
from loraformat.algebra.decomposition import stored
from loraformat.algebra.factors import Product
from loraformat.algebra.norms import norm_of
from loraformat.algebra.rank_rules import RankRule
from loraformat.algebra.weights.difference import matrix_of
from loraformat.algebra.weights.first_factors import (
    DRAWN,
    PARTS,
    drawn,
    drawn_for_table,
    orthonormal,
    principal,
)
from loraformat.diagnostics import Finding, listed
from loraformat.engine import open_engine
from loraformat.errors import NonFiniteValue, ShapeMismatch, UnsupportedUpdate, UsageError, require_one_of
from loraformat.jobs.algebra.factoring import tensor_of
from loraformat.jobs.algebra.options import OutputOptions, checked, dtype_of
from loraformat.jobs.algebra.output import config_of, write
from loraformat.jobs.algebra.selection import hits_of, matching
from loraformat.jobs.weights.models import Layout, config_for, layout_of, open_model, origin_of_models, refuse_others
from loraformat.matching import is_linear, ties_of
from loraformat.model.adapter import Adapter, module_of
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.factor_changes import FactorChange, FactorResult
from loraformat.model.tensors import DType
from loraformat.model.updates import LowRank, Update
from loraformat.report import Report
from loraformat.rules import doubts
from loraformat.storage import Location, Publication, uri_of

INITS = (*DRAWN, *PARTS)
ALL_LINEAR = "all-linear"


def init(
    base: Location,
    out: Location,
    *,
    rank: int,
    alpha: float | None = None,
    target: Sequence[str] = (),
    init: str = "kaiming",
    seed: int = 0,
    dtype: str = "float32",
    to: str = "peft",
    container: str | None = None,
    jobs: int = 1,
    dry_run: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Create an untrained adapter for a base that changes nothing yet, initialized like PEFT's.

    >>> import loraformat
    >>> report = loraformat.init("fixtures/minigpt/base", "fresh", rank=4, alpha=8, target=["q_proj", "v_proj"])
    >>> change = loraformat.load_adapter("fresh").delta("blocks.0.attention.q_proj.weight")
    >>> len(report.data.weights), bool(change.any())
    (4, False)

    Args:
        base: folder or file of a model.
        out: folder that does not exist yet.
        rank: rank of every update.
        alpha: the scale is alpha / rank; by default alpha is the rank, for a scale of 1.
        target: names of modules, or patterns as for `pick`; "all-linear" for all linear layers except the output head.
        init: "kaiming" (PEFT's default) or "gaussian": A random, B zero; "orthogonal": both random, BA = 0 up to
            rounding; "pissa", "olora": a part of the weight, which PEFT subtracts from the base when it loads the
            adapter.
        seed: random seed; each random number depends only on the seed, the weight and its position.
        dtype, to, container: as for `resize`; "pissa" and "olora" need PEFT's format.
        jobs: threads.
        dry_run, strict, overwrite, publication, announce, progress: as for `resize`.

    Raises: UsageError (LF021): no target, one that matches nothing, an odd rank with "orthogonal", or an alpha of 0 or
        below. ShapeMismatch (LF302): a rank higher than that of the weights, with "pissa" and "olora".
        UnsupportedUpdate (LF013). StorageError, ContainerError, FormatError.
    """
    require_one_of(init, INITS, "--init")
    checked(RankRule(rank=rank))
    _check(init, rank, alpha, target, to)
    uri, known_dtype, form = uri_of(base), dtype_of(dtype), formats.writable(to)
    model = open_model(uri)
    layouts = _layouts(model, target)
    if init in PARTS:
        _check_parts(init, rank, model, layouts)
    scale = (float(rank) if alpha is None else alpha) / rank

    def one(name: str) -> tuple[LowRank, float]:
        return _first(name, layouts[name], model, init, rank, scale, seed, known_dtype)

    made = dict(zip(layouts, open_engine(jobs).map(one, list(layouts)), strict=True))
    updates: dict[str, tuple[Update, ...]] = {name: (update,) for name, (update, _) in made.items()}
    raw: dict[str, Json] = {
        "peft_type": "LORA",
        "auto_mapping": None,
        "inference_mode": True,
        "init_lora_weights": True if init == "kaiming" else init,
        "lora_alpha": rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "r": rank,
    }
    config = config_for(uri, model, layouts.values(), raw=raw, targets=tuple(target))
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
    result = FactorResult(
        method=f"{init}, rank {rank}, alpha {rank if alpha is None else alpha:g}"
        + (f", seed {seed}" if init in DRAWN else ""),
        target=form.NAME,
        adapters=(),
        models=(uri,),
        weights=tuple(
            FactorChange(weight=name, rank_before=rank, rank=rank, norm=0.0, error=error)
            for name, (_, error) in made.items()
        ),
    )
    adapter = Adapter(config=config_of(config, updates, is_fresh=False), updates=updates)
    origin = origin_of_models({uri: model}, doubts(model))
    return write(adapter, result, origin, uri_of(out), job="init", base=model, options=options)


def _check(init: str, rank: int, alpha: float | None, target: Sequence[str], to: str) -> None:
    """Raises: UsageError (LF021): options that do not go together."""
    if not target:
        raise UsageError("no target modules given", where="--target", hint="for example --target q_proj, or all-linear")
    if init == "orthogonal" and rank % 2:
        raise UsageError(f"orthogonal factors need an even rank, found {rank}", where="--rank")
    if alpha is not None and not 0 < alpha < math.inf:
        raise UsageError(f"expected a finite alpha above 0, found {alpha:g}", where="--alpha")
    if init in PARTS and to != "peft":
        text = f"{init} starts from a part of the weight that only PEFT subtracts from the base; {to} cannot express it"
        raise UsageError(text, where="--to")


def _layouts(model: Checkpoint, target: Sequence[str]) -> dict[str, Layout]:
    """The modules that get factors. Raises: UsageError (LF021): a target matches no module that LoRA adapts."""
    known = {
        name: layout
        for name, tensor in sorted(model.tensors.items())
        if tensor.dtype.is_floating and (layout := layout_of(name, tensor.shape, model.config)) is not None
    }
    linear = {name for name in known if is_linear(name) and len(model.tensors[name].shape) == 2}
    chosen = linear if ALL_LINEAR in target else set()
    patterns = [each for each in target if each != ALL_LINEAR]
    for pattern in patterns:
        chosen = chosen | _hits(pattern, known, model)
    if not chosen:
        raise UsageError("the base has no known linear layers", where="--target")
    return {name: layout for name, layout in known.items() if name in chosen}


def _hits(pattern: str, known: Mapping[str, Layout], model: Checkpoint) -> set[str]:
    """The weights that a target means.

    Raises: UnsupportedUpdate (LF013): all of them are weights that no adapter changes. UsageError (LF021): there is
        none, or it is tied to a table that has another name.
    """
    if not matching(pattern, tuple(known)):
        refuse_others(pattern, model, "--target")
        for tie in ties_of(model):
            tied = matching(pattern, [name for name in tie.names if name != tie.stored])
            if tied:
                text = f"{min(tied)} is tied to {tie.stored}, which is the tensor that the base stores"
                hint = f"--target {module_of(tie.stored).rpartition('.')[2]} adapts it"
                raise UsageError(text, where="--target", hint=hint)
    return hits_of(pattern, tuple(known), "--target", "the base")


def _check_parts(init: str, rank: int, model: Checkpoint, layouts: dict[str, Layout]) -> None:
    """Raises: UnsupportedUpdate (LF013), ShapeMismatch (LF302): PEFT could not begin with a part of these weights."""
    if model.quantized is not None:
        text = f"{init} subtracts a part of the weights, but this base is quantized"
        raise UnsupportedUpdate(text, where=model.uri, hint="use the model in 16 or 32 bits")
    others = [name for name, layout in layouts.items() if layout.form.is_embedding or layout.form.kernel]
    if init == "olora":
        others += [name for name, layout in layouts.items() if layout.is_transposed]
    if others:
        text = f"{init} supports only linear layers, as in PEFT: {listed(sorted(others))}"
        raise UnsupportedUpdate(text, where="--target")
    small = [name for name in layouts if min(model.tensors[name].shape) < rank]
    if small:
        shape = model.tensors[small[0]].shape
        raise ShapeMismatch(f"{small[0]}: rank {rank} is larger than a {shape} matrix allows", where="--rank")


def _first(
    name: str, layout: Layout, model: Checkpoint, init: str, rank: int, scale: float, seed: int, dtype: DType
) -> tuple[LowRank, float]:
    """The update of one weight, and what rounding its factors changes as a share of their product."""
    weight = model.weights[name]
    whole = weight.shape[0], weight.row_nbytes // weight.dtype.itemsize
    shape = whole[::-1] if layout.is_transposed else whole
    error = 0.0
    if init in PARTS:
        factors = _part(name, layout, model, init, rank, scale)
        written, change = stored(factors, dtype)
        error = change / (norm_of(factors) or 1.0)
    else:
        factors = (
            drawn_for_table(shape, rank, seed, name)
            if layout.form.is_embedding
            else drawn(init, shape, rank, seed, name)
        )
        written = stored(factors, dtype)[0]
    update = LowRank(
        tensor_of(written.left, dtype),
        tensor_of(written.right, dtype),
        scale,
        kernel=layout.form.kernel,
        is_embedding=layout.form.is_embedding,
    )
    return update, error


def _part(name: str, layout: Layout, model: Checkpoint, init: str, rank: int, scale: float) -> Product:
    """Raises: NonFiniteValue (LF402). UnsupportedUpdate (LF013): the part is not determined."""
    import numpy as np

    weight = model.weights[name]
    values = matrix_of(weight.read(0, weight.rows))
    if not np.isfinite(values).all():
        raise NonFiniteValue("the weight holds NaN or infinity", where=name)
    if init == "olora":
        return orthonormal(values, rank)
    try:
        return principal(values.T if layout.is_transposed else values, rank, scale)
    except ValueError as equal:
        text = f"{name}: {equal} in float32, so the part of the weight to use is ambiguous"
        raise UnsupportedUpdate(text, where="--rank", hint="choose another rank") from None
