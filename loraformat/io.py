"""URI → Adapter → URI, written once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraformat import formats
from loraformat.budget import Budget
from loraformat.containers import (
    CONTAINERS,
    bundle_of_store,
    open_adapter_files,
    open_bundle,
    open_checkpoint,
    save_bundle,
    with_components,
)
from loraformat.diagnostics import Finding, FindingLocation, Severity, in_weights
from loraformat.errors import (
    AdapterRefused,
    ConfigError,
    LoraFormatError,
    NonFiniteValue,
    UsageError,
    require_one_of,
)
from loraformat.formats.kit.base import Format, Hints, Match, WriteOptions
from loraformat.formats.kit.findings import found_below
from loraformat.model.adapter import Adapter
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.binding import SUFFIXES, binding_of, bound, with_bound_base
from loraformat.model.bundle import Bundle, TensorFile, Tensors
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.format_files import CONFIGS, weights_beside
from loraformat.model.tensors import LazyTensor
from loraformat.storage import (
    ANYONE,
    Location,
    Output,
    Publication,
    Publishing,
    is_local,
    listed,
    open_store,
    stage,
    uri_of,
)

if TYPE_CHECKING:
    from loraformat.model.tensors import Values


def folder_of(uri: str) -> str:
    """The folder of an adapter, for the path of one of its files; any other URI as it is."""
    folder, name = os.path.split(uri)
    if not is_local(uri):
        return folder if _is_part_at(folder, name) else uri
    is_part = any(
        name in (config, *weights_beside(config)) and os.path.isfile(os.path.join(folder, config)) for config in CONFIGS
    )
    return (folder or ".") if is_part and os.path.isfile(uri) else uri


def _is_part_at(folder: str, name: str) -> bool:
    """Whether a file of another machine belongs to an adapter whose config lies beside it."""
    configs = [config for config in CONFIGS if name in (config, *weights_beside(config))]
    try:
        return bool(configs) and not {*configs}.isdisjoint(open_store(folder).files())
    except LoraFormatError:
        return False


def open_files(uri: str, *, format: str | None = None) -> Bundle:  # noqa: A002
    """The files of an adapter: of a folder, of the folder that a file belongs to, or one file.

    A weight file beside its config is taken for its folder, since the config says the scale; not where the format was
    chosen. A folder that only contains the one of an adapter stands for that one.

    Raises: StorageError: there is no such folder or file; and as `open_adapter_files`.
    """
    return open_bundle(uri) if format is not None else open_adapter_files(folder_of(uri))


@dataclass(frozen=True, slots=True)
class Opened:
    """An adapter with what was found out on the way.

    Attributes:
        format: the module that read it.
        reason: why that format was chosen.
    """

    uri: str
    bundle: Bundle
    format: Format
    reason: str
    adapter: Adapter


def open_adapter(uri: Location, *, format: str | None = None, hints: Hints = Hints()) -> Opened:  # noqa: A002
    """Detect and read an adapter; headers only.

    Args:
        uri: folder or file.
        format: name of a format, to skip detection.
        hints: what the files do not say.

    Raises: StorageError, ContainerError, FormatError and their subclasses.
    """
    return read_bundle(open_files(uri_of(uri), format=format), format=format, hints=hints)


def read_bundle(bundle: Bundle, *, format: str | None = None, hints: Hints = Hints()) -> Opened:  # noqa: A002
    """As `open_adapter`, for files that are open already."""
    if format is None:
        chosen, found = formats.detect(bundle)
    else:
        chosen, found = formats.get(format), Match(certain=True, reason="chosen with --from")
    adapter = _with_task(_read(chosen, bundle, hints), hints.task)
    adapter = replace(adapter, config=with_bound_base(adapter.config, bundle))
    if hints.transposed is not None:
        adapter = replace(adapter, config=replace(adapter.config, transposed=hints.transposed))
    if bundle.named:
        adapter = replace(
            adapter, notes=(found_below(FindingLocation(subject=bundle.named), bundle.uri), *adapter.notes)
        )
    return Opened(bundle.uri, bundle, chosen, found.reason, adapter)


def _read(chosen: Format, bundle: Bundle, hints: Hints) -> Adapter:
    """The adapter as it lands on the base: in llama.cpp's names and order of rows where that is a GGUF file."""
    if not hints.settings or chosen.NAME == "gguf":
        return chosen.read(bundle, hints=hints)
    from loraformat.formats.gguf.translate import translated
    from loraformat.naming import model_of_settings

    # The names of its tensors are not those that other formats look for.
    adapter = chosen.read(bundle, hints=replace(hints, weights=None))
    model = model_of_settings(hints.settings)
    return adapter if model is None else translated(adapter, model, _experts_of(hints)).adapter


