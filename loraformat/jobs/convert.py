"""convert: an adapter in another format, or repaired in its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from loraformat import formats, rules
from loraformat.algebra.rank_rules import RankRule
from loraformat.containers import open_checkpoint, sources_of
from loraformat.diagnostics import Finding, FindingLocation, show
from loraformat.errors import ConfigError, LoraFormatError, UsageError
from loraformat.formats import native
from loraformat.formats.kit.base import Format, WriteOptions
from loraformat.formats.kit.losses import dropped_metadata
from loraformat.formats.kit.normalize import cast, stripped, uniform
from loraformat.formats.kit.repairs import mended
from loraformat.formats.peft.config.versions import OLDEST, Version, text_of
from loraformat.io import Opened, hints_of, open_files, refuse_losses, write_adapter
from loraformat.jobs.algebra.options import checked
from loraformat.jobs.algebra.other_tuners import as_lora
from loraformat.jobs.card.escaping import code
from loraformat.jobs.card.facts import Origin, fields_of_card, name_of
from loraformat.jobs.card.publish import publishing_of, write_card
from loraformat.jobs.inputs.subject import open_base, subject_of
from loraformat.jobs.inputs.tensor_names import Renaming, proposed, renamed
from loraformat.jobs.measure import roundtrip
from loraformat.jobs.repair import mend
from loraformat.merger.plan.findings import kept_private
from loraformat.model.adapter import Adapter
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.bundle import Bundle
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.floats import ROUNDOFF
from loraformat.model.results.verbs import ConvertResult, RenamedTensor, RoundTrip
from loraformat.model.summary import summarize
from loraformat.model.tensors import DType
from loraformat.model.updates import tensors
from loraformat.naming.llama_cpp import is_tensor_name
from loraformat.report import Report
from loraformat.storage import Location, Publication, check_output, is_restricted, permissions_for, uri_of, uri_or_none

# Findings about what the source calls its base, which `base_model` replaces.
_ABOUT_THE_NAME = ("LF105", "LF501")
DTYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """How the values of the output are to be; see `convert`."""

    dtype: str | None
    is_plain: bool
    is_stripped: bool


def convert(
    source: Location,
    out: Location,
    *,
    to: str,
    format: str | None = None,  # noqa: A002
    base: Location | None = None,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    base_model: str | None = None,
    container: str | None = None,
    dtype: str | None = None,
    plain: bool = False,
    peft_version: str | None = None,
    maps: Sequence[tuple[str, str]] = (),
    modelfile: str = "",
    strip_metadata: bool = False,
    to_lora: bool = False,
    rank: int | None = None,
    error: float | None = None,
    check_roundtrip: bool = False,
    partial: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    force: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    announce_names: Callable[[tuple[RenamedTensor, ...], tuple[str, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Convert the adapter at `source` to another format (or repair it in its own) into the new folder `out`.

    >>> import loraformat
    >>> report = loraformat.convert("fixtures/minigpt/lora_adapter", "as-peft", to="peft", alpha=1.0)
    >>> report.data.files
    ('adapter_config.json', 'adapter_model.safetensors', 'tokenizer.json')

    Args:
        source: folder or file.
        out: folder that does not exist yet.
        to: name of the format to write.
        format: name of the format to read, to skip detection.
        base: the base, if names, shapes, copies or tied tables depend on it.
        alpha, assumptions: what the files do not state; contradicting them is an error.
        base_model: "NAME" or "NAME@REVISION" of the base, written instead of the source's.
        container: "safetensors" or "torch", if the format allows both.
        dtype: "float32", "float16" or "bfloat16" for all values; None keeps them.
        plain: fold rsLoRA and per-module patterns into one rank and one alpha.
        peft_version: the oldest PEFT that must read the output and compute the same, such as "0.10".
        maps: pairs of (regular expression, replacement) for tensor names, applied before detecting the format.
        modelfile: name of the base in Ollama; writes a Modelfile next to a GGUF adapter.
        strip_metadata: leave out free-form settings, other files and local paths.
        to_lora: write updates of other tuners as LoRA: exactly if they are low-rank, otherwise approximated by SVD.
        rank, error: with `to_lora`, the rank of the approximation, or the largest ‖ΔW − written‖ / ‖ΔW‖; by default
            everything above rounding is kept.
        check_roundtrip: read the output back and compare every update.
        partial: leave out the tensors of an image adapter that loraformat cannot interpret, and list them.
        dry_run: report; write nothing.
        strict: stop if anything would be lost.
        force: downgrade forgivable errors to warnings (`rules.refuse`).
        overwrite: replace an existing folder.
        publication: how an output is uploaded to the Hub.
        announce: called with repairs, warnings and losses before anything is written.
        announce_names: called in a dry run of a refused adapter, with the names after `maps` and the patterns that
            match none.
        progress: called with (bytes done, bytes in all).

    Raises: AdapterRefused: the adapter has errors or cannot be expressed; RoundTripFailed; StorageError,
        ContainerError, FormatError.
    """
    source, out, base = uri_of(source), uri_of(out), uri_or_none(base)
    target, options = formats.writable(to), _write_options(to, container, peft_version, modelfile)
    checkpoint = open_base(base)
    options = replace(options, base=hints_of(Assumptions(), checkpoint))
    known = with_alpha(alpha, assumptions)
    name = None if base_model is None else base_model_of(base_model)
    bundle, renaming = renamed(open_files(source, format=format), maps)
    if renaming.idle and not dry_run:
        raise UsageError(f"no tensor name matches {show(renaming.idle[0], 200)}", where="--map", hint=_SEE_NAMES)
    with _names_if_refused(renaming, announce_names if dry_run else None):
        opened, found = subject_of(bundle, base=checkpoint, assumptions=known, format=format, partial=partial)
        if name is not None:
            found = tuple(each for each in found if each.code not in _ABOUT_THE_NAME)
        named = _with_names(checkpoint, to)
        read, repairs = mend(_in_names_for(to, opened, checkpoint), named, to)
        findings: tuple[Finding, ...] = (*rules.refuse(_settled(found, repairs), source, force=force), *repairs)
    read = _with_ties(read, named) if to == native.NAME else read
    read, approximated = _as_lora(read, source, checkpoint, to_lora=to_lora, rank=rank, error=error)
    adapter, changes = _prepared(read, _Wanted(dtype=dtype, is_plain=plain, is_stripped=strip_metadata))
    if name is not None:
        adapter, replaced = _with_base_model(adapter, *name)
        changes = (*changes, *replaced)
    losses = (*approximated, *changes, *target.losses(adapter, options))
    permissions = permissions_for(sources_of(opened.bundle), out)
    if is_restricted(permissions) and not dry_run:
        findings = (*findings, kept_private(FindingLocation(subject=out), permissions))
    if announce is not None:
        announce((*findings, *losses))
    refuse_losses(losses, to, strict=strict)
    roundtrips: list[RoundTrip] = []
    met: list[Finding] = []

    def meet(several: tuple[Finding, ...]) -> None:
        met.extend(several)
        if announce is not None:
            announce(several)

    def check(written: Bundle) -> None:
        bound = _roundoff(read, adapter, losses)
        hints = hints_of(known, named)
        roundtrips.append(roundtrip.compare(written, read, to=to, hints=hints, roundoff=bound))

    sizes: dict[str, int] = {}
    inputs = [path for path in (source, base) if path is not None]
    if dry_run:
        files = tuple(target.write(adapter, options).files)
        check_output(out, overwrite=overwrite, inputs=inputs, names=files)
    else:
        publishing = publishing_of(publication, out, meet)
        sizes = write_adapter(
            adapter,
            out,
            to=to,
            container=container,
            peft_version=options.peft_version,
            base=checkpoint,
            modelfile=options.modelfile,
            overwrite=overwrite,
            inputs=inputs,
            permissions=permissions,
            progress=progress,
            check=check if check_roundtrip else None,
            publishing=publishing,
            finish=lambda output: write_card(output, out, publishing, lambda: _card(source, checkpoint)),
        )
        files = tuple(sizes)
    paths = () if dry_run else tuple(os.path.join(out, name) for name in sorted(files))
    return Report(
        job="convert",
        subject=source,
        format=opened.format.NAME,
        reason=opened.reason,
        summary=summarize(adapter),
        data=ConvertResult(
            source=opened.format.NAME,
            target=target.NAME,
            weights=len(adapter.updates),
            bytes_written=sum(sizes.values()),
            files=tuple(sorted(files)),
            is_dry_run=dry_run,
            roundtrip=roundtrips[0] if roundtrips else None,
            renamed=renaming.table,
            idle_maps=renaming.idle,
        ),
        findings=(*findings, *losses, *met),
        written=paths,
    )


