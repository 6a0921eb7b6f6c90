"""Opening what the verbs work on: an adapter with the base that was given for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from loraformat import formats, rules
from loraformat.budget import Budget
from loraformat.containers import open_checkpoint
from loraformat.diagnostics import Finding, FindingLocation, show
from loraformat.errors import (
    AssumptionContradicted,
    ContainerError,
    FormatError,
    LoraFormatError,
    UnsupportedUpdate,
    UsageError,
)
from loraformat.formats.foreign import is_full_model
from loraformat.io import Opened, hints_of, open_files, read_bundle
from loraformat.model.adapter import Adapter
from loraformat.model.assumptions import Assumptions
from loraformat.model.bundle import Bundle
from loraformat.model.checkpoint import PIPELINE, Checkpoint
from loraformat.model.format_files import has_marker
from loraformat.model.tensors import DType
from loraformat.model.updates import tensors
from loraformat.storage import is_local


def refuse_exchanged(base: str, adapters: Sequence[str], usage: str = "merge BASE ADAPTER") -> None:
    """Refuse a model and adapters that were given in each other's place.

    Args:
        usage: the verb and its arguments in the right order.

    Raises: UsageError: the model is an adapter, and one of the adapters a full model or a pipeline.
    """
    files = _files(base)
    if files is None or PIPELINE in files.files or ("config.json" in files.files and not has_marker(files.files)):
        return  # without a look into weight files, of which a base has many
    kinds = ((uri, _kind(_files(uri))) for uri in adapters)
    model, kind = next(((uri, kind) for uri, kind in kinds if kind), ("", ""))
    if kind and _is_adapter(files):
        text = f"{show(base, 200)} is an adapter and {show(model, 200)} is {kind}: are the arguments swapped?"
        raise UsageError(text, where=usage.split(maxsplit=1)[0], hint=f"write {usage} -o OUT")


def _kind(files: Bundle | None) -> str:
    """What kind of a base the files are; "" for none."""
    if files is None:
        return ""
    return "a pipeline" if PIPELINE in files.files else "a full model" if is_full_model(files) else ""


def _is_adapter(files: Bundle) -> bool:
    if has_marker(files.files) and not files.is_single_file:
        return True
    try:
        formats.detect(files)
    except LoraFormatError:
        return False
    return not is_full_model(files)


def _files(uri: str) -> Bundle | None:
    """The files at a path; None where there are none to see, which is said where they are read."""
    try:
        return open_files(uri) if is_local(uri) else None
    except LoraFormatError:
        return None


def open_base(uri: str | None) -> Checkpoint | None:
    """The headers of a base, or None."""
    return None if uri is None else open_checkpoint(uri)


def require_real(adapter: Adapter, uri: str) -> None:
    """Raises: UnsupportedUpdate (LF013): an update holds complex numbers, whose imaginary parts would get lost."""
    for weight, chain in adapter.updates.items():
        for update in chain:
            role = next((role for role, tensor in tensors(update) if tensor.dtype is DType.C64), None)
            if role is not None:
                raise UnsupportedUpdate(
                    f"{role} holds complex numbers, which are not supported",
                    where=FindingLocation(subject=uri, tensor=weight),
                )


def open_subject(
    uri: str,
    *,
    base: Checkpoint | None,
    assumptions: Assumptions,
    format: str | None = None,  # noqa: A002
    partial: bool = False,
) -> tuple[Opened, tuple[Finding, ...]]:
    """An adapter, and everything that the quick rules and its reader found about it."""
    bundle = open_files(uri, format=format)
    return subject_of(bundle, base=base, assumptions=assumptions, format=format, partial=partial)


def _with_folder(location: FindingLocation, bundle: Bundle) -> FindingLocation:
    """A place in a file as its reader names it, with the path of the file: several adapters have files of one name."""
    if location.file not in bundle.files:
        return location
    folder = os.path.dirname(bundle.uri) if bundle.is_single_file else bundle.uri
    return replace(location, file=os.path.join(folder, location.file))


def subject_of(
    bundle: Bundle,
    *,
    base: Checkpoint | None,
    assumptions: Assumptions,
    format: str | None = None,  # noqa: A002
    partial: bool = False,
) -> tuple[Opened, tuple[Finding, ...]]:
    """As `open_subject`, for files that are open already."""
    budget = Budget()
    try:
        opened = read_bundle(bundle, format=format, hints=hints_of(assumptions, base, budget, partial=partial))
    except (ContainerError, FormatError, AssumptionContradicted) as error:
        error.location = _with_folder(error.location, bundle)
        raise
    name = opened.format.NAME
    subject = rules.Subject(bundle=opened.bundle, format=name, adapter=opened.adapter, base=base, budget=budget)
    return opened, rules.gate(subject)