def _experts_of(hints: Hints) -> int | None:
    """How many experts the stacks of a GGUF base have."""
    count = hints.settings.get(f"{hints.settings.get('general.architecture')}.expert_count")
    return count if isinstance(count, int) and count else None


def hints_of(
    assumptions: Assumptions,
    base: Checkpoint | None = None,
    budget: Budget | None = None,
    *,
    partial: bool = False,
) -> Hints:
    """As hints for a reader, with the base's names, shapes and config where there is one, and the steps of the run."""
    if base is None:
        return Hints(**assumptions.said(), is_partial=partial, budget=budget)
    return Hints(
        **assumptions.said(),
        weights={name: tensor.shape for name, tensor in base.tensors.items()},
        components=tuple(base.components),
        is_partial=partial,
        budget=budget,
        config=base.config,
        settings=base.settings,
    )


def _with_task(adapter: Adapter, task: str | None) -> Adapter:
    """The adapter with the task that the caller states; ConfigError (LF103) where it states another with a head."""
    stated = adapter.config.task
    if task is None or stated == task:
        return adapter
    from loraformat.naming import TASKS

    if stated in TASKS:
        raise ConfigError(f"the adapter states {stated}, but --assume states task={task}", where="command line")
    return replace(adapter, config=replace(adapter.config, task=task))


def load_adapter(
    uri: Location,
    *,
    base: Location | Checkpoint | None = None,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    format: str | None = None,  # noqa: A002
    partial: bool = False,
) -> Adapter:
    """Load an adapter: only headers are read; values are read by a tensor's `load()` or `torch()`.

    >>> import loraformat
    >>> adapter = loraformat.load_adapter("fixtures/good/peft/tiny-llama")
    >>> len(adapter.updates), adapter.config.base_model
    (9, 'loraformat/tiny-llama')

    Args:
        uri: folder, file or "hf://owner/name".
        base: the base, opened or as a path; its names and shapes supply what the files of some formats leave open.
        alpha: for files that do not state it; short for `assumptions=Assumptions(alpha=…)`.
        assumptions: what else the files do not say.
        format: name of a format ("peft", "native", "dump"), to skip detection.
        partial: leave out the tensors of an image or video adapter that loraformat cannot interpret, and list them in
            the notes, instead of refusing the file.

    Raises: LoraFormatError and its subclasses; AssumptionContradicted (LF024): the files contradict an assumption.
    """
    opened = open_checkpoint(base) if base is not None and not isinstance(base, Checkpoint) else base
    hints = hints_of(with_alpha(alpha, assumptions), opened, partial=partial)
    return open_adapter(uri, format=format, hints=hints).adapter


def save_adapter(
    adapter: Adapter,
    target: Location,
    *,
    to: str,
    container: str | None = None,
    peft_version: tuple[int, int] | None = None,
    base: Location | Checkpoint | None = None,
    modelfile: str = "",
    overwrite: bool = False,
    inputs: Sequence[Location] = (),
    publication: Publication | None = None,
    permissions: int = ANYONE,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[Bundle], None] | None = None,
) -> tuple[str, ...]:
    """Write an adapter into a new folder, completely or not at all, and return the names of its files.

    >>> import loraformat
    >>> adapter = loraformat.load_adapter("fixtures/good/peft/rslora")
    >>> loraformat.save_adapter(adapter, "rslora-native", to="native")[-2:]
    ('lora_config.json', 'lora_weights.safetensors')

    Args:
        adapter: from `load_adapter`.
        target: folder that does not exist yet.
        to: name of the format.
        container: "safetensors" or "torch", where the format leaves the choice.
        peft_version: (major, minor) of the oldest PEFT that must read the output.
        base: the base, opened or as a path, for "gguf", which has its own tensor names.
        modelfile: name of the base in Ollama; writes a Modelfile next to a GGUF adapter.
        overwrite: replace an existing folder that is empty, or holds only files that this call writes.
        inputs: paths that must not be overwritten.
        publication: how it is uploaded, if `target` is an address on the Hub; without a model card.
        permissions: mode bits that the output may have, in addition to the umask.
        progress: called with (bytes done, bytes in all).
        check: called with the written files before they are moved into place; if it raises, there is no output.

    Raises: UsageError: no such format is written; AdapterRefused: the format cannot express an update; StorageError:
        the output cannot be written.
    """
    publishing = None if publication is None else Publishing(publication)
    written = write_adapter(
        adapter,
        target,
        to=to,
        container=container,
        peft_version=peft_version,
        base=base,
        modelfile=modelfile,
        overwrite=overwrite,
        inputs=inputs,
        publishing=publishing,
        permissions=permissions,
        progress=progress,
        check=check,
    )
    return tuple(written)


