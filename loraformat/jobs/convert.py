"""convert: an adapter in another format."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from loraformat import formats, rules
from loraformat.diagnostics import Finding
from loraformat.formats.base import WriteOptions
from loraformat.formats.repairs import mended
from loraformat.io import refuse_losses, save_adapter
from loraformat.jobs.subject import Assumptions, open_base, open_subject, with_alpha
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results import ConvertResult
from loraformat.model.summary import summarize
from loraformat.report import Report


def convert(
    source: str,
    out: str,
    *,
    to: str,
    format: str | None = None,  # noqa: A002
    base: str | None = None,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    container: str | None = None,
    strict: bool = False,
    force: bool = False,
    overwrite: bool = False,
    announce: Callable[[tuple[Finding, ...]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write the adapter at `source` in another format (or in its own, in clean form) into the new folder `out`.

    Args:
        source: folder or file.
        out: folder that does not exist yet.
        to: name of the format to write.
        format: name of the format to read, to skip detection.
        base: the base, where names, shapes or tied tables are decided by it.
        alpha, assumptions: what the files do not say; a contradiction is an error.
        container: "safetensors" or "torch", where the format leaves the choice.
        strict: refuse where anything is lost.
        force: let forgivable errors pass as warnings (`rules.refuse`).
        overwrite: replace an existing folder.
        announce: called with warnings and losses before anything is written.
        progress: called with (bytes done, bytes in all).

    Raises: AdapterRefused where the adapter has errors or cannot be expressed; StorageError,
        ContainerError, FormatError.
    """
    checkpoint = open_base(base)
    target, options = formats.get(to), WriteOptions(container=container)
    opened, found = open_subject(source, base=checkpoint, assumptions=with_alpha(alpha, assumptions), format=format)
    findings = rules.refuse(mended(found), source, force=force)
    adapter = _with_ties(opened.adapter, checkpoint)
    losses = tuple(target.losses(adapter, options))
    if announce is not None:
        announce((*findings, *losses))
    refuse_losses(losses, to, strict=strict)
    inputs = [path for path in (source, base) if path is not None]
    files = save_adapter(
        adapter, out, to=to, container=container, overwrite=overwrite, inputs=inputs, progress=progress
    )
    return Report(
        job="convert",
        subject=source,
        format=opened.format.NAME,
        because=opened.because,
        summary=summarize(adapter),
        data=ConvertResult(
            source=opened.format.NAME,
            target=target.NAME,
            weights=len(adapter.updates),
            bytes_written=sum(os.path.getsize(os.path.join(out, name)) for name in files),
            files=tuple(sorted(files)),
        ),
        findings=(*findings, *losses),
        written=tuple(os.path.join(out, name) for name in sorted(files)),
    )


def _with_ties(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """The adapter, knowing which of its tables are tied where the source does not say and the base does."""
    if base is None or adapter.config.tied is not None:
        return adapter
    from loraformat.matching import ties_of

    ties = tuple(tie.names for tie in ties_of(base, adapter.updates))
    return replace(adapter, config=replace(adapter.config, tied=ties))