def _card(source: str, base: Checkpoint | None) -> Origin:
    """What a card says of an adapter in another format."""
    return Origin(
        base="" if base is None else base.uri,
        base_fields=fields_of_card(None if base is None else base.store),
        made=f"converted from {code(name_of(source))}",
    )


@contextmanager
def _names_if_refused(renaming: Renaming, announce: Callable[..., None] | None) -> Iterator[None]:
    """A block whose errors come after the names of the tensors."""
    try:
        yield
    except LoraFormatError:
        if announce is not None:
            announce(renaming.table, renaming.idle)
        raise


def _with_names(base: Checkpoint | None, to: str) -> Checkpoint | None:
    """The base, where its names are those of the target: a GGUF file has llama.cpp's."""
    return None if base is not None and base.settings and to != "gguf" else base


def _in_names_for(to: str, opened: Opened, base: Checkpoint | None) -> Adapter:
    """The adapter in the names that a format has: llama.cpp's and its order of rows are GGUF's alone.

    Raises: ConfigError (LF103): what the weights are called elsewhere only a base in the names of transformers tells.
    """
    if to == "gguf":
        return opened.adapter
    adapter = opened.adapter.origin or opened.adapter
    strange = next((name for name in adapter.updates if is_tensor_name(name)), None)
    if opened.format.NAME == "gguf" and strange is not None:
        why = "the base is a GGUF file" if base is not None else "no base is given"
        raise ConfigError(
            f"{strange}: weights have llama.cpp's names and row order, and {why}",
            where=opened.uri,
            hint="pass the folder of the base with --base: its config.json is needed to translate them",
        )
    return adapter


