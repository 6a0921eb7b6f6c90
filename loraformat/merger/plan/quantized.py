"""What happens to the weights of a quantized base, and the resulting settings files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from loraformat.containers.quantized import SCHEMES, laid_out
from loraformat.diagnostics import counted
from loraformat.errors import MergeError, UnsupportedUpdate, UsageError
from loraformat.matching import left_over, quantization_of
from loraformat.merger.plan.data import Edit, PlannedTensor, QuantizedOutput
from loraformat.merger.plan.edits import Edits
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, WeightFile
from loraformat.model.tensors import DType

_CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")
_STAYS = "weights cannot stay quantized if layers are replicated or a task head is added"
_DENSE = "use --dequantize (all weights dense) or --keep-quantized (only those that change)"


@dataclass(frozen=True, slots=True)
class Decoded:
    """A base as its output will have it.

    Attributes:
        base: headers: some quantized weights dense, the parts of the others; values as in the base.
        found: edits, one for each quantized weight that becomes dense.
        output: for the plan; None for a base that is not quantized.
        dense, kept: the quantized weights that are written dense, and those that stay in codes, sorted.
        parts: names of the tensors that those are stored in.
        files: the weight files of the base that still have a tensor.
    """

    base: Checkpoint
    found: Edits
    output: QuantizedOutput | None
    dense: tuple[str, ...]
    kept: tuple[str, ...]
    parts: frozenset[str]
    files: frozenset[str]


@dataclass(frozen=True, slots=True)
class Settings:
    """What changes in the files that describe a quantization.

    Attributes:
        patch, removed: see `MergePlan.config_patch` and `config_removed`.
        files: see `MergePlan.settings`.
        left_out: files that the output must not have.
    """

    patch: tuple[tuple[tuple[str, ...], Json], ...] = ()
    removed: tuple[tuple[str, ...], ...] = ()
    files: tuple[tuple[str, Json], ...] = ()
    left_out: tuple[str, ...] = ()


def quantized_output(base: Checkpoint, found: Edits, wanted: str | None) -> Decoded:
    """The base with those quantized weights dense that the output has so.

    Args:
        wanted: "dense": all; "mixed": those that updates reach and those that runtimes load as one with them;
            "recoded": none, those that updates reach are put into codes again; None: there is no such update.

    Raises:
        UnsupportedUpdate (LF013): an update reaches a quantized weight, and nothing says what shall become of it; all
            shall be dense, and the scheme is not known.
        MergeError (LF801): weights shall stay in codes while layers are replicated, or the head of a task is added.
        UsageError (LF021): something is wanted of a base that is not quantized.
    """
    if base.quantized is None:
        _check_not_wanted(base, wanted, is_merge=bool(found.edits))
        return Decoded(base, found, None, (), (), frozenset(), frozenset(base.files))
    weights = base.quantized.weights
    touched = {code for edit in found.edits.values() if (code := base.tensors[edit.source].encoded)}
    if wanted is None and touched:
        raise UnsupportedUpdate(
            f"the base is quantized ({base.quantized.scheme}), and {counted(len(touched), 'weight', 'is')} "
            f"changed but stored quantized, first {min(touched)}",
            where="merge",
            hint=_DENSE,
        )
    if wanted == "recoded":
        return _recoded_output(base, found)
    is_dense = wanted == "dense"
    scheme = SCHEMES[base.quantized.scheme]
    dense = weights.keys() if is_dense else scheme.together(touched, weights.keys()) | touched
    kept = tuple(sorted(weights.keys() - dense))
    if base.layers or base.task is not None:
        if kept:
            raise MergeError(_STAYS, where="merge", hint="use --dequantize")
        layout = base
    else:
        layout = laid_out(base, set(dense))
    return Decoded(
        layout,
        _dense_edits(layout, found),
        QuantizedOutput(base.quantized.scheme, is_dense, base.quantized.on_loading),
        tuple(sorted(dense)),
        kept,
        frozenset(part for name in kept for part in weights[name].parts),
        frozenset(name for name, file in layout.files.items() if file.names),
    )


def _recoded_output(base: Checkpoint, found: Edits) -> Decoded:
    """The base as it is stored, with edits that write the codes and scales of each weight that an update reaches.

    They go into the file of the weight's codes, wherever the base has its scales.

    Raises: UnsupportedUpdate (LF013): see `encoder_of`. MergeError (LF801): an update gives a weight another shape, or
        takes it out of a table; files are not safetensors; layers are replicated, or the head of a task is added.
    """
    from loraformat.containers.quantized.recoding import encoder_of

    assert base.quantized is not None
    if base.layers or base.task is not None:
        raise MergeError(_STAYS, where="merge", hint="use --dequantize")
    if any(file.container != "safetensors" for file in base.files.values()):
        raise MergeError("only weights in safetensors files can be quantized again", where="merge", hint=_DENSE)
    edits = dict(found.edits)
    for name, edit in found.edits.items():
        code = base.tensors[edit.source].encoded
        if not code:
            continue
        if name != code or edit.shape != base.quantized.weights[code].shape:
            text = f"{name}: it is quantized, and an update changes its shape or its position"
            raise MergeError(text, where="merge", hint=_DENSE)
        parts = encoder_of(base.quantized, code).parts
        planned = tuple(PlannedTensor(part.name, part.dtype.safetensors, part.shape) for part in parts)
        edits[name] = replace(edit, dtype=DType.F32.safetensors, parts=planned)
    layout = _gathered(laid_out(base, set()), [edit.parts for edit in edits.values() if edit.parts])
    return Decoded(
        layout,
        Edits(edits, found.untied, found.resized),
        QuantizedOutput(base.quantized.scheme, is_dense=False, is_recoded=True),
        (),
        tuple(sorted(base.quantized.weights)),
        frozenset(part for weight in base.quantized.weights.values() for part in weight.parts),
        frozenset(name for name, file in layout.files.items() if file.names),
    )


def _gathered(layout: Checkpoint, several: Iterable[tuple[PlannedTensor, ...]]) -> Checkpoint:
    """A layout in which the parts of each weight are in the file of the first of them."""
    home = {part.name: layout.tensors[parts[0].name].file for parts in several for part in parts}
    moved = {name: file for name, file in home.items() if layout.tensors[name].file != file}
    if not moved:
        return layout
    files = {
        file.name: replace(
            file,
            names=(
                *(name for name in file.names if name not in moved),
                *(name for name, target in moved.items() if target == file.name),
            ),
        )
        for file in layout.files.values()
    }
    return replace(layout, files=files)


def _check_not_wanted(base: Checkpoint, wanted: str | None, *, is_merge: bool) -> None:
    if wanted is None:
        return
    quantization = quantization_of(base)
    if quantization is None:
        settings = left_over(base)
        if settings is not None:
            hint = f"its weights are dense; remove the quantization settings ({settings.scheme}) from {settings.where}"
        else:
            others = "--dequantize, --keep-quantized and --requantize"
            hint = f"leave {others} out" if is_merge else "its weights are already dense"
        raise UsageError("the base is not quantized", where=base.uri, hint=hint)
    if wanted == "dense":
        raise UnsupportedUpdate(
            f"the base is quantized ({quantization.scheme}, says {quantization.where}), which is not supported",
            where=base.uri,
            hint="use the 16-bit checkpoint that it was made from",
        )


def _dense_edits(base: Checkpoint, found: Edits) -> Edits:
    """The edits, with one for every quantized weight of a layout that is dense, in the dtype that it has so."""
    assert base.quantized is not None
    weights = base.quantized.weights
    edits = dict(found.edits)
    for name, edit in found.edits.items():
        code = base.tensors[edit.source].encoded
        if code:
            edits[name] = replace(edit, dtype=weights[code].dtype.safetensors)
    for name, tensor in base.tensors.items():
        if tensor.encoded and name not in edits:
            # The matrices of a stack in rows: the stack of a layer may be gigabytes.
            row_axes = 2 if len(tensor.shape) == 3 else 1
            edits[name] = Edit(name, name, weights[tensor.encoded].dtype.safetensors, tensor.shape, (), row_axes)
    return Edits(dict(sorted(edits.items())), found.untied, found.resized)


def is_decoded(file: WeightFile, base: Checkpoint) -> bool:
    """Whether a file of a layout holds other tensors than in the base, since a quantized weight is dense.

    Names alone do not tell: codes may stand under the name of the weight, and all of its scales in another file.
    """
    if base.quantized is None:
        return False
    is_changed = base.quantized.stored.files[file.name].names != file.names
    return is_changed or any(base.tensors[name].encoded for name in file.names if name in base.tensors)


def settings_of(base: Checkpoint, decoded: Decoded, dtype: DType | None) -> Settings:
    """What config.json and the files about the quantization must say of an output.

    A dense output states its dtype, by which a runtime would else have to guess.
    """
    if decoded.output is None or not (decoded.dense or decoded.output.is_dense):
        return Settings()
    files: Mapping[str, Json] = {**({_CONFIG: dict(base.config)} if base.config else {}), **base.quantization_files}
    changed = SCHEMES[decoded.output.scheme].described(files, decoded.dense, decoded.kept)
    config = changed.get(_CONFIG, dict(base.config))
    assert isinstance(config, Mapping)
    changes = dict(_changes(base.config, config, ()))
    beside = {name: value for name, value in changed.items() if name != _CONFIG}
    return Settings(
        (
            *((path, value[0]) for path, value in changes.items() if value is not None),
            *_stated_dtype(base, decoded, dtype),
        ),
        tuple(path for path, value in changes.items() if value is None),
        tuple(sorted((name, value) for name, value in beside.items() if value is not None)),
        tuple(sorted(name for name, value in beside.items() if value is None)),
    )


def _stated_dtype(base: Checkpoint, decoded: Decoded, dtype: DType | None) -> Iterator[tuple[tuple[str, ...], Json]]:
    """The dtype of a dense output, where config.json states none."""
    assert base.quantized is not None
    dtypes = {base.quantized.weights[name].dtype for name in decoded.dense} if dtype is None else {dtype}
    if base.config and not decoded.kept and len(dtypes) == 1 and not any(base.config.get(key) for key in _DTYPE_KEYS):
        yield ("torch_dtype",), dtypes.pop().torch_name


def _changes(
    old: Mapping[str, Json], new: Mapping[str, Json], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[Json] | None]]:
    """Paths of keys → the new value in a tuple, None where the key is gone."""
    for key in old:
        if key not in new:
            yield (*path, key), None
    for key, value in new.items():
        before = old.get(key)
        if key in old and isinstance(before, Mapping) and isinstance(value, Mapping):
            yield from _changes(before, value, (*path, key))
        elif key not in old or before != value:
            yield (*path, key), (value,)
