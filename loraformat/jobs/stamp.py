"""stamp: records in an adapter which base it was trained on."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import replace

from loraformat.containers import open_checkpoint, save_bundle
from loraformat.diagnostics import Finding, Severity
from loraformat.errors import StorageError, UnsupportedUpdate, UsageError
from loraformat.formats.kit.folder import json_file
from loraformat.io import Opened
from loraformat.jobs.card.facts import Origin, fields_of_card
from loraformat.jobs.card.publish import publishing_of, write_card
from loraformat.jobs.convert import base_model_of
from loraformat.jobs.inputs.subject import open_subject
from loraformat.matching.base_fingerprint import fingerprint_of
from loraformat.model.adapter import AdapterConfig
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.binding import SUFFIXES, binding_of, bound
from loraformat.model.bundle import Bundle, File, Json, JsonFile
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.verbs import ConvertResult
from loraformat.model.summary import summarize
from loraformat.report import Report
from loraformat.rules import refuse
from loraformat.storage import LocalStore, Location, Publication, Publishing, is_local, permissions_for, stage, uri_of

_TO_A_COPY = "write a copy with -o OUT"
_NATIVE = "lora_config.json"
_HUB = "hf://"


def stamp(
    adapter: Location,
    base: Location,
    out: Location | None = None,
    *,
    in_place: bool = False,
    base_model: str | None = None,
    format: str | None = None,  # noqa: A002
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    force: bool = False,
    overwrite: bool = False,
    publication: Publication | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Record name, revision and fingerprint of `base` in the adapter: in a copy `out`, or in its own file.

    >>> import loraformat
    >>> converted = loraformat.convert("fixtures/minigpt/lora_adapter", "as-native", to="native", alpha=1.0)
    >>> report = loraformat.stamp("as-native", "fixtures/minigpt/base", "stamped")
    >>> loraformat.load_adapter("stamped").config.base_fingerprint[:9]
    'lf1:dense'

    The native format records it in lora_config.json, every other format in its safetensors or GGUF file. Tensors and
    all other files do not change.

    Args:
        adapter: folder or file.
        base: folder, file or hf:// address of the base.
        out: folder that does not exist yet; None with `in_place`.
        in_place: replace the one file that changes, atomically.
        base_model: "NAME" or "NAME@REVISION"; by default the one in an hf:// address, otherwise the adapter's.
        format, alpha, assumptions: as for `convert`.
        force: stamp although the adapter does not fit the base, if the error is forgivable.
        overwrite: replace an existing folder.
        publication: how an output is uploaded to the Hub.
        progress: called with (bytes done, bytes in all).

    Raises: UsageError (LF021): neither or both of `out` and `in_place`, or `in_place` for an adapter that is not on a
        local disk. AdapterRefused (LF800): the adapter does not fit the base. UnsupportedUpdate (LF013): the adapter
        has no file that can record it. StorageError, ContainerError, FormatError.
    """
    adapter, base = uri_of(adapter), uri_of(base)
    if (out is None) is not in_place:
        raise UsageError("expected either -o OUT or --in-place", where="command line")
    if in_place and not is_local(adapter):
        raise UsageError(
            "only an adapter on a local disk can be changed in place", where="--in-place", hint="use -o OUT"
        )
    checkpoint = open_checkpoint(base)
    opened, found = open_subject(adapter, base=checkpoint, assumptions=with_alpha(alpha, assumptions), format=format)
    others = tuple(each for each in found if each.code not in _REPLACED)
    # That an earlier stamp is about another base is worth a word, and no reason to refuse the new one.
    earlier = [replace(each, severity=Severity.WARNING) for each in found if each.code in _REPLACED]
    findings = (*refuse(others, adapter, force=force), *earlier)
    name, revision = _name_of(base, checkpoint.uri, base_model, opened.adapter.config)
    facts = AdapterConfig(base_model=name, base_revision=revision, base_fingerprint=fingerprint_of(checkpoint).text)
    file = _stamped(opened, facts)
    bundle = replace(opened.bundle, files={**opened.bundle.files, file.name: file})
    met: list[Finding] = []
    publishing = None if out is None else publishing_of(publication, uri_of(out), met.extend)
    sizes = (
        _in_place(opened.bundle, file, progress)
        if out is None
        else _copied(bundle, uri_of(out), (adapter, base), progress, publishing, checkpoint, overwrite=overwrite)
    )
    return Report(
        job="stamp",
        subject=adapter,
        format=opened.format.NAME,
        reason=opened.reason,
        summary=summarize(replace(opened.adapter, config=_with(opened.adapter.config, facts))),
        data=ConvertResult(
            source=opened.format.NAME,
            target=opened.format.NAME,
            weights=len(opened.adapter.updates),
            bytes_written=sum(sizes.values()),
            files=tuple(sorted(os.path.basename(path) for path in sizes)),
        ),
        findings=(*findings, *met),
        written=tuple(sizes),
    )