_SEE_NAMES = "use --dry-run to list the new tensor names"


def propose_map(
    source: Location,
    base: Location,
    *,
    format: str | None = None,  # noqa: A002
    maps: Sequence[tuple[str, str]] = (),
) -> Report:
    """Suggest `maps` for `convert` that turn the names of an adapter into those of a base; nothing is written.

    >>> import loraformat
    >>> report = loraformat.propose_map("fixtures/good/dump/tiny-llama", "fixtures/bad/LF301-absent-module/base")
    >>> [each.after for each in report.data.proposed]
    ['', '', '', '']

    A map has an `after` if shapes and layer numbers leave one choice; otherwise its `candidates` list what fits.

    Args:
        source: folder or file of the adapter.
        base: the base with the wanted names.
        format: name of a format, to skip detection.
        maps: applied first, as in `convert`, so that factors are recognized by the ends of their names.

    Raises: FormatError (LF012): no factors are recognized; StorageError, ContainerError.
    """
    source, base = uri_of(source), uri_of(base)
    checkpoint = open_checkpoint(base)
    return Report(
        job="convert",
        subject=source,
        format="",
        data=ConvertResult(
            source="",
            target="",
            weights=0,
            bytes_written=0,
            files=(),
            is_dry_run=True,
            proposed=proposed(renamed(open_files(source, format=format), maps)[0], checkpoint),
        ),
    )


def _as_lora(
    adapter: Adapter, uri: str, base: Checkpoint | None, *, to_lora: bool, rank: int | None, error: float | None
) -> tuple[Adapter, tuple[Finding, ...]]:
    """See `as_lora`. Raises: UsageError (LF021): a rule of ranks without `to_lora`, or outside its range."""
    if not to_lora:
        if rank is not None or error is not None:
            raise UsageError("--rank and --error need --to-lora", where="--rank" if rank is not None else "--error")
        return adapter, ()
    checked(RankRule(rank=rank, error=error))
    return as_lora(adapter, uri, base, rank=rank, error=error)


def _write_options(to: str, container: str | None, peft_version: str | None, modelfile: str) -> WriteOptions:
    """Raises: UsageError (LF021): an option that the format does not have."""
    target: Format = formats.writable(to)
    if container is not None and container not in target.CONTAINERS:
        raise UsageError(f"{to} has only the container {target.CONTAINERS[0]}", where="command line")
    version = None if peft_version is None else _version(peft_version)
    if version is not None and to != "peft":
        raise UsageError("--peft-version needs --to peft", where="command line")
    if modelfile and to != "gguf":
        raise UsageError("--modelfile needs --to gguf", where="command line")
    if modelfile and not (modelfile.isprintable() and modelfile.strip() == modelfile):
        raise UsageError(f'expected a name without line breaks, found "{show(modelfile, 60)}"', where="--modelfile")
    return WriteOptions(container=container, peft_version=version, modelfile=modelfile)