def write_adapter(
    adapter: Adapter,
    target: Location,
    *,
    to: str,
    container: str | None = None,
    peft_version: tuple[int, int] | None = None,
    base: Location | Checkpoint | None = None,
    modelfile: str = "",
    overwrite: bool = False,
    inputs: Sequence[Location] = (),
    publishing: Publishing | None = None,
    permissions: int = ANYONE,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[Bundle], None] | None = None,
    finish: Callable[[Output], None] | None = None,
) -> dict[str, int]:
    """As `save_adapter`.

    Args:
        publishing: how it gets onto the Hub.
        finish: called with the output when its files are written and checked, to add others that are not the adapter's.

    Returns: the names of the adapter's files → bytes.
    """
    out = uri_of(target)
    anything: object = adapter
    if not isinstance(anything, Adapter):
        text = f"expected an Adapter, found {type(anything).__name__}"
        raise UsageError(text, where="adapter", hint="make one with load_adapter(PATH)")
    if container is not None:
        require_one_of(container, sorted(CONTAINERS), "container")
    chosen = formats.writable(to)
    opened = open_checkpoint(base) if base is not None and not isinstance(base, Checkpoint) else base
    known = hints_of(Assumptions(), opened)
    options = WriteOptions(container=container, peft_version=peft_version, base=known, modelfile=modelfile)
    refuse_losses(tuple(chosen.losses(adapter, options)), to)
    made = chosen.write(adapter, options)
    # The native config has a place for it.
    bundle = _finite(made if to == "native" else _bound(made, adapter))
    names = frozenset(bundle.files)
    with stage(
        out,
        overwrite=overwrite,
        inputs=listed(inputs),
        names=names,
        permissions=permissions,
        publishing=publishing,
    ) as store:
        written = save_bundle(bundle, store, progress)
        store.seal([name for name, file in bundle.files.items() if isinstance(file, TensorFile)])
        if check is not None:
            check(with_components(bundle_of_store(store, out)))
        sizes = _sizes(store, written)
        if finish is not None:
            finish(store)
        return sizes


def _sizes(store: Output, names: Sequence[str]) -> dict[str, int]:
    """Bytes of files of an output, those of its subfolders included."""
    sizes: dict[str, int] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder:
            with store.subfolder(folder) as inner:
                sizes[name] = inner.files()[file]
        else:
            sizes[name] = store.files()[file]
    return sizes


def _bound(bundle: Bundle, adapter: Adapter) -> Bundle:
    """The files, of which the weight file carries the fingerprint of the base where it has room for it."""
    facts = binding_of(adapter.config)
    files = {
        name: bound(file, facts)
        if isinstance(file, TensorFile) and name.endswith(SUFFIXES) and facts and "/" not in name
        else file
        for name, file in bundle.files.items()
    }
    return replace(bundle, files=files)


def _finite(bundle: Bundle) -> Bundle:
    """The same files, whose tensors are checked as they are loaded."""
    files = {
        name: replace(file, open=_checked(file)) if isinstance(file, TensorFile) else file
        for name, file in bundle.files.items()
    }
    return replace(bundle, files=files)


def _checked(file: TensorFile) -> Callable[[], Tensors]:
    def opened() -> Tensors:
        tensors = file.open()
        entries = {
            name: _checked_tensor(in_weights(name, file=file.name), lazy) for name, lazy in tensors.entries.items()
        }
        return replace(tensors, entries=entries)

    return opened


def _checked_tensor(where: FindingLocation, lazy: LazyTensor) -> LazyTensor:
    """A tensor that raises NonFiniteValue (LF402) when rows with NaN or infinity are loaded."""
    if not lazy.dtype.is_floating:
        return lazy

    def read(start: int, stop: int) -> Values:
        import numpy as np

        values = lazy.read(start, stop)
        if not np.isfinite(values).all():
            raise NonFiniteValue(
                "the adapter holds NaN or infinity", where=where, hint="the training run may have diverged"
            )
        return values

    return replace(lazy, read=read, raw=None)


def refuse_losses(losses: tuple[Finding, ...], to: str, *, strict: bool = False) -> None:
    """Raise AdapterRefused where writing would change the model, or with `strict` where anything at all is lost."""
    least = Severity.INFO if strict else Severity.ERROR
    fatal = [loss for loss in losses if loss.severity >= least]
    if fatal:
        more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
        raise AdapterRefused(
            f"{fatal[0].where + ': ' if fatal[0].where else ''}{fatal[0].message}{more}",
            where=f"convert to {to}",
            hint=fatal[0].hint,
            findings=losses,
        )
