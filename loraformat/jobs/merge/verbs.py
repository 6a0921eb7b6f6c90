"""merge and dequantize: base and adapters to a full checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from loraformat.algebra.retention import LEAST_SHARE
from loraformat.containers import CONTAINERS, open_checkpoint
from loraformat.containers.quantized.as_trained import Quantizer
from loraformat.diagnostics import Finding
from loraformat.errors import UsageError, require_one_of
from loraformat.jobs.inputs.strength import with_strength
from loraformat.jobs.inputs.subject import refuse_exchanged
from loraformat.jobs.merge.distribution import Engine, distribution, resources
from loraformat.jobs.merge.pipeline import PipelineRun, merge_pipeline
from loraformat.jobs.merge.prepare import Options, check_place, prepare, report_of, write
from loraformat.merger import COMBINATIONS, Arithmetic, Trust
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.report import Report
from loraformat.storage import Location, Publication, check_target, listed, uri_of

DEFAULT_MEMORY_NBYTES = 64 << 20
_DTYPES = ("float32", "bfloat16", "float16")


def merge(
    base: Location,
    adapters: Sequence[Location],
    out: Location,
    *,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    container: str | None = None,
    jobs: int = 1,
    device: str = "cpu",
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    dtype: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    max_shard_nbytes: int | None = None,
    dequantize: bool = False,
    keep_quantized: bool = False,
    requantize: bool = False,
    least_kept: float = LEAST_SHARE,
    as_trained: str | None = None,
    method: str | None = None,
    density: float | None = None,
    sign: str = "total",
    component_strengths: Mapping[str, float] | None = None,
    verify: str = "sample",
    digests: str = "blake3",
    resume: bool = False,
    engine: Engine = "threads",
    rank: int | None = None,
    world: int | None = None,
    finish: bool = False,
    dry_run: bool = False,
    force: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Merge `adapters` into `base`, written to the new folder `out`: W + Σ s·BA, rounded once.

    >>> import loraformat
    >>> adapters = ["fixtures/minigpt/lora_adapter"]
    >>> report = loraformat.merge("fixtures/minigpt/base", adapters, "merged", alpha=1.0)
    >>> report.data.tensors_touched, report.data.tensors_copied, round(report.data.retained, 3)
    (10, 28, 1.0)

    Planned from headers, executed in windows of rows; neither `jobs` nor `memory_nbytes` changes a byte.

    Args:
        base: folder with safetensors, `.bin` shards or one `.pt` file, or one weight file.
        adapters: folders or files, applied in this order; each may end in "=STRENGTH" (see `with_strength`).
        out: folder that does not exist yet.
        alpha: for every adapter that does not state it.
        assumptions: what else the adapters' files do not state.
        container: "safetensors" or "torch" for the weight files; None keeps the base's.
        jobs: threads.
        device: "cpu", "cuda" or "cuda:N"; on a CUDA device sums may differ from the CPU's in the last bit.
        memory_nbytes: memory for windows; Python and the adapters need more on top.
        dtype: "float32", "bfloat16" or "float16" for every floating-point tensor of the output; None keeps the base's.
        rounding: "nearest", or "stochastic" for 16-bit outputs.
        seed: for stochastic rounding and dare; the same seed gives the same bytes.
        max_shard_nbytes: most bytes of tensors in a safetensors file of the output; None keeps the base's files.
        dequantize: dequantize all weights of a quantized base.
        keep_quantized: dequantize only the weights that change, and keep the quantized codes of all others.
        requantize: quantize the changed weights again in the base's scheme, with new scales: NF4, FP4 and INT8 of
            bitsandbytes, block FP8. Part of the update is lost.
        least_kept: the share of the update that must survive `requantize`; otherwise nothing is written.
        as_trained: "nf4", "fp4" or "int8", with ",double" and ",block=N" for the bitsandbytes settings with which the
            model was loaded for training: its linear layers are quantized and dequantized before merging.
        method: how to combine the updates of several adapters: "ties", "dare" or "dare-ties", see `combine`; None for
            their sum. Ranks are not reduced.
        density: share of the values of each update to keep; needed with a method.
        sign: for ties: elect signs by "total", the sum of the kept values, or by "frequency", the majority.
        component_strengths: component of a pipeline, or of a checkpoint of an image model in one file → factor for its
            updates, in addition to the adapter's own strength.
        verify: "none", "sample" or "full": how much of the output is compared before it is moved into place.
        digests: "blake3" (of every byte, into loraformat.digests.json), "sha256" (also of whole files, as on the Hub),
            or "none" (only of computed weights).
        resume: continue an interrupted run to `out`, and keep finished files if a signal ends this one.
        engine: what writes the weight files: "threads" of this process; "ray" or "ray=HOST:PORT", workers of a Ray
            cluster; a `concurrent.futures.Executor`; or an object whose `run` takes tasks, see docs/scale.md.
        rank, world: compute share `rank` (from 0) of `world` shares of the weight files, without publishing them.
        finish: after all ranks, with the same inputs and options: check that all shares are complete, and publish
            `out`.
        dry_run: plan and report; write nothing.
        force: downgrade forgivable errors to warnings (`rules.refuse`).
        overwrite: replace an existing folder.
        publication: how an output is uploaded to the Hub.
        announce: called with findings before anything is written, and with those about what was written.
        progress: called with (bytes done, bytes in all).

    Raises: AdapterRefused, MergeError and subclasses: the result would not be right; StorageError, ContainerError,
        FormatError: something cannot be read or written. Then nothing is left of `out`.
    """
    base, adapters, out = uri_of(base), listed(adapters), uri_of(out)
    for value, allowed, argument in (
        (container, tuple(CONTAINERS), "container"),
        (dtype, _DTYPES, "dtype"),
        (rounding, ("nearest", "stochastic"), "rounding"),
        (verify, ("none", "sample", "full"), "verify"),
        (digests, ("blake3", "sha256", "none"), "digests"),
    ):
        if value is not None:
            require_one_of(value, allowed, argument)
    quantizer = Quantizer.parse(as_trained) if as_trained is not None else None
    quantized = _quantized(
        dequantize=dequantize,
        keep_quantized=keep_quantized,
        requantize=requantize,
        as_trained=quantizer is not None,
    )
    arithmetic = Arithmetic(rounding, seed, *_method(method, density, sign))
    options = Options(container, dtype, arithmetic, max_shard_nbytes, quantized, quantizer)
    _check_codes(options, least_kept)
    chosen = [with_strength(adapter) for adapter in adapters]
    refuse_exchanged(base, [uri for uri, _ in chosen])
    check_target(out, publication or Publication())
    chosen_by = distribution(engine, rank, world, finish=finish, resume=resume, dry_run=dry_run, device=device)
    limits = resources(chosen_by, jobs, device, memory_nbytes)
    known, checkpoint = with_alpha(alpha, assumptions), open_checkpoint(base)
    if checkpoint.components:
        run = PipelineRun(
            base=checkpoint,
            out=out,
            limits=limits,
            trust=Trust(verify=verify, digests=digests, resume=resume),
            distribution=chosen_by,
            overwrite=overwrite,
            announce=announce,
            progress=progress,
            strengths=component_strengths or {},
        )
        return merge_pipeline(run, chosen, known, options, force=force, dry_run=dry_run)
    strengths = component_strengths or {}
    prepared = prepare(checkpoint, chosen, known, options, strengths=strengths, force=force, whole=dry_run)
    if announce is not None:
        announce(prepared.findings)
    inputs = (base, *(uri for uri, _ in chosen))
    if dry_run:
        check_place(prepared.plan, out, inputs, overwrite=overwrite)
        return report_of(prepared, base)
    trust = Trust(verify=verify, digests=digests, resume=resume, least_kept=least_kept)
    met: list[Finding] = []

    def meet(findings: tuple[Finding, ...]) -> None:
        met.extend(findings)
        if announce is not None:
            announce(findings)

    outcome = write(
        prepared,
        out,
        limits,
        trust,
        inputs,
        meet,
        overwrite=overwrite,
        progress=progress,
        publication=publication,
        distribution=chosen_by,
    )
    prepared = replace(prepared, findings=(*prepared.findings, *met))
    report = report_of(prepared, base, out, outcome, verify, chosen_by.described(prepared.plan))
    if announce is not None:
        announce(report.findings[len(prepared.findings) :])
    return report


