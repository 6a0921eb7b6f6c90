"""The formats: one module a dialect, with NAME, TITLE, SPEC, WRITES and sniff, read, losses, write."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraformat.diagnostics import did_you_mean, listed, show
from loraformat.errors import AmbiguousFormat, UnknownFormat, UsageError
from loraformat.formats.kit.base import Format, Match
from loraformat.model.bundle import Bundle
from loraformat.model.format_files import FORMAT_FILES, NAMES, the_file

if TYPE_CHECKING:
    from loraformat.formats import (  # noqa: TC004 - modules  # noqa: TC004 - modules  # noqa: TC004 - modules
        comfy,
        diffusers,
        dump,
        gguf,
        kohya,
        litgpt,
        loralib,
        lycoris,
        minimind,
        minlora,
        mlx,
        native,
        nemo,
        peft,
        raschka,
        tinker,
        torchtune,
        xlabs,
    )

    _LANGUAGE: tuple[Format, ...] = (native, peft, mlx, gguf, tinker, torchtune, litgpt, nemo)
    _IMAGE: tuple[Format, ...] = (diffusers, kohya, comfy, lycoris, xlabs)
    _HAND_WRITTEN: tuple[Format, ...] = (loralib, minlora, raschka, minimind, dump)

__all__ = ["FORMATS", "detect", "foreign", "get", "gguf", "kit", "native", "peft", "writable"]


class _Formats:
    """All formats in their order, each imported when it is reached."""

    def __iter__(self) -> Iterator[Format]:
        return map(_imported, NAMES)


FORMATS = _Formats()


def _imported(name: str) -> Format:
    found: Any = import_module(f"loraformat.formats.{name}")
    module: Format = found
    return module


def get(name: str) -> Format:
    """The format called `name`. Raises UsageError (LF021), with the nearest name."""
    if name in NAMES:
        return _imported(name)
    hint = f"{did_you_mean(name, NAMES)}the formats are {', '.join(NAMES)}"
    raise UsageError(f'there is no format "{show(name, 40)}"', hint=hint)


def writable(name: str) -> Format:
    """The format called `name`, for `--to`. Raises UsageError (LF021) where it does not exist or is only read."""
    if name in NAMES and _imported(name).WRITES:
        return _imported(name)
    names = [each.NAME for each in FORMATS if each.WRITES]
    known = f"writable formats: {', '.join(names)}"
    if name in NAMES:
        raise UsageError(f"loraformat reads {name} but does not write it", where="--to", hint=known)
    hint = f"{did_you_mean(name, names)}{known}"
    raise UsageError(f'there is no format "{show(name, 40)}"', where="--to", hint=hint)


def detect(bundle: Bundle) -> tuple[Format, Match]:
    """The format of a bundle, and why. A certain match wins over uncertain ones.

    Raises:
        AmbiguousFormat (LF011): several formats fit with equal right.
        UnknownFormat (LF010): none does.
        ContainerError: the only weight file is not what its name says (a Git-LFS pointer, an HTML page).
    """
    candidates = (_imported(row.name) for row in FORMAT_FILES if row.may_fit(bundle))
    matches = [(each, match) for each in candidates if (match := each.sniff(bundle)) is not None]
    best = [(each, match) for each, match in matches if match.certain]
    if not best:
        _refuse_unread(bundle)
        best = matches
    if not best:
        raise _unknown(bundle)
    if len(best) > 1:
        reasons = "; ".join(f"{each.NAME} ({match.reason})" for each, match in best)
        raise AmbiguousFormat(f"several formats fit: {reasons}", where=bundle.uri, hint="choose with --from")
    return best[0]


def _refuse_unread(bundle: Bundle) -> None:
    """Raises: UnknownFormat (LF010): the names in the file are those of a dialect that is not read."""
    from loraformat.formats.foreign import dialect_of

    file = the_file(bundle)
    found = None if file is None else dialect_of(file.open().entries)
    if found is not None:
        raise UnknownFormat(
            f'this looks like {found[0]}, which is not supported yet: no base has the name "{show(found[1], 100)}"',
            where=bundle.uri,
            hint="--from dump uses the names as they are in the file",
        )


def _unknown(bundle: Bundle) -> UnknownFormat:
    from loraformat.formats.foreign import described, first_names

    what, hint = described(bundle)
    tensors = first_names(bundle)
    if what:
        return UnknownFormat(f"this is {what}{f': {tensors}' if tensors else ''}", where=bundle.uri, hint=hint)
    if not bundle.files and not bundle.folders:
        return UnknownFormat("the folder is empty", where=bundle.uri, hint=_GIVE_A_FOLDER)
    names = [show(name, 60) for name in bundle.files if not name.startswith(".")]
    seen = listed(names, 8)
    told = dict.fromkeys(row.config or row.weights[0] for row in FORMAT_FILES if row.config or row.weights)
    looked_for = f"{', '.join(told)}, or one tensor file with pairs of lora_A and lora_B"
    text = f"no format fits: looked for {looked_for}; found {seen or 'no files'}{f'; {tensors}' if tensors else ''}"
    return UnknownFormat(text, where=bundle.uri, hint=_remedy(bundle))


_GIVE_A_FOLDER = "pass the folder with the adapter's files"
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".zst")


def _remedy(bundle: Bundle) -> str:
    """What to do with files that no format explains."""
    from loraformat.formats.foreign import with_pairs

    pairs = with_pairs(bundle)
    if pairs and not bundle.is_single_file:
        found = f"of several weight files {show(pairs, 60)} has LoRA's names"
        return f"{found}: pass that file, or put all of them into one folder as in docs/formats/native.md"
    if any(name.lower().endswith(_ARCHIVES) for name in bundle.files):
        return "unpack the archive and pass the folder"
    return "docs/formats lists the names that are recognized" if bundle.tensor_files() else _GIVE_A_FOLDER
