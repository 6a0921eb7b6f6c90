"""The formats: one module a dialect, with NAME, TITLE, SPEC, WRITES and sniff, read, losses, write."""

from __future__ import annotations

from loraformat.diagnostics import show
from loraformat.errors import AmbiguousFormat, UnknownFormat
from loraformat.formats import dump, litgpt, loralib, minimind, minlora, mlx, native, peft, raschka
from loraformat.formats.base import Format, Match
from loraformat.model.bundle import Bundle

# The order of `loraformat formats`. It decides nothing: where two formats fit with equal right, the user is asked.
FORMATS: tuple[Format, ...] = (native, peft, mlx, loralib, litgpt, minlora, raschka, minimind, dump)


def get(name: str) -> Format:
    """The format called `name`. Raises UnknownFormat (LF010)."""
    for each in FORMATS:
        if name == each.NAME:
            return each
    known = ", ".join(each.NAME for each in FORMATS)
    raise UnknownFormat(f"there is no format {show(name, 40)}", hint=f"the formats are {known}")


def detect(bundle: Bundle) -> tuple[Format, Match]:
    """The format of a bundle, and why. A certain match wins over uncertain ones.

    Raises:
        AmbiguousFormat (LF011): several formats fit with equal right.
        UnknownFormat (LF010): none does.
        ContainerError: the only weight file is not what its name says (a Git-LFS pointer, an HTML page).
    """
    matches = [(each, match) for each in FORMATS if (match := each.sniff(bundle)) is not None]
    best = [(each, match) for each, match in matches if match.certain]
    if not best:
        _refuse_unread(bundle)
        best = matches
    if not best:
        raise _unknown(bundle)
    if len(best) > 1:
        reasons = "; ".join(f"{each.NAME} ({match.because})" for each, match in best)
        raise AmbiguousFormat(f"several formats fit: {reasons}", where=bundle.uri, hint="choose with --from")
    return best[0]


# Files by which other dialects are told. They are refused by name rather than taken for something that they are not.
_UNREAD = {
    "pytorch_lora_weights.safetensors": "a diffusers adapter",
    "pytorch_lora_weights.bin": "a diffusers adapter",
}


def _refuse_unread(bundle: Bundle) -> None:
    for name, dialect in _UNREAD.items():
        if name in bundle.files:
            raise UnknownFormat(f"{name}: this is {dialect}, which is not read yet", where=bundle.uri)


def _unknown(bundle: Bundle) -> UnknownFormat:
    names = [show(name, 60) for name in bundle.files if not name.startswith(".")]
    seen = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    looked_for = (
        "lora_config.json, adapter_config.json, lit_model.pth.lora, or one tensor file with pairs of lora_A and lora_B"
    )
    return UnknownFormat(f"no format fits: looked for {looked_for}; found {seen or 'no files'}", where=bundle.uri)