def base_model_of(text: str) -> tuple[str, str | None]:
    """(name, revision) of `NAME@REVISION`. Raises: UsageError (LF021)."""
    name, at, revision = text.removeprefix("hf://").partition("@")
    if not name.strip() or (at and not revision.strip()) or not text.isprintable():
        raise UsageError(
            f'expected NAME or NAME@REVISION, found "{show(text, 60)}"',
            where="--base-model",
            hint="for example meta-llama/Llama-3.1-8B@main",
        )
    return name, revision or None


def _with_base_model(adapter: Adapter, name: str, revision: str | None) -> tuple[Adapter, tuple[Finding, ...]]:
    """The adapter with the name of its base, and what its source called it, where that was something else."""
    before = adapter.config
    after = replace(before, base_model=name, base_revision=revision)
    old = [
        value
        for value, new in ((before.base_model, name), (before.base_revision, revision))
        if value not in (None, new)
    ]
    losses = (dropped_metadata("", [f"the base's former name {'@'.join(map(str, old))}"]),) if old else ()
    return replace(adapter, config=after), losses


def _version(text: str) -> Version:
    """(0, 10) for "0.10" or "0.10.0". Raises: UsageError (LF021)."""
    parts = text.split(".")
    if not (2 <= len(parts) <= 3 and all(part.isascii() and part.isdigit() and len(part) < 4 for part in parts)):
        raise UsageError(f"expected a version such as 0.10, found {show(text, 40)}", where="--peft-version")
    version = (int(parts[0]), int(parts[1]))
    if version < OLDEST:
        raise UsageError(f"expected {text_of(OLDEST)} or later, found {text}", where="--peft-version")
    return version


def _settled(found: tuple[Finding, ...], repairs: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Findings without those that the repairs have answered: names that the base did not have, before they changed."""
    answered = ("LF301", "LF304") if any(each.code == "LF905" for each in repairs) else ()
    return tuple(each for each in mended(found) if each.code not in answered)


def _prepared(adapter: Adapter, wanted: _Wanted) -> tuple[Adapter, tuple[Finding, ...]]:
    """The adapter as the options want it, and what that costs. Folding comes before rounding, so each value is rounded
    at most twice.
    """
    losses: list[Finding] = []
    if wanted.is_stripped:
        adapter, found = stripped(adapter)
        losses.extend(found)
    if wanted.is_plain:
        adapter, found = uniform(adapter)
        losses.extend(found)
    if wanted.dtype is not None:
        if wanted.dtype not in DTYPES:
            raise UsageError(f"expected one of {', '.join(DTYPES)}, found {wanted.dtype}", where="--dtype")
        adapter, found = cast(adapter, DTYPES[wanted.dtype])
        losses.extend(found)
    return adapter, tuple(losses)


def _roundoff(before: Adapter, after: Adapter, losses: tuple[Finding, ...]) -> float:
    """How far a value may be off: once for folding, once for another dtype."""
    folded = any(loss.code == "LF701" for loss in losses)
    rounded = any(loss.code == "LF704" for loss in losses)
    return (_coarsest(before) if folded else 0.0) + (_coarsest(after) if rounded or folded else 0.0)


def _coarsest(adapter: Adapter) -> float:
    every = (tensor for chain in adapter.updates.values() for update in chain for _, tensor in tensors(update))
    return max((ROUNDOFF.get(tensor.dtype, 0.0) for tensor in every), default=0.0)


def _with_ties(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """The adapter, knowing which of its tables are tied where the source does not say and the base does.

    For a format that has a place for it: without one, what the base says anyhow is not lost.
    """
    if base is None or adapter.config.tied is not None or adapter.config.pipeline is not None:
        return adapter
    from loraformat.matching import ties_of

    ties = tuple(tie.names for tie in ties_of(base, adapter.updates))
    return replace(adapter, config=replace(adapter.config, tied=ties))