def dequantize(
    base: Location,
    out: Location,
    *,
    container: str | None = None,
    jobs: int = 1,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    dtype: str | None = None,
    max_shard_nbytes: int | None = None,
    verify: str = "sample",
    digests: str = "blake3",
    resume: bool = False,
    engine: Engine = "threads",
    rank: int | None = None,
    world: int | None = None,
    finish: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write a quantized base with all of its weights dense into the new folder `out`.

    >>> import loraformat
    >>> report = loraformat.dequantize("fixtures/quantized/nf4", "dense")
    >>> report.data.tensors_dequantized, report.data.tensors_copied
    (4, 4)

    Each weight has the value that the library of its scheme computes, rounded once to the dtype of the output. The
    quantization settings are removed from config.json, and files that repeat them are not copied.

    Args: as for `merge`.

    Raises: UsageError (LF021): the base is not quantized. UnsupportedUpdate (LF013): its scheme is not supported.
        Otherwise as for `merge`.
    """
    return merge(
        base,
        (),
        out,
        container=container,
        jobs=jobs,
        memory_nbytes=memory_nbytes,
        dtype=dtype,
        max_shard_nbytes=max_shard_nbytes,
        dequantize=True,
        verify=verify,
        digests=digests,
        resume=resume,
        engine=engine,
        rank=rank,
        world=world,
        finish=finish,
        dry_run=dry_run,
        overwrite=overwrite,
        publication=publication,
        announce=announce,
        progress=progress,
    )


def _quantized(*, dequantize: bool, keep_quantized: bool, requantize: bool, as_trained: bool) -> str | None:
    """What `plan_merge` calls it."""
    if dequantize + keep_quantized + requantize + as_trained > 1:
        text = "--dequantize, --keep-quantized, --requantize and --as-trained cannot be combined"
        raise UsageError(text, where="merge")
    if requantize:
        return "recoded"
    return "dense" if dequantize or as_trained else "mixed" if keep_quantized else None


def _method(method: str | None, density: float | None, sign: str) -> tuple[str, float, str]:
    """What `Arithmetic` says of a method.

    Raises: UsageError (LF021): it is not one; a density is missing, not between 0 and 1, or given without a method.
    """
    require_one_of(sign, ("total", "frequency"), "--sign")
    if method is None:
        if density is not None:
            raise UsageError("only --method ties, dare and dare-ties drop values", where="--density")
        return "", 1.0, sign
    require_one_of(method, COMBINATIONS, "--method")
    if method == "dare" and sign != "total":
        raise UsageError("dare does not elect signs", where="--sign", hint="dare-ties does")
    if density is None:
        raise UsageError(f"{method} needs the share of the values to keep", where="--density")
    if not 0 < density <= 1:
        raise UsageError(f"expected a share above 0 and up to 1, found {density:g}", where="--density")
    return method, density, sign


def _check_codes(options: Options, least_kept: float) -> None:
    """Raises: UsageError (LF021): an option that does not go with --requantize."""
    others = {
        "--container torch": options.container == "torch",
        "--dtype": options.dtype is not None,
        "--rounding stochastic": options.arithmetic.rounding == "stochastic",
        "--max-shard-size": options.max_shard_nbytes is not None,
    }
    for option, is_given in others.items():
        if is_given and options.quantized == "recoded":
            raise UsageError(
                f"{option} cannot be combined with --requantize", where="merge", hint=f"leave {option} out"
            )
    if least_kept != LEAST_SHARE and options.quantized != "recoded":
        raise UsageError("--least-kept needs --requantize", where="--least-kept")
    if not 0 <= least_kept <= 1:
        raise UsageError(f"expected a share from 0 to 1, found {least_kept:g}", where="--least-kept")