# What an earlier stamp said, which this one replaces.
_REPLACED = ("LF320", "LF321")


def _name_of(uri: str, pinned: str, stated: str | None, config: AdapterConfig) -> tuple[str | None, str | None]:
    """(name, revision): the caller's, or those of the repository; a local path says nothing to others."""
    if stated is not None:
        return base_model_of(stated)
    if uri.startswith(_HUB):
        name, _, rest = pinned.removeprefix(_HUB).partition("@")
        return name, rest.partition("/")[0] or None
    return config.base_model, config.base_revision


def _with(config: AdapterConfig, facts: AdapterConfig) -> AdapterConfig:
    return replace(
        config,
        base_model=facts.base_model,
        base_revision=facts.base_revision,
        base_fingerprint=facts.base_fingerprint,
    )


def _stamped(opened: Opened, facts: AdapterConfig) -> File:
    """The one file that changes. Raises: UnsupportedUpdate (LF013): there is none with a place for it."""
    files = opened.bundle.files
    config = files.get(_NATIVE)
    if opened.format.NAME == "native" and isinstance(config, JsonFile):
        value = config.load()
        if isinstance(value, dict) and value.get("format_version"):
            return json_file(_NATIVE, {**value, "base_model": _native(facts)})
        raise UnsupportedUpdate(
            "version 0 of the native format cannot record the base",
            where=opened.uri,
            hint="convert it with --to native, which writes version 1",
        )
    tensors = [
        file
        for file in opened.bundle.tensor_files()
        if file.name.lower().endswith(SUFFIXES) and file.open().container in ("safetensors", "gguf")
    ]
    if not tensors:
        raise UnsupportedUpdate(
            "this adapter cannot record its base: it has no safetensors or GGUF file",
            where=opened.uri,
            hint="convert it with --container safetensors, then stamp the output",
        )
    return bound(tensors[0], binding_of(facts))


def _native(facts: AdapterConfig) -> dict[str, Json]:
    return {"name": facts.base_model, "revision": facts.base_revision, "fingerprint": facts.base_fingerprint}


def _in_place(bundle: Bundle, file: File, progress: Callable[[int, int], None] | None) -> dict[str, int]:
    folder = (os.path.dirname(bundle.uri) or ".") if bundle.is_single_file else bundle.uri
    path = os.path.join(folder, file.name)
    if os.path.islink(path):
        raise StorageError("a symbolic link; only a regular file can be replaced", where=path, hint=_TO_A_COPY)
    try:
        store = LocalStore(folder, stat.S_IMODE(os.stat(path).st_mode))
        save_bundle(replace(bundle, files={file.name: file}), store, progress)
    except (StorageError, OSError) as error:
        reason = error.message if isinstance(error, StorageError) else "it cannot be read"
        raise StorageError(reason, where=path, hint=_TO_A_COPY) from error
    return {path: os.path.getsize(path)}


def _copied(
    bundle: Bundle,
    out: str,
    inputs: tuple[str, ...],
    progress: Callable[[int, int], None] | None,
    publishing: Publishing | None,
    base: Checkpoint,
    *,
    overwrite: bool,
) -> dict[str, int]:
    hidden = [name for name in bundle.files if name.startswith(".")]
    kept = replace(bundle, files={name: file for name, file in bundle.files.items() if name not in hidden})
    permissions = permissions_for([(bundle.opened, bundle.files)], out)
    with stage(
        out,
        overwrite=overwrite,
        inputs=inputs,
        names=frozenset(kept.files),
        permissions=permissions,
        publishing=publishing,
    ) as store:
        written = save_bundle(kept, store, progress)
        store.seal([file.name for file in kept.tensor_files()])
        sizes = {os.path.join(out, name): store.files()[name] for name in written}
        write_card(store, out, publishing, lambda: Origin(base=base.uri, base_fields=fields_of_card(base.store)))
    return sizes
